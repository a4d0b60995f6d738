"""What a service says about its models rules things out before anything is sent."""

from collections.abc import Mapping
from typing import Any

import pytest
from tinker import types as official

from tests.client.conftest import Bench
from tests.client.data import datum
from tests.client.recorder import Fault, answering
from tinkex_py import AdamParams, ConfigError, InvalidData, RegularizerSpec, UnsupportedFeature
from tinkex_py.errors import RequestFailed
from tinkex_py.regularizers import L2
from tinkex_py.types import SupportedModel

DATA = [datum(3, 1)]
TRAINING_ONLY = ({"sampleable": False}, {"capabilities": ["training"]})


def telling(*models: Mapping[str, Any]) -> Fault:
    return answering(200, {"supported_models": list(models)})


def says(bench: Bench, fault: Fault) -> None:
    bench.recorder.always["get_server_capabilities"] = fault


@pytest.mark.asyncio
async def test_a_service_of_one_model_is_asked_for_no_other(http_bench):
    """SkyRL would take the name, and train the model it has."""
    host = http_bench.service.config.base_url.removeprefix("http://")
    with pytest.raises(
        UnsupportedFeature, match=f"^{host} does not support training 'typo'. Its only model is 'tiny'$"
    ):
        await http_bench.service.create_lora_training_client("typo")
    with pytest.raises(
        UnsupportedFeature, match=f"^{host} does not support sampling 'typo'. Its only model is 'tiny'$"
    ):
        await http_bench.service.create_sampling_client(base_model="typo")
    assert http_bench.recorder.of("create_model", "create_sampling_session") == []
    await http_bench.train()
    assert http_bench.recorder.of("create_model")[0].json["model_seq_id"] == 0
    assert len(http_bench.recorder.of("get_server_capabilities")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        telling({"model_name": "one"}, {"model_name": "two"}),
        telling({"model_id": "a model without a name"}),
        telling(),
        answering(404),
        answering(500),
        answering(402),
        answering(200, {"supported_models": 3}),
        answering(200, ["no object"]),
    ],
)
@pytest.mark.asyncio
async def test_without_a_clear_list_the_model_is_requested(bench, fault):
    says(bench, fault)
    with pytest.raises(RequestFailed, match="'typo'"):
        await bench.service.create_lora_training_client("typo")
    await (await bench.train()).save_weights_and_get_sampling_client()


@pytest.mark.parametrize("told", TRAINING_ONLY)
@pytest.mark.asyncio
async def test_where_nothing_can_be_sampled_nothing_is_saved_for_it(bench, told):
    """TuFT in its hf mode."""
    says(bench, telling({"model_name": "tiny", **told}))
    training = await bench.train()
    await training.forward_backward(DATA)
    path = f"tinker://{training.model_id}/sampler_weights/s"
    for wanted in (
        training.save_weights_and_get_sampling_client(),
        training.save_weights_and_get_sampling_client("name"),
        bench.service.create_sampling_client(base_model="tiny"),
        bench.service.create_sampling_client(model_path=path),
    ):
        with pytest.raises(UnsupportedFeature, match="^embedded does not support sampling"):
            await wanted
    await training.optim_step(AdamParams(learning_rate=1e-3))
    await training.save_weights_for_sampler("to-take-away")
    assert bench.kinds(training) == ["B", "optim_step", "save_weights_for_sampler"]
    assert bench.recorder.of("create_sampling_session") == []


@pytest.mark.parametrize("told", [{"trainable": False}, {"capabilities": ["sampling"]}])
@pytest.mark.asyncio
async def test_a_model_that_is_only_sampled(bench, told):
    says(bench, telling({"model_name": "tiny", **told}, {"model_name": "other"}))
    with pytest.raises(UnsupportedFeature, match="^embedded does not support training 'tiny', as its get_server_cap"):
        await bench.train()
    await bench.service.create_sampling_client(base_model="tiny")


@pytest.mark.parametrize(
    ("told", "trains", "samples"),
    [
        ({}, None, None),
        ({"trainable": True, "sampleable": False}, True, False),
        ({"capabilities": ["training"]}, True, False),
        ({"capabilities": ("training", "sampling")}, True, True),
        ({"capabilities": []}, False, False),
        ({"capabilities": ["training"], "sampleable": True}, True, True),
        ({"capabilities": {"training": True}}, None, None),
        ({"capabilities": [1]}, None, None),
        ({"capabilities": None}, None, None),
    ],
)
def test_what_a_model_can(told, trains, samples):
    model = SupportedModel.read({"model_name": "m", **told})
    assert (model.can("train"), model.can("sample")) == (trains, samples)


@pytest.mark.asyncio
async def test_the_only_model_needs_no_name(bench):
    training = await bench.service.create_lora_training_client(rank=4)
    await bench.service.create_sampling_client()
    assert bench.recorder.of("create_model")[0].json["base_model"] == "tiny"
    assert bench.recorder.of("create_sampling_session")[0].json["base_model"] == "tiny"
    ours, theirs = await bench.service.get_tokenizer(), await training.get_tokenizer()
    assert ours.encode("hé") == theirs.encode("hé")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (telling({"model_name": "one"}, {"model_name": "two"}), "embedded has 'one', 'two': pass the name of one"),
        (telling({"model_name": "one", "trainable": False, "sampleable": False}), "lists no models for "),
        (telling({"model_name": "one"}, {"model_id": "without a name"}), "embedded has 'one'"),
        (answering(404), "lists no models for "),
    ],
)
@pytest.mark.asyncio
async def test_without_exactly_one_model_a_name_is_needed(bench, fault, reason):
    says(bench, fault)
    for create in (bench.service.create_lora_training_client, bench.service.create_sampling_client):
        with pytest.raises(ConfigError, match=reason):
            await create()
    assert bench.recorder.of("create_model", "create_sampling_session") == []


@pytest.mark.asyncio
async def test_datums_of_the_official_sdk_are_sent_as_our_own(bench):
    data = [datum(3, 1, weights=[0.5, 1.0, 2.0])]
    given = [
        official.Datum(
            model_input=official.ModelInput.from_ints(own.model_input.to_ints()),
            loss_fn_inputs={name: tensor.to_torch() for name, tensor in own.loss_fn_inputs.items()},
        )
        for own in data
    ]
    training = await bench.train()
    for step in (training.forward_backward, training.forward):
        assert (await step(given)).loss_fn_outputs == (await step(data)).loss_fn_outputs
    l2 = [RegularizerSpec(fn=L2(mask=None), weight=0.1, name="l2")]
    ours, theirs = [
        await training.forward_backward_custom(batch, "cross_entropy", regularizers=l2) for batch in (data, given)
    ]
    assert (ours.loss_total, ours.regularizers) == (theirs.loss_total, theirs.regularizers)
    with pytest.raises(InvalidData, match=r"data\[1\] must be a Datum, got a dict"):
        await training.forward_backward([*given, {}])
