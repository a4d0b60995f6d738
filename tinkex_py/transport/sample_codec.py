"""Results of sampling, from bytes."""

import math
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from tinkex_py.errors import InvalidData, InvalidResponse
from tinkex_py.transport import wire
from tinkex_py.transport.codec import DTYPES, Result, numbers_of
from tinkex_py.types import PromptAltTokens, SampledSequence, SampleResponse, TensorData
from tinkex_py.types.samples import TopLogprobs

# A cell of a top-k row that holds nothing.
_UNUSED_LOGPROB = -99999.0


def read_sample(result: Result) -> SampleResponse:
    """The result of a sample, whichever way it is written.

    Raises:
        InvalidResponse: it is neither.
    """
    return decode_sample(result.body) if result.fields is None else SampleResponse.read(result.fields)


def decode_sample(body: bytes) -> SampleResponse:
    """A protobuf SampleResponse.

    Raises:
        InvalidResponse: the bytes are no such message, or its parts contradict each other.
    """
    try:
        message = wire.SampleResponse.FromString(body)
    except DecodeError as error:
        raise InvalidResponse(f"the result is no SampleResponse ({len(body)} bytes)") from error
    prompt = numbers_of(message.prompt_logprobs, "<f4", "prompt_logprobs") if message.prompt_logprobs else None
    topk = message.topk_prompt_logprobs if message.HasField("topk_prompt_logprobs") else None
    targets = message.target_prompt_logprobs if message.HasField("target_prompt_logprobs") else None
    return SampleResponse(
        sequences=[_sequence(sequence) for sequence in message.sequences],
        prompt_logprobs=None if prompt is None else [None if np.isnan(value) else float(value) for value in prompt],
        topk_prompt_logprobs=None if topk is None else _top(topk, "topk_prompt_logprobs"),
        target_prompt_logprobs=None if targets is None else _tensor(targets, "target_prompt_logprobs"),
        prompt_alt_tokens=_alternatives(message.prompt_alt_tokens) if message.HasField("prompt_alt_tokens") else None,
        prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
    )


def _sequence(sequence: wire.SampledSequence) -> SampledSequence:
    tokens = numbers_of(sequence.tokens, "<i4", "the tokens of a sequence")
    logprobs = numbers_of(sequence.logprobs, "<f4", "the logprobs of a sequence")
    if logprobs.size not in (0, tokens.size):
        raise InvalidResponse(f"a sequence of {tokens.size} tokens came with {logprobs.size} logprobs")
    topk = sequence.topk_sampled_logprobs if sequence.HasField("topk_sampled_logprobs") else None
    return SampledSequence(
        tokens=tokens.tolist(),
        logprobs=logprobs.tolist() if logprobs.size else None,
        stop_reason="length" if sequence.stop_reason == wire.STOP_REASON_LENGTH else "stop",
        topk_logprobs=None if topk is None else _top(topk, "topk_sampled_logprobs"),
    )


def _top(message: wire.TopkLogprobs, name: str) -> TopLogprobs | None:
    """Rows of (token, logprob); unused cells at the end of a row are cut off, and a row of nothing else is None."""
    if not message.length or not message.k:
        return None
    ids = numbers_of(message.token_ids, "<i4", f"the ids of {name}")
    logprobs = numbers_of(message.logprobs, "<f4", f"the logprobs of {name}")
    if ids.size != message.length * message.k or logprobs.size != ids.size:
        raise InvalidResponse(
            f"{name} of {message.length} x {message.k} came with {ids.size} ids and {logprobs.size} logprobs"
        )
    rows = zip(ids.reshape(-1, message.k).tolist(), logprobs.reshape(-1, message.k).tolist(), strict=True)
    return [_row(list(zip(*row, strict=True))) for row in rows]


def _row(cells: list[tuple[int, float]]) -> list[tuple[int, float]] | None:
    used = next((index for index, cell in enumerate(cells) if cell == (0, _UNUSED_LOGPROB)), len(cells))
    return cells[:used] or None


def _alternatives(message: wire.PromptAltTokens) -> PromptAltTokens:
    return PromptAltTokens(
        tokens=_tensor(message.tokens, "tokens of prompt_alt_tokens"),
        logprobs=_tensor(message.logprobs, "logprobs of prompt_alt_tokens"),
    )


def _tensor(message: wire.Tensor, name: str) -> TensorData:
    dtype = DTYPES.get(message.dtype)
    shape = tuple(message.shape)
    if dtype is None or message.dtype == wire.DTYPE_BFLOAT16:  # not allowed in plain tensors (protocol: 4.4)
        raise InvalidResponse(f"{name} has the dtype {message.dtype}, which a tensor cannot have")
    if any(size < 0 for size in shape) or math.prod(shape) > 2**40:
        raise InvalidResponse(f"{name} has the shape {shape}")
    parts: dict[str, Any] = {"dtype": "float32" if dtype.kind == "f" else "int64", "shape": shape}
    if message.WhichOneof("encoding") == "sparse_csr":
        sparse = message.sparse_csr
        parts["data"] = numbers_of(sparse.values, dtype, name)
        parts["sparse_crow_indices"] = numbers_of(sparse.crow_indices, "<i8", f"the rows of {name}")
        parts["sparse_col_indices"] = numbers_of(sparse.col_indices, "<i8", f"the columns of {name}")
    else:
        parts["data"] = numbers_of(message.dense, dtype, name)
    try:
        return TensorData(**parts)
    except InvalidData as error:
        raise InvalidResponse(f"{name}: {error}") from None
