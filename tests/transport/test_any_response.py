"""Any response of a service is parsed, or raises one typed error."""

import asyncio
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tinkex_py.errors import InvalidResponse, TinkexError, status_error_class
from tinkex_py.limits import RetryPolicy
from tinkex_py.transport.api import ServiceApi
from tinkex_py.transport.auth import Auth, rejects_token
from tinkex_py.transport.decoding import Result, read_forward_backward, read_sample, request_id_of, text_of
from tinkex_py.transport.failures import retry_after, status_error
from tinkex_py.transport.messages import NO_SECRET, Request, Response, Secret
from tinkex_py.transport.negotiation import choose_encoding, refuses_protobuf
from tinkex_py.transport.server_config import ServerConfig
from tinkex_py.types import (
    ForwardBackwardOutput,
    GetInfoResponse,
    OptimStepResponse,
    SampleResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    ServerCapabilities,
    WeightsInfo,
)

NAMES = [
    *("loss_fn_outputs", "loss_fn_output_type", "metrics", "logprobs", "data", "dtype", "shape", "sparse_crow_indices"),
    *("sparse_col_indices", "sequences", "tokens", "stop_reason", "prompt_logprobs", "topk_prompt_logprobs"),
    *("target_prompt_logprobs", "prompt_alt_tokens", "topk_logprobs", "sequence_id", "prompt_cache_hit_tokens"),
    *("packed", "num_datums", "path", "sampling_session_id", "model_id", "model_data", "supported_models"),
    *("base_model", "lora_rank", "request_id", "error", "category", "status", "result", "type", "queue_state"),
    *("detail", "loc", "msg", "code", "queue_state_reason"),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**62, -(2**63), 10**30, 10**400, 1e308, float("nan"), float("inf"), 0.5]),
    st.sampled_from(["int64", "float32", "stop", "length", "pending", "completed", "try_again", "user", "\ud800", ""]),
    st.text(max_size=3),
)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=2), inner, max_size=4)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES), ANY_JSON, max_size=5)

TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "data": st.one_of(st.lists(st.one_of(st.integers(-3, 3), st.floats()), max_size=4), ANY_JSON),
        "dtype": st.one_of(st.sampled_from(["int64", "float32"]), SCALARS),
        "shape": st.one_of(st.lists(st.integers(-1, 5), max_size=3), st.just([1, 2**60]), SCALARS),
        "sparse_crow_indices": st.one_of(st.lists(st.integers(-1, 3), max_size=3), SCALARS),
        "sparse_col_indices": st.one_of(st.lists(st.integers(-1, 3), max_size=3), SCALARS),
        "later": SCALARS,
    },
)
PASSES = st.fixed_dictionaries(
    {"loss_fn_outputs": st.lists(st.dictionaries(st.sampled_from(["logprobs", "x"]), TENSORS, max_size=2), max_size=3)},
    optional={"metrics": st.dictionaries(st.text(max_size=3), SCALARS, max_size=2), "loss_fn_output_type": SCALARS},
)
DRAWS = st.fixed_dictionaries(
    {
        "sequences": st.lists(
            st.fixed_dictionaries({}, optional={"tokens": ANY_JSON, "stop_reason": SCALARS}), max_size=2
        )
    },
    optional={"target_prompt_logprobs": TENSORS, "prompt_alt_tokens": st.dictionaries(st.just("tokens"), TENSORS)},
)


def used(value: Any) -> None:
    """Computes everything that is computed at the first use."""
    if isinstance(value, ForwardBackwardOutput):
        for row in value.loss_fn_outputs:
            for tensor in row.values():
                tensor.to_numpy()
    if isinstance(value, SampleResponse) and value.target_prompt_logprobs is not None:
        value.target_prompt_logprobs.to_numpy()


