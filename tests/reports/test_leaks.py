"""Nothing of the process leaks into numbers, files or errors; r18, r19 and r24 are public reports."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.regularizers.support import datums, evaluated, random_logprobs
from tests.regularizers.test_gradients import CASES, WEIGHTS
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    ConfigError,
    Datum,
    Executor,
    GradientTracker,
    ModelInput,
    Pipeline,
    RegularizerSpec,
    SamplingParams,
    TinkexConfig,
    execute,
)
from tinkex_py.base_losses import NLL
from tinkex_py.dashboard import serve_dashboard
from tinkex_py.integrations.huggingface import download_adapter, export_adapter
from tinkex_py.local import LocalOptions, LocalService, serve
from tinkex_py.regularizers import L2
from tinkex_py.runs import train

DATA = [
    Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})
    for tokens in ([1, 2, 3, 4], [9, 8, 7])
]

# r18, and a training with every warning as an error: nothing of this can be shown in a process that has imported
# transformers before.
FRESH_PROGRAM = """
import asyncio, sys
from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, SamplingParams

data = [Datum(model_input=ModelInput.from_ints([1, 2, 3]), loss_fn_inputs={"target_tokens": [2, 3, 4]})]

async def one():
    async with AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=2)
        await training.forward_backward_custom(data, lambda data, logprobs: -logprobs.sum())
        await training.optim_step(AdamParams())
        sampler = await training.save_weights_and_get_sampling_client("one")
        prompts = [ModelInput.from_ints([1] * length) for length in (1, 3)]
        await asyncio.gather(*(sampler.sample(p, sampling_params=SamplingParams(max_tokens=3)) for p in prompts))

async def user():
    while "transformers" not in sys.modules:
        await asyncio.sleep(0)
    from transformers import AutoTokenizer, LlamaForCausalLM

assert "transformers" not in sys.modules

async def main():
    await asyncio.gather(one(), one(), user())

asyncio.run(main())
"""


def test_r18_two_services_and_an_import_of_transformers_at_once_without_a_warning():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH_PROGRAM], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(
    params=[(torch.bfloat16, None), (torch.float16, None), (torch.float64, "meta")],
    ids=["bfloat16", "float16", "float64-meta"],
)
def other_defaults(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Changes torch's defaults when it is called."""
    dtype, device = request.param

    def change() -> None:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)

    before = torch.get_default_dtype()
    yield change
    torch.set_default_dtype(before)
    torch.set_default_device(None)


async def all_numbers(folder: Path) -> list[object]:
    """Of a loss, a step, a checkpoint and samples of the embedded service."""
    async with AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=2, seed=1)
        result = await training.forward_backward_custom(
            DATA, NLL(), regularizers=[RegularizerSpec(fn=L2(), weight=0.1)]
        )
        norm = await training.optim_step(AdamParams(learning_rate=0.1))
        saved = await training.save_state("x")
        sampler = await training.save_weights_and_get_sampling_client("y")
        options = SamplingParams(max_tokens=8, seed=3, top_p=0.9)
        sample = await sampler.sample(
            ModelInput.from_ints([5, 6, 7]),
            sampling_params=options,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=2,
        )
        checkpoint = await service.create_rest_client().download_checkpoint(saved.path, folder)
    files = [file.read_bytes() for file in sorted(checkpoint.glob("*.safetensors"))]
    return [
        result.loss_total,
        norm.metrics,
        sample.sequences[0].tokens,
        sample.sequences[0].logprobs,
        files,
        sample.prompt_logprobs,
    ]


@pytest.mark.asyncio
async def test_r19_defaults_of_torch_do_not_change_the_embedded_service(
    other_defaults: Callable[[], None], tmp_path: Path
):
    expected = await all_numbers(tmp_path / "before")
    other_defaults()
    assert await all_numbers(tmp_path / "after") == expected


