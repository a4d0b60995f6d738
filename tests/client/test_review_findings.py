"""Bad input of every kind holds back what was started with it; clients close on their own loop only."""

import asyncio
import logging

import pytest

from tests.client.data import datum, nll
from tinkex_py import (
    AsyncServiceClient,
    ClientClosed,
    ConfigError,
    InvalidData,
    InvalidSpec,
    ModelInput,
    PrecedingRequestFailed,
    RegularizerSpec,
    TinkexConfig,
    UnsupportedFeature,
)

DATA = [datum(4)]


class BrokenLength(list):
    def __len__(self) -> int:
        raise RuntimeError("no length")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"regularizers": None}, InvalidSpec),
        ({"regularizers": RegularizerSpec(fn=nll, weight=1.0, name="a")}, InvalidSpec),
        ({"data": BrokenLength(DATA)}, RuntimeError),
    ],
)
async def test_any_bad_input_holds_back_the_optimizer_step(bench, arguments, error):
    training = await bench.train()
    data = arguments.pop("data", DATA)
    results = await asyncio.gather(
        training.forward_backward_custom(data, nll, **arguments), training.optim_step(), return_exceptions=True
    )
    assert isinstance(results[0], error)
    assert isinstance(results[1], PrecedingRequestFailed)
    assert bench.kinds(training) == []


@pytest.mark.asyncio
async def test_a_load_that_is_refused_holds_back_the_optimizer_step(bench):
    training = await bench.train()
    await training.forward(DATA)
    results = await asyncio.gather(
        training.load_state("tinker://x/weights/y"), training.optim_step(), return_exceptions=True
    )
    assert isinstance(results[0], UnsupportedFeature)
    assert isinstance(results[1], PrecedingRequestFailed)


def test_closing_on_another_loop_is_refused_and_the_own_loop_can_still_close(recwarn):
    service = AsyncServiceClient.local(model="tiny")

    async def train() -> object:
        return await service.create_lora_training_client("tiny", rank=2)

    async def close_elsewhere(training) -> None:
        for client in (service, training):
            with pytest.raises(ClientClosed, match="event loop"):
                await client.aclose()

    with asyncio.Runner() as own:
        training = own.run(train())
        with asyncio.Runner() as other:
            other.run(close_elsewhere(training))
        own.run(service.aclose())


@pytest.mark.asyncio
async def test_a_normal_close_logs_no_error(caplog):
    with caplog.at_level(logging.WARNING):
        async with AsyncServiceClient.local(model="tiny") as service:
            await service.create_lora_training_client("tiny", rank=2)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.asyncio
async def test_arguments_of_a_wrong_type_are_named(bench):
    for model in (None, "", 5):
        with pytest.raises(InvalidData, match="base_model"):
            await bench.service.create_lora_training_client(model)
    with pytest.raises(ConfigError, match="lora_config"):
        await bench.service.create_lora_training_client("tiny", lora_config={"rank": 4})
    with pytest.raises(InvalidData, match="path"):
        await bench.service.create_training_client_from_state(None)
    for labels in (5, "ab", ["a"]):
        with pytest.raises(InvalidData, match="user_metadata"):
            await bench.service.create_lora_training_client("tiny", user_metadata=labels)
        with pytest.raises(InvalidData, match="user_metadata"):
            await bench.service.create_training_client_from_state("tinker://a/weights/b", user_metadata=labels)
    training = await bench.train()
    sampler = await training.save_weights_and_get_sampling_client()
    with pytest.raises(InvalidData, match="sampling_params"):
        await sampler.sample(ModelInput.from_ints([1]), sampling_params={"max_tokens": 1})


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "nonsense"},
        {"base_url": "http://user:secret@host"},
        {"tags": 5},
        {"tags": "ab"},
        {"user_metadata": 5},
    ],
)
def test_settings_are_refused_at_once(settings):
    with pytest.raises(ConfigError) as caught:
        TinkexConfig(**{"base_url": "http://host", "api_key": "tml-x", **settings})
    assert "secret" not in str(caught.value)
    assert hash(TinkexConfig(base_url="http://host", api_key="tml-x"))
