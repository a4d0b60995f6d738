"""Encoded samples are parsed as by the official SDK, and other bytes raise an error."""

import contextlib
import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tinkex_py.errors import InvalidResponse
from tinkex_py.transport import wire
from tinkex_py.transport.decoding import decode_sample

response_conv = importlib.import_module("tinker.proto.response_conv")
finite = st.floats(-1e6, 1e6, width=32)


def topk(draw: Any, length: int) -> wire.TopkLogprobs:
    """A table whose rows may end in unused cells."""
    k = draw(st.integers(0, 3))
    ids = np.zeros((length, k), "<i4")
    logprobs = np.full((length, k), -99999.0, "<f4")
    for row in range(length):
        for column in range(draw(st.integers(0, k))):
            ids[row, column] = draw(st.integers(0, 9))
            logprobs[row, column] = draw(finite)
    return wire.TopkLogprobs(token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=k, length=length)


def dense(values: np.ndarray, dtype: int) -> wire.Tensor:
    return wire.Tensor(dense=values.tobytes(), dtype=dtype, shape=values.shape)


@st.composite
def samples(draw: Any) -> wire.SampleResponse:
    message = wire.SampleResponse(prompt_cache_hit_tokens=draw(st.integers(0, 9)))
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(st.lists(st.integers(0, 2**31 - 1), max_size=5))
        logprobs = draw(st.lists(finite, min_size=len(tokens), max_size=len(tokens)))
        message.sequences.add(
            stop_reason=draw(st.sampled_from([wire.STOP_REASON_STOP, wire.STOP_REASON_LENGTH])),
            tokens=np.array(tokens, "<i4").tobytes(),
            logprobs=np.array(logprobs, "<f4").tobytes() if draw(st.booleans()) else b"",
            topk_sampled_logprobs=topk(draw, len(tokens)) if draw(st.booleans()) else None,
        )
    length = draw(st.integers(1, 4))
    if draw(st.booleans()):
        values = [np.nan, *draw(st.lists(finite, min_size=length - 1, max_size=length - 1))]
        message.prompt_logprobs = np.array(values, "<f4").tobytes()
    if draw(st.booleans()):
        message.topk_prompt_logprobs.CopyFrom(topk(draw, length))
    if draw(st.booleans()):
        message.target_prompt_logprobs.CopyFrom(
            wire.Tensor(
                sparse_csr=wire.SparseCsr(
                    values=np.array([draw(finite)], "<f4").tobytes(),
                    crow_indices=np.array([0, *[1] * length], "<i8").tobytes(),
                    col_indices=np.array([1], "<i8").tobytes(),
                ),
                dtype=wire.DTYPE_FLOAT32,
                shape=[length, 2],
            )
            if draw(st.booleans())
            else dense(np.array(draw(st.lists(finite, min_size=2, max_size=2)), "<f4")[None], wire.DTYPE_FLOAT32)
        )
    if draw(st.booleans()):
        kind, name = draw(st.sampled_from([(wire.DTYPE_INT32, "<i4"), (wire.DTYPE_INT64, "<i8")]))
        message.prompt_alt_tokens.tokens.CopyFrom(dense(np.array([[draw(st.integers(0, 9))]], name), kind))
        message.prompt_alt_tokens.logprobs.CopyFrom(dense(np.array([[draw(finite)]], "<f4"), wire.DTYPE_FLOAT32))
    return message


def tensor(value: Any) -> Any:
    """Dtype, shape and dense values of our tensor or the official one."""
    if value is None:
        return None
    shape = tuple(value.shape)
    if value.sparse_crow_indices is None:
        return value.dtype, shape, np.asarray(value.data).reshape(shape).tolist()
    filled = np.zeros(shape)
    rows = np.repeat(np.arange(shape[0]), np.diff(value.sparse_crow_indices))
    filled[rows, value.sparse_col_indices] = value.data
    return value.dtype, shape, filled.tolist()


