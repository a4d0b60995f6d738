"""On one service, this client and the official SDK send the same surrogate weights and end at the same model.

Data and loss are the same, the loss written once as a pipeline and once by hand (official_same_numbers_program.py).
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.client.recorder import Recorder, answering, http_recorder, quick_config, sent_weights
from tests.support.served import ENVIRONMENT
from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, RegularizerSpec
from tinkex_py.losses import packed_field
from tinkex_py.regularizers import L1, L2
from tinkex_py.transport import wire

PROGRAM = Path(__file__).with_name("official_same_numbers_program.py")
LENGTHS = (9, 3, 12, 1, 2, 7)
STEPS = 10
RANK, SEED = 4, 5
ADAM = {"learning_rate": 2e-3}
FLAGS = {"proto_write_fwdbwd": True, "parallel_fwdbwd_chunks": False, "use_pyqwest_transport": False}
# What the service says of chunks, and how many datums of LENGTHS then go into each. A datum of T tokens is estimated at
# 4 + 8 + 4 bytes a token: its own, its target and its weight (protocol: 5.3).
# In chunks, the bytes end the first and the second one, and the number of datums the third.
LIMITS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "whole": ({}, [6]),
    "chunks": (
        {"fwdbwd_max_chunk_len": 2, "fwdbwd_max_chunk_bytes_count": 16 * 12, "parallel_fwdbwd_chunks": True},
        [2, 1, 2, 1],
    ),
}


def told_data() -> list[dict[str, list[Any]]]:
    """What both sides make their datums of."""
    random = np.random.default_rng(11)
    return [
        {
            "tokens": random.integers(0, 256, length).tolist(),
            "targets": random.integers(0, 256, length).tolist(),
            "weights": random.normal(size=length).astype(np.float32).tolist(),
            "reference": random.normal(-5.0, 1.0, length).astype(np.float32).tolist(),
        }
        for length in LENGTHS
    ]


def our_data() -> list[Datum]:
    return [
        Datum(
            model_input=ModelInput.from_ints(told["tokens"]),
            loss_fn_inputs={
                "target_tokens": told["targets"],
                "weights": told["weights"],
                "reference": np.array(told["reference"], dtype=np.float32),
            },
        )
        for told in told_data()
    ]


def weighted_nll(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return -(packed_field(data, "weights") * logprobs).sum()


async def trained_by_us(url: str) -> str:
    """The path of the checkpoint after all steps."""
    terms = [
        RegularizerSpec(fn=L2(center="reference", mask=None, reduction="mean"), weight=0.5, name="drift"),
        RegularizerSpec(fn=L1(mask=None, reduction="mean"), weight=0.2, name="l1"),
    ]
    async with AsyncServiceClient(quick_config(url)) as service:
        training = await service.create_lora_training_client("tiny", rank=RANK, seed=SEED)
        for _ in range(STEPS):
            await training.forward_backward_custom(our_data(), weighted_nll, regularizers=terms)
            await training.optim_step(AdamParams(**ADAM))
        return (await training.save_state("after")).path


async def trained_by_the_official_sdk(url: str, runs: int) -> list[str]:
    """The same, for several models one after another, in a process of its own."""
    wanted = {"data": told_data(), "steps": STEPS, "rank": RANK, "seed": SEED, "adam": ADAM, "runs": runs}
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, str(PROGRAM), url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )
    output, errors = await program.communicate(json.dumps(wanted).encode())
    assert program.returncode == 0, errors.decode()
    return json.loads(output.splitlines()[-1])


def backward_passes(recorder: Recorder, model_id: str) -> list[wire.ForwardBackwardRequest]:
    """Those of a model by number; parallel chunks arrive in any order."""
    messages = [arrival.message for arrival in recorder.of("B") if arrival.message.model_id == model_id]
    return sorted(messages, key=lambda message: message.seq_id)


@pytest.mark.asyncio
async def test_the_official_sdk_sends_the_same_weights_and_ends_at_the_same_model(tmp_path):
    async with http_recorder() as (recorder, url):
        limits = [answering(200, FLAGS | told) for told, _ in LIMITS.values()]
        recorder.faults["config"] = [*limits]
        ours = [await trained_by_us(url) for _ in LIMITS]
        recorder.faults["config"] = [*limits]
        theirs = await trained_by_the_official_sdk(url, len(LIMITS))
        checkpoints = [await downloaded(url, path, tmp_path / str(index)) for index, path in enumerate(ours + theirs)]
    untouched = np.concatenate([datum["weights"] for datum in told_data()])
    for (name, (_, chunks)), our_path, their_path in zip(LIMITS.items(), ours, theirs, strict=True):
        passes = [backward_passes(recorder, path.split("/")[2]) for path in (our_path, their_path)]
        for messages in passes:
            assert [len(message.data) for message in messages] == chunks * STEPS, name
        our_weights, their_weights = (sent_weights(messages) for messages in passes)
        np.testing.assert_allclose(our_weights, their_weights, rtol=0, atol=1e-6, err_msg=name)
        first = our_weights[: sum(LENGTHS)]
        assert np.abs(first - untouched).max() > 1e-2  # the regularizers are in them
        assert np.abs(our_weights[-sum(LENGTHS) :] - first).max() > 1e-3  # and they change as the model is trained
    assert max(np.abs(values).max() for key, values in checkpoints[0].items() if "lora_B" in key) > 1e-3  # from 0
    for adapters in checkpoints[1:]:
        assert adapters.keys() == checkpoints[0].keys()
        for key, values in checkpoints[0].items():
            np.testing.assert_allclose(adapters[key], values, rtol=0, atol=1e-6, err_msg=key)


async def downloaded(url: str, path: str, folder: Path) -> dict[str, np.ndarray]:
    """The adapters in a checkpoint."""
    async with AsyncServiceClient(quick_config(url)) as service:
        await service.create_rest_client().download_checkpoint(path, folder)
    return load_file(folder / "adapter_model.safetensors")