@settings(max_examples=100)
@given(st.one_of(OBJECTS, PASSES, DRAWS), st.sampled_from(NAMES))
def test_any_json_result(fields, name):
    for read in (read_forward_backward, read_sample):
        with contextlib.suppress(InvalidResponse):
            used(read(Result(b"", fields)))
    for model in (
        GetInfoResponse,
        OptimStepResponse,
        SaveWeightsForSamplerResponse,
        SaveWeightsResponse,
        ServerCapabilities,
        WeightsInfo,
    ):
        with contextlib.suppress(InvalidResponse):
            model.read(fields)
    ServerConfig.read(fields)
    with contextlib.suppress(InvalidResponse):
        assert text_of(fields, name, "path").isprintable()
    with contextlib.suppress(InvalidResponse):
        assert request_id_of(Response(200, {}, json.dumps(fields).encode())).isprintable()


BODIES = st.one_of(
    st.binary(max_size=40),
    ANY_JSON.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xff\xfe\x00", b'"\\ud800"', b"<html>"]),
)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "content-type": st.sampled_from(["application/json", "application/x-protobuf", "text/html", "", ";;", "\x00"]),
        "retry-after": st.text(max_size=4),
        "retry-after-ms": st.text(max_size=4),
        "x-should-retry": st.text(max_size=4),
        "x-request-id": st.text(max_size=4),
        "www-authenticate": st.text(max_size=4),
        "location": st.sampled_from(["http://[", "//", "http://h:99999/", "\ud800"]),
    },
)
STATUSES = st.one_of(
    st.sampled_from([200, 201, 202, 204, 400, 401, 402, 404, 408, 410, 422, 429, 500]), st.integers(100, 999)
)


@settings(max_examples=100)
@given(STATUSES, HEADERS, BODIES)
def test_any_answer(status, headers, body):
    response = Response(status, headers, body)
    seconds = retry_after(headers)
    assert seconds is None or 0 <= seconds <= 60
    rejects_token(response)
    with contextlib.suppress(TinkexError):
        if not response.is_success:
            raise status_error(response)
        response.json()


class Ended(Exception):
    """The service has no further response."""


@pytest.mark.asyncio
async def test_any_answer_to_a_poll(monkeypatch):
    """Pending responses and failures are polled again, which raises Ended; others are a result or a typed error."""
    policy = RetryPolicy(deadline=5.0, max_attempts=1, initial_wait=0.0, max_wait=0.0)
    monkeypatch.setattr("tinkex_py.transport.api._FIRST_PAUSE", 0.0)

    async def poll(response: Response, decode: Any) -> None:
        left = [response, response]

        class Http:
            host = "scripted"

            async def exchange(self, sent: Request, *, key: Secret = NO_SECRET, attempt: int = 1) -> Response:
                if not left:
                    raise Ended
                return left.pop()

        http: Any = Http()
        api = ServiceApi(http, http, Auth(Secret("key"), Secret("")), retry=policy, poll_timeout=1.0)
        with contextlib.suppress(TinkexError, Ended):
            used(await api.result("r", "Any", decode))

    cases: list[tuple[int, dict[str, str], bytes]] = []

    @settings(max_examples=100)
    @given(STATUSES, HEADERS, st.one_of(BODIES, OBJECTS.map(lambda value: json.dumps(value).encode())))
    def collect(status, headers, body):
        cases.append((status, {**headers, "retry-after-ms": "1"}, body))

    collect()
    cases += [(200, {}, json.dumps({name: [1]}).encode()) for name in ("status", "type", "category", "error")]
    for status, headers, body in cases:
        for decode in (read_forward_backward, read_sample):
            await poll(Response(status, headers, body), decode)


@settings(max_examples=60)
@given(st.integers(400, 599), ANY_JSON)
def test_any_answer_to_a_probe(status, body):
    error = status_error_class(status)("no", status=status, body=body)
    refuses_protobuf(error)

    async def send(_encoded: object) -> object:
        raise error

    assert asyncio.run(choose_encoding("auto", ServerConfig(), send)).name in ("protobuf", "json")