@settings(max_examples=60)
@given(samples())
def test_a_sample_is_read_as_the_official_sdk_reads_it(message):
    body = message.SerializeToString()
    expected = response_conv.deserialize_sample_response(body)
    result = decode_sample(body)
    assert result.prompt_logprobs == expected.prompt_logprobs
    assert result.topk_prompt_logprobs == expected.topk_prompt_logprobs
    assert tensor(result.target_prompt_logprobs) == tensor(expected.target_prompt_logprobs)
    assert (result.prompt_alt_tokens is None) == (expected.prompt_alt_tokens is None)
    if result.prompt_alt_tokens is not None:
        assert tensor(result.prompt_alt_tokens.tokens) == tensor(expected.prompt_alt_tokens.tokens)
        assert tensor(result.prompt_alt_tokens.logprobs) == tensor(expected.prompt_alt_tokens.logprobs)
    assert result.prompt_cache_hit_tokens == expected.prompt_cache_hit_tokens
    assert len(result.sequences) == len(expected.sequences)
    for ours_one, official in zip(result.sequences, expected.sequences, strict=True):
        assert ours_one.tokens == official.tokens
        assert ours_one.logprobs == official.logprobs
        assert ours_one.stop_reason == official.stop_reason
        assert ours_one.topk_logprobs == official.topk_logprobs


def top(**changes: Any) -> wire.TopkLogprobs:
    return wire.TopkLogprobs(**{"token_ids": bytes(8), "logprobs": bytes(8), "k": 2, "length": 1, **changes})


CORRUPT = {
    "tokens cut": wire.SampleResponse(sequences=[wire.SampledSequence(tokens=b"\x01\x02")]),
    "logprobs cut": wire.SampleResponse(sequences=[wire.SampledSequence(tokens=bytes(8), logprobs=bytes(3))]),
    "fewer logprobs than tokens": wire.SampleResponse(
        sequences=[wire.SampledSequence(tokens=bytes(8), logprobs=bytes(4))]
    ),
    "prompt logprobs cut": wire.SampleResponse(prompt_logprobs=b"\x01"),
    "top-k ids missing": wire.SampleResponse(topk_prompt_logprobs=top(token_ids=b"")),
    "top-k logprobs cut": wire.SampleResponse(topk_prompt_logprobs=top(logprobs=bytes(7))),
    "top-k of an impossible size": wire.SampleResponse(topk_prompt_logprobs=top(k=2**31, length=2**31)),
    "target without dtype": wire.SampleResponse(target_prompt_logprobs=wire.Tensor(dense=bytes(4), shape=[1])),
    "target in bfloat16": wire.SampleResponse(
        target_prompt_logprobs=wire.Tensor(dense=bytes(4), dtype=wire.DTYPE_BFLOAT16, shape=[2])
    ),
    "target of another shape": wire.SampleResponse(
        target_prompt_logprobs=wire.Tensor(dense=bytes(4), dtype=wire.DTYPE_FLOAT32, shape=[2])
    ),
    "target of a negative shape": wire.SampleResponse(
        target_prompt_logprobs=wire.Tensor(dense=bytes(4), dtype=wire.DTYPE_FLOAT32, shape=[-1, -1])
    ),
    "target of an impossible size": wire.SampleResponse(
        target_prompt_logprobs=wire.Tensor(dense=b"", dtype=wire.DTYPE_FLOAT32, shape=[2**40, 2**40])
    ),
    "alternatives without logprobs": wire.SampleResponse(
        prompt_alt_tokens=wire.PromptAltTokens(tokens=wire.Tensor(dense=bytes(4), dtype=wire.DTYPE_INT32, shape=[1]))
    ),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_sample_is_an_invalid_response(name):
    with pytest.raises(InvalidResponse):
        decode_sample(CORRUPT[name].SerializeToString())


def test_bytes_that_are_no_message():
    with pytest.raises(InvalidResponse):
        decode_sample(b"\xff\xff\xff\xff")


@settings(max_examples=60)
@given(
    st.one_of(st.binary(max_size=60), samples().map(lambda message: message.SerializeToString())),
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=3),
    st.integers(0, 10**4),
)
def test_damaged_bytes_never_raise_anything_else(body, changes, end):
    damaged = bytearray(body)
    for place, value in changes:
        if damaged:
            damaged[place % len(damaged)] = value
    with contextlib.suppress(InvalidResponse):
        decode_sample(bytes(damaged[: end % (len(damaged) + 1)] if end % 2 else damaged))