@pytest.mark.filterwarnings("ignore:.*no mask= is given:FutureWarning")
def test_r19_defaults_of_torch_do_not_change_ready_made_terms(other_defaults: Callable[[], None]):
    inputs: list[tuple[Any, Any, torch.Tensor]] = []
    for term, candidates in CASES:
        shape = (8,) if candidates is None else (8, candidates)
        fields = {"reference": random_logprobs(*shape, seed=1)}
        if candidates is None:
            fields |= {"logprobs": fields["reference"], "advantages": torch.linspace(-1, 2, 8)}
        data = datums((3, 1, 2, 2), candidates, weights=WEIGHTS, **fields)
        inputs.append((term, data, random_logprobs(*shape).float()))

    def results() -> list[object]:
        evaluations = [(term, evaluated(term, data, logprobs)) for term, data, logprobs in inputs]
        return [
            (
                type(term).__name__,
                loss.dtype,
                loss.item(),
                gradient.tolist(),
                [float(value) for value in metrics.values()],
            )
            for term, (loss, gradient, metrics) in evaluations
        ]

    expected = results()
    other_defaults()
    assert results() == expected


@pytest.mark.asyncio
async def test_r24_checkpoints_and_adapters_name_the_base_model(tmp_path: Path):
    async with AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=2)
        saved = await training.save_state("x")
        rest = service.create_rest_client()
        checkpoint = await rest.download_checkpoint(saved.path, tmp_path / "checkpoint")
        adapters = [
            export_adapter(checkpoint, tmp_path / "exported"),
            await download_adapter(rest, saved.path, tmp_path / "a"),
        ]
    for folder in (checkpoint, *adapters):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "tiny"


REMOTE = TinkexConfig(base_url="http://127.0.0.1:9", api_key="tml-local")
SPEC = RegularizerSpec(fn=L2(), weight=0.1)


def _client() -> AsyncServiceClient:
    return AsyncServiceClient(REMOTE)


CALLS: list[Callable[[], Coroutine[Any, Any, object]]] = [
    lambda: _client().__aenter__(),
    lambda: AsyncServiceClient.local().__aenter__(),
    lambda: _client().aclose(),
    lambda: _client().create_lora_training_client("tiny"),
    lambda: _client().create_training_client_from_state("tinker://a/weights/b"),
    lambda: _client().create_sampling_client(base_model="tiny"),
    lambda: _client().get_server_capabilities(),
    lambda: _client().get_features(),
    lambda: _client().get_tokenizer("tiny"),
    lambda: _client().create_rest_client().get_server_capabilities(),
    lambda: _client().create_rest_client().delete_checkpoint("tinker://a/weights/b"),
    lambda: anext(_client().create_rest_client().training_runs()),
    lambda: Pipeline(NLL()).compute(DATA, torch.zeros(5)),
    lambda: Pipeline(NLL()).loss(DATA, torch.zeros(5)),
    lambda: execute(NLL(), DATA, torch.zeros(5)),
    lambda: Executor.execute_one(SPEC, DATA, torch.zeros(5)),
    lambda: Executor.execute_all([SPEC], DATA, torch.zeros(5)),
    lambda: GradientTracker.grad_norm(torch.sum, torch.zeros(5)),
    lambda: GradientTracker.total_grad_norm(NLL(), [SPEC], DATA, torch.zeros(5)),
    lambda: train(_client(), _client().create_lora_training_client, [DATA], Pipeline(NLL()), folder="never"),  # pyright: ignore[reportArgumentType]
    lambda: LocalService().start(),
    lambda: LocalService().stop(),
    lambda: serve(LocalOptions(), on_listening=print),
    lambda: serve_dashboard(".", on_listening=print),
    lambda: download_adapter(_client().create_rest_client(), "tinker://a/weights/b", "never", base_model="tiny"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: inspect.getsource(call).strip()[8:60])
def test_without_asyncio_every_call_ends_in_one_error(call: Callable[[], Coroutine[Any, Any, object]]):
    """As trio does it: something else than asyncio drives the coroutine."""
    coroutine = call()
    with pytest.raises(ConfigError, match=r"tinkex_py runs on asyncio only.*asyncio\.run\("):
        coroutine.send(None)
    assert not Path("never").exists()
