"""Nothing of the process leaks into the embedded service; its files name nothing of this machine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput
from tinkex_py.integrations.huggingface import export_adapter

DATA = [Datum(model_input=ModelInput.from_ints([1, 2, 3]), loss_fn_inputs={"target_tokens": [2, 3, 4]})]
TWO_AT_ONCE = """
import asyncio
from tinkex_py import AsyncServiceClient

async def one():
    async with AsyncServiceClient.local(model="tiny") as service:
        await service.create_lora_training_client("tiny", rank=2)

async def user():
    await asyncio.sleep(0.2)
    from transformers import AutoTokenizer

async def main():
    await asyncio.gather(one(), one(), user())

asyncio.run(main())
"""


def test_r18_services_that_start_at_once_import_their_libraries_safely():
    subprocess.run([sys.executable, "-c", TWO_AT_ONCE], check=True, timeout=100)


@pytest.fixture(params=[torch.bfloat16, torch.float64, torch.float16])
def other_default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


async def trained() -> list[float]:
    async with AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=2, seed=1)
        before = await training.forward_backward(DATA, "cross_entropy")
        await training.optim_step(AdamParams(learning_rate=1e-2))
        after = await training.forward(DATA)
        sampler = await training.save_weights_and_get_sampling_client()
        logprobs = await sampler.compute_logprobs(ModelInput.from_ints([1, 2, 3]))
        return [before.metrics["loss:sum"], after.metrics["loss:sum"], *(number or 0.0 for number in logprobs)]


@pytest.mark.asyncio
async def test_r19_the_default_dtype_of_the_program_changes_no_number(other_default: torch.dtype):
    numbers = await trained()
    assert torch.get_default_dtype() == other_default
    torch.set_default_dtype(torch.float32)
    assert numbers == await trained()


@pytest.mark.asyncio
async def test_r24_adapters_name_the_base_model_and_no_folder(tmp_path: Path):
    async with AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=2)
        saved = await training.save_state("x")
        folder = await service.create_rest_client().download_checkpoint(saved.path, tmp_path / "raw")
    exported = Path(export_adapter(folder, tmp_path / "adapter"))
    for place in (Path(folder), exported):
        assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
