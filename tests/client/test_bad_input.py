"""Bad input gets a typed error that names the value; nothing is sent."""

import asyncio
import socket
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tests.client.data import datum, nll
from tests.client.recorder import http_recorder, quick_config
from tinkex_py import (
    APIStatusError,
    AsyncServiceClient,
    Authentication,
    ConfigError,
    ConnectionFailed,
    Datum,
    DuplicateRegularizerNames,
    InvalidBaseLoss,
    InvalidData,
    InvalidSpec,
    LoraConfig,
    MissingExtra,
    ModelInput,
    Pipeline,
    PipelineError,
    RegularizerSpec,
    RequestFailed,
    RetryPolicy,
    SamplingParams,
    TinkexError,
    UnsupportedFeature,
)
from tinkex_py.local import LocalOptions
from tinkex_py.types import ServerCapabilities

pytestmark = pytest.mark.asyncio
DATA = [datum(3, 1)]


def made(tokens: Any = (1, 2, 3), **inputs: Any) -> Datum:
    return Datum(model_input=ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


def spec(name: str = "l1", **fields: Any) -> RegularizerSpec:
    return RegularizerSpec(**{"fn": nll, "weight": 1.0, "name": name, **fields})


BAD_DATA = [
    ([], "empty", InvalidData),
    (DATA[0], "list of Datum, got a Datum", InvalidData),
    (None, "NoneType", InvalidData),
    ("text", "str", InvalidData),
    ([DATA[0], {"target_tokens": [1]}], r"data\[1\].*dict", InvalidData),
    ([made(weights=[1.0, 1.0, 1.0])], "datum 0 has no 'target_tokens'.*weights", InvalidData),
    ([DATA[0], made(target_tokens=[1, 2])], r"datum 1 have shape \(2,\).*3 tokens", InvalidData),
    ([made(target_tokens=[1, 2, 3], weights=[1.0, 1.0])], r"weights of datum 0.*\(2,\).*\(3,\)", InvalidData),
    ([made(target_tokens=np.array([1.0, 2.0, 3.0]))], "target_tokens of datum 0.*integers.*float32", InvalidData),
    ([made(target_tokens=np.ones((3, 2, 2), np.int64))], r"\[T\] or \[T, K\].*\(3, 2, 2\)", InvalidData),
    ([made(target_tokens=np.int64(3))], r"\[T\] or \[T, K\]|shape \(\)", InvalidData),
    ([Datum(model_input=ModelInput.empty(), loss_fn_inputs={"target_tokens": []})], "datum 0 is empty", InvalidData),
]


async def test_bad_data_of_a_custom_step(bench):
    training = await bench.train()
    for data, message, error_class in BAD_DATA:
        with pytest.raises(error_class, match=message) as caught:
            await training.forward_backward_custom(data, nll)
        assert isinstance(caught.value, ValueError)
    assert bench.kinds(training) == []


BAD_LOSSES = [
    ({"base_loss": 3}, InvalidBaseLoss, "3"),
    ({"base_loss": None}, InvalidBaseLoss, "None"),
    ({"base_loss": lambda: 0}, InvalidBaseLoss, "fn"),
    ({"regularizers": [spec("a"), spec("b"), spec("a")]}, DuplicateRegularizerNames, "'a'"),
    ({"regularizers": [nll]}, InvalidSpec, r"regularizers\[0\].*function"),
    ({"timeout": 0}, PipelineError, "timeout.*0"),
    ({"timeout": -1.5}, PipelineError, "timeout.*-1.5"),
    ({"timeout": 10**400}, PipelineError, "timeout"),
    ({"max_concurrency": 0}, PipelineError, "max_concurrency.*0"),
    ({"max_threads": 0}, PipelineError, "max_threads.*0"),
    ({"base_loss": Pipeline(nll), "regularizers": [spec()]}, PipelineError, "regularizers"),
    ({"base_loss": Pipeline(nll), "timeout": 3.0}, PipelineError, "timeout"),
    ({"base_loss": Pipeline(nll), "track_grad_norms": True, "parallel": False}, PipelineError, "track_grad_norms"),
    (
        {"base_loss": Pipeline(nll), "max_concurrency": 3, "max_threads": 2},
        PipelineError,
        "max_concurrency.*max_threads",
    ),
]


async def test_bad_losses(bench):
    training = await bench.train()
    for options, error_class, message in BAD_LOSSES:
        with pytest.raises(error_class, match=message):
            await training.forward_backward_custom(DATA, **{"base_loss": nll, **options})
    assert bench.kinds(training) == []


UNSENDABLE = [
    {"loss_fn": 3},
    {"loss_fn": None},
    {"loss_fn_config": {"beta": [1.0]}},
    {"loss_fn_config": {3: 1.0}},
    {"loss_fn_config": "beta"},
    {"loss_fn_config": {"beta": 10**400}},
    {"loss_fn": "\ud800"},
]


async def test_what_cannot_be_encoded_is_a_typed_error_and_takes_no_number(bench):
    """A number that is assigned but not sent would make every later call hang."""
    training = await bench.train()
    for options in UNSENDABLE:
        for method in (training.forward, training.forward_backward):
            with pytest.raises(InvalidData):
                await method(DATA, **options)
    for options in ({"ttl_seconds": object()}, {"ttl_seconds": float("nan")}, {"overwrite": object()}):
        with pytest.raises(TinkexError):
            await training.save_state("s1", **options)
    async with asyncio.timeout(10):
        await training.forward_backward(DATA)
    assert bench.kinds(training) == ["B"]


async def test_fields_that_stay_here_may_hold_what_json_cannot(local_bench):
    """A custom step sends only targets and weights; a reference of -inf is for the terms."""
    bench = local_bench(wire="json")
    reference = np.array([-1.0, -np.inf, -2.0], np.float32)
    async with bench.service:
        training = await bench.train()
        await training.forward_backward_custom([made(target_tokens=[1, 2, 3], reference_logprobs=reference)], nll)
        assert bench.kinds(training) == ["F", "B"]


async def test_a_ready_pipeline_keeps_its_options(bench):
    training = await bench.train()
    output = await training.forward_backward_custom(DATA, Pipeline(nll, [spec()], track_grad_norms=True))
    assert output.total_grad_norm == pytest.approx(2 * 3**0.5)


async def test_a_bad_deadline_is_named_and_sends_nothing(bench):
    training = await bench.train()
    for deadline in (0, -1.0, float("nan"), "soon", 10**400):
        with pytest.raises(InvalidData, match="deadline"):
            await training.forward_backward_custom(DATA, nll, deadline=deadline)
    assert bench.kinds(training) == []


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "1", True])
async def test_bad_weights(weight):
    with pytest.raises(InvalidSpec, match="weight must be a finite number >= 0") as caught:
        spec("kl", weight=weight)
    assert isinstance(caught.value, ValueError)
    assert repr(weight) in str(caught.value)
    assert "'kl'" in str(caught.value)


