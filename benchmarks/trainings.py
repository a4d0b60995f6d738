"""Training on the embedded service, for `subject_process`."""

import asyncio
import hashlib
import tempfile
import time
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.composed import base_loss
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    AsyncTrainingClient,
    Datum,
    ModelInput,
    RegularizerSpec,
    TinkexConfig,
)

Work = Callable[[], Awaitable[object]]
ADAPTER = "adapter_model.safetensors"
RANK, SEED = 8, 11


def datums(count: int, length: int, vocabulary: int, seed: int) -> list[Datum]:
    """Returns random tokens, with shifted targets."""
    rows = np.random.default_rng(seed).integers(0, vocabulary, (count, length + 1))
    return [
        Datum(
            model_input=ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={"target_tokens": row[1:], "weights": np.ones(length, np.float32)},
        )
        for row in rows
    ]


@asynccontextmanager
async def accumulated(
    base_url: str, together: bool, batches: int, shape: Sequence[int], term_seconds: float
) -> AsyncGenerator[Work]:
    """Runs custom steps on micro-batches and an optimizer step; returns the seconds and a digest of the weights.

    Args:
        base_url: the service.
        together: all micro-batches with one `asyncio.gather`, or one after another.
        batches: how many of them.
        shape: datums of each, and their tokens.
        term_seconds: how long a term of each step waits.
    """

    async def judge(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(term_seconds)
        return logprobs.square().mean()

    specs = [RegularizerSpec(fn=judge, weight=0.5, name="judge")]
    data = [datums(shape[0], shape[1], 256, seed) for seed in range(batches)]
    config = TinkexConfig(base_url=base_url)

    async def steps(training: AsyncTrainingClient) -> None:
        calls = (training.forward_backward_custom(batch, base_loss, regularizers=specs) for batch in data)
        if together:
            await asyncio.gather(*calls)
        else:
            for call in calls:
                await call

    async with AsyncServiceClient(config) as service:
        rest = service.create_rest_client()
        await service.create_lora_training_client("tiny", rank=RANK, seed=SEED)

        async def work() -> dict[str, Any]:
            async with await service.create_lora_training_client("tiny", rank=RANK, seed=SEED) as training:
                started = time.perf_counter()
                await steps(training)
                seconds = time.perf_counter() - started
                await training.optim_step(AdamParams(learning_rate=1e-2))
                saved = await training.save_state("trained")
            with tempfile.TemporaryDirectory(prefix="tinkex-bench-") as folder:
                downloaded = await rest.download_checkpoint(saved.path, Path(folder) / "checkpoint")
                digest = hashlib.sha256((downloaded / ADAPTER).read_bytes()).hexdigest()
            return {"seconds": seconds, "weights": digest}

        yield work


@asynccontextmanager
async def over_http(base_url: str, call: str, shape: Sequence[int], vocabulary: int) -> AsyncGenerator[Work]:
    """One call on the embedded service: "forward_backward", "custom", or "two_passes", a forward pass before it.

    Tells the loss.
    """
    async with AsyncServiceClient(TinkexConfig(base_url=base_url)) as service:
        models = await service.get_server_capabilities()
        name = models.supported_models[0].model_name
        assert name is not None
        training = await service.create_lora_training_client(name, rank=RANK, seed=SEED)
        data = datums(shape[0], shape[1], vocabulary, 5)

        async def work() -> float:
            if call == "custom":
                return (await training.forward_backward_custom(data, base_loss)).loss_total
            if call == "two_passes":
                await training.forward(data)
            return (await training.forward_backward(data)).metrics["loss:sum"]

        yield work


@asynccontextmanager
async def plain(model: str, shape: Sequence[int], vocabulary: int) -> AsyncGenerator[Work]:
    """Forward and backward pass of the same datums in plain torch and peft; the work returns the loss."""
    from peft import LoraConfig, get_peft_model

    from tinkex_py.local.models import load_model

    with tempfile.TemporaryDirectory(prefix="tinkex-bench-") as folder:
        network = load_model(model, None, Path(folder)).network
    network.config.tie_word_embeddings = False  # avoids a warning of peft about merging
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers has renamed
        adapted: Any = get_peft_model(network, LoraConfig(r=RANK, lora_alpha=32, target_modules=layers)).eval()
    data = datums(shape[0], shape[1], vocabulary, 5)
    tokens = torch.tensor([datum.model_input.to_ints() for datum in data])
    targets = torch.stack([datum.loss_fn_inputs["target_tokens"].to_torch() for datum in data])

    async def work() -> float:
        adapted.zero_grad(set_to_none=True)
        logits = adapted(input_ids=tokens, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss.backward()
        return loss.item()

    yield work
