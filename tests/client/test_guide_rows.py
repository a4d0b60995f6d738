"""Rows 4, 59, 128-131, 133, 136 and 139 of the guide: what the training API promises beside the gradient."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from tests.client.data import datum, nll
from tests.client.recorder import KEY, after, http_recorder
from tests.losses.support import Gate, until
from tinkex_py import (
    AsyncServiceClient,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    ModelInput,
    RegularizerSpec,
    TinkexConfig,
    per_datum,
)

pytestmark = pytest.mark.asyncio
DATA = [datum(4, 1), datum(2, 2)]


async def test_row_4_the_services_own_output_of_a_step_per_datum(bench):
    training = await bench.train()
    seen: list[list[tuple[int, ...]]] = []

    @per_datum
    def base(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
        seen.append([tuple(part.shape) for part in logprobs])
        return -torch.stack([part.sum() for part in logprobs]).sum()

    output = await training.forward_backward_custom(DATA, base)
    assert seen == [[(4,), (2,)]]
    assert isinstance(output.service_output, ForwardBackwardOutput)
    rows = output.service_output.loss_fn_outputs
    assert [row["logprobs"].shape for row in rows] == [(4,), (2,)]
    total = -sum(float(row["logprobs"].to_numpy().sum()) for row in rows)
    assert output.base_loss.value == pytest.approx(total, rel=1e-5)


async def test_row_59_training_clients_of_one_service_share_its_threads(local_bench):
    bench = local_bench(max_threads=1)
    gate = Gate()
    bases = 0

    async def base(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        nonlocal bases
        bases += 1
        return -logprobs.sum()

    async with bench.service:
        clients = [await bench.train(), await bench.train()]
        with gate.opening():
            specs = [RegularizerSpec(fn=gate, weight=0.1, name="sync")]
            steps = [
                asyncio.create_task(client.forward_backward_custom(DATA, base, regularizers=specs))
                for client in clients
            ]
            await until(lambda: gate.running == 1 and bases == 2)  # both steps run their terms
        await asyncio.gather(*steps)
        assert (gate.peak, gate.calls, len(gate.threads)) == (1, 2, 1)


async def test_rows_128_and_129_a_client_from_the_environment(monkeypatch):
    async with http_recorder() as (recorder, url):
        monkeypatch.setenv("TINKER_BASE_URL", url)
        monkeypatch.setenv("TINKER_API_KEY", KEY)
        assert recorder.arrivals == []
        async with AsyncServiceClient.from_env(close_timeout=3.0) as service:
            assert service.config.close_timeout == 3.0
            assert (await service.get_server_capabilities()).supported_models[0].model_name == "tiny"
        constructed = AsyncServiceClient(TinkexConfig())
        assert (await constructed.get_server_capabilities()).supported_models
        await constructed.aclose()
        assert {arrival.headers.get("x-api-key") for arrival in recorder.arrivals} == {KEY}


async def test_row_130_single_settings_and_lora_config_say_the_same(bench):
    single = {"rank": 16, "seed": 3, "train_mlp": False, "train_attn": True, "train_unembed": False}
    await bench.service.create_lora_training_client("tiny", **single)
    await bench.service.create_lora_training_client("tiny", lora_config=LoraConfig(**single))
    await bench.service.create_lora_training_client("tiny")
    sent = [arrival.json["lora_config"] for arrival in bench.recorder.of("create_model")]
    assert sent[0] == sent[1] == single
    assert sent[2] == {"rank": 32, "train_mlp": True, "train_attn": True, "train_unembed": True}


async def test_row_131_text_becomes_tokens_with_the_clients_tokenizer_or_any_other(bench):
    training = await bench.train()
    tokenizer = await training.get_tokenizer()
    made = ModelInput.from_text("The quick brown fox", tokenizer)
    assert made.to_ints() == list(tokenizer.encode("The quick brown fox"))
    assert tokenizer.decode(made.to_ints()) == "The quick brown fox"

    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    assert ModelInput.from_text("fox", Letters()).to_ints() == [102, 111, 120]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
async def test_row_133_the_guides_five_targets(bench, kind):
    """Five targets need a five-token input; as lists, numpy arrays or tensors."""
    example = Datum(
        model_input=ModelInput.from_ints([0, 1, 2, 3, 4]),
        loss_fn_inputs={"target_tokens": kind([1, 2, 3, 4, 5]), "weights": kind([1.0, 1.0, 1.0, 1.0, 1.0])},
    )
    training = await bench.train()
    output = await training.forward_backward_custom([example], lambda data, logprobs: (-logprobs.mean(), {}))
    assert output.service_output.packed["logprobs"].shape(0) == (5,)
    sent = bench.recorder.of("B")[0].message.data[0].loss_fn_inputs["weights"].dense
    assert np.frombuffer(sent, "<f4").tolist() == pytest.approx([0.2] * 5)  # minus the gradient of -mean


async def test_row_136_the_timeout_bounds_a_term_not_the_wait_for_the_service(bench):
    training = await bench.train()
    answers = asyncio.Event()
    bench.recorder.faults["F"] = [after(answers)]
    step = asyncio.create_task(training.forward_backward_custom(DATA, nll, timeout=0.2))
    await bench.recorder.until(lambda: len(bench.recorder.of("F")) == 1)
    asyncio.get_running_loop().call_later(0.3, answers.set)  # longer than any term may take
    assert (await step).service_output.num_datums == 2


async def test_rows_137_and_139_the_terms_see_the_services_own_logprobs_after_one_forward(bench):
    training = await bench.train()
    seen: list[torch.Tensor] = []

    def base(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        seen.append(logprobs.detach().clone())
        return -logprobs.sum()

    await training.forward_backward_custom(DATA, base)
    assert bench.kinds(training) == ["F", "B"]
    asked = await training.forward(DATA)
    np.testing.assert_allclose(seen[0].numpy(), asked.packed["logprobs"].values, rtol=1e-6)
    assert seen[0].shape == (6,)