async def test_packed_terms_over_mixed_shapes_say_what_to_do(bench):
    training = await bench.train()
    with pytest.raises(PipelineError, match=r"per_datum"):
        await training.forward_backward_custom([datum(3, 1), datum(3, 2, candidates=2)], nll)
    with pytest.raises(PipelineError, match=r"per_datum"):
        await training.forward_backward_custom(DATA, lambda data, logprobs: sum(part.sum() for part in logprobs))


async def test_an_unknown_model_is_named(bench):
    for wanted in (
        bench.service.create_lora_training_client("huge"),
        bench.service.create_sampling_client(base_model="huge"),
    ):
        with pytest.raises(UnsupportedFeature, match="'huge'. Its only model is 'tiny'"):
            await wanted
    # A service of several models judges the name itself.
    bench.service._session.models._known = ServerCapabilities()
    with pytest.raises(RequestFailed, match="'huge'") as caught:
        await bench.service.create_lora_training_client("huge")
    assert "tiny" in str(caught.value)

    async def sample() -> None:
        sampler = await bench.service.create_sampling_client(base_model="huge")
        await sampler.sample(ModelInput.from_ints([1]))

    with pytest.raises((RequestFailed, APIStatusError), match="huge"):
        await sample()


async def test_lora_settings_are_given_once(bench):
    with pytest.raises(ConfigError, match=r"lora_config or rank, train_mlp, not both"):
        await bench.service.create_lora_training_client("tiny", rank=4, train_mlp=False, lora_config=LoraConfig(rank=4))
    for fields in ({"rank": 0}, {"train_mlp": False, "train_attn": False, "train_unembed": False}):
        with pytest.raises(InvalidData):
            await bench.service.create_lora_training_client("tiny", **fields)
    assert bench.recorder.of("create_model") == []
    training = await bench.service.create_lora_training_client("tiny", lora_config=LoraConfig(rank=3))
    assert (await training.get_info()).lora_rank == 3


async def test_arguments_of_a_wrong_type_are_named(bench):
    for model in ("", 5):
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
    for settings in ({"tags": 5}, {"tags": "ab"}, {"user_metadata": 5}, {"base_url": "http://user:secret@host"}):
        with pytest.raises(ConfigError) as caught:
            quick_config(**settings)
        assert "secret" not in str(caught.value)


async def test_bad_checkpoint_names(bench):
    training = await bench.train()
    for name in ("", "a/b", "../up", ".hidden", "x" * 129, "spa ce", "line\n", 7, None):
        for request in (training.save_state, training.save_weights_for_sampler):
            with pytest.raises(InvalidData) as caught:
                await request(name)
            assert repr(name) in str(caught.value)
    assert bench.kinds(training) == []


async def test_a_checkpoint_that_is_not_there(bench):
    for path in ("tinker://nowhere/weights/x", "not a path"):
        with pytest.raises((RequestFailed, APIStatusError)):
            await bench.service.create_training_client_from_state(path)

    async def sample() -> None:
        sampler = await bench.service.create_sampling_client(model_path="tinker://nowhere/sampler_weights/x")
        await sampler.sample(ModelInput.from_ints([1]))

    with pytest.raises((RequestFailed, APIStatusError)):
        await sample()


async def test_loading_into_a_used_model_names_the_way_out(bench):
    training = await bench.train()
    saved = await training.save_state("s1")
    with pytest.raises(UnsupportedFeature, match="create_training_client_from_state"):
        await training.load_state(saved.path)
    fresh = await bench.train()
    await fresh.load_state(saved.path)
    assert bench.kinds(training) == ["save_weights"]


async def test_sampling_input(bench):
    sampler = await bench.service.create_sampling_client(base_model="tiny")
    for prompt in (ModelInput.empty(), "text", [1, 2], None):
        with pytest.raises(InvalidData, match="prompt"):
            await sampler.sample(prompt)
    for count in (0, "3", 2.5):
        with pytest.raises(InvalidData, match=rf"num_samples.*{count}"):
            await sampler.sample(ModelInput.from_ints([1]), num_samples=count)
    with pytest.raises(InvalidData, match="sampling_params"):
        await sampler.sample(ModelInput.from_ints([1]), sampling_params={"max_tokens": 1})
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_tokens": 0}, {"top_k": -2}):
        with pytest.raises(InvalidData, match=next(iter(bad))):
            SamplingParams(**bad)
    with pytest.raises(ConfigError, match="base_model or model_path, not both"):
        await bench.service.create_sampling_client(base_model="tiny", model_path="x")
    assert bench.recorder.of("asample") == []


async def test_an_unreachable_server_is_an_error_within_the_policy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        port = taken.getsockname()[1]
        config = quick_config(f"http://127.0.0.1:{port}", retry=RetryPolicy(deadline=5, max_attempts=2, max_wait=0.01))
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionFailed, match=str(port)) as caught:
                await AsyncServiceClient(config).__aenter__()
    assert isinstance(caught.value, ConnectionError)


async def test_a_wrong_key_is_an_error_that_does_not_show_it():
    async with http_recorder(LocalOptions(api_key="tml-right")) as (_, url):
        config = quick_config(url, api_key="tml-wrong")
        with pytest.raises(Authentication, match="TINKER_API_KEY") as caught:
            await AsyncServiceClient(config).__aenter__()
        assert caught.value.status == 401
        assert "tml-wrong" not in str(caught.value)
        async with AsyncServiceClient(quick_config(url, api_key="tml-right")) as service:
            assert (await service.get_server_capabilities()).supported_models


@pytest.mark.parametrize(("package", "importer"), [("fastapi", "tinkex_py.local.app"), ("peft", "peft")])
async def test_a_missing_extra_says_what_to_install(monkeypatch, package, importer):
    monkeypatch.delitem(sys.modules, importer, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # not found by any import
    with pytest.raises(MissingExtra, match=rf"^{package} is not installed. Run: pip install 'tinkex-py\[local\]'$"):
        await AsyncServiceClient.local(model="tiny").__aenter__()


async def test_messages_hold_no_prompt_text(bench):
    """Token ids and texts of a user never show in a message or a repr."""
    tokens = [111, 112, 113]
    secret = made(tokens, target_tokens=[111, 112])
    training = await bench.train()
    with pytest.raises(InvalidData) as caught:
        await training.forward_backward_custom([secret], nll)
    for text in (str(caught.value), repr(caught.value), repr(secret), str(secret)):
        assert not any(str(token) in text for token in tokens)
    broken = RegularizerSpec(fn=lambda data, logprobs: torch.zeros(()) / len(data) + data[0], weight=1.0, name="x")
    with pytest.raises(PipelineError) as failed:
        await training.forward_backward_custom([made(tokens, target_tokens=tokens)], nll, regularizers=[broken])
    assert not any(str(token) in str(failed.value) for token in tokens)
