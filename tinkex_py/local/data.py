"""Requests and results of the engine, in numpy only, so that importing this does not load torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Array = Ints | Floats
UNUSED_LOGPROB = -99999.0
"""The protocol's logprob of an unused cell of a top-k table; its token is 0."""


@dataclass(frozen=True)
class EncodedImage:
    """The file of an image, and the place of the tokens that stand for it."""

    data: bytes
    start: int
    length: int


@dataclass(frozen=True)
class EncodedInput:
    """A model input: tokens, [T], of which some stand for images."""

    tokens: Ints
    images: tuple[EncodedImage, ...] = ()


@dataclass(frozen=True)
class EncodedDatum:
    """One datum.

    Args:
        tokens: the model input, [T].
        inputs: the loss inputs, each [T] or [T, K].
        images: the images of the input, in order.
    """

    tokens: Ints
    inputs: Mapping[str, Array]
    images: tuple[EncodedImage, ...] = ()


@dataclass(frozen=True)
class EnginePass:
    """A forward or forward_backward pass.

    Args:
        data: decodes the datums; called on the engine's thread.
        loss_fn: name of the loss.
        config: options of the loss.
        forward_only: whether to add no gradients.
        keep_graph: whether a backward pass over the same datums will follow.
    """

    data: Callable[[], Sequence[EncodedDatum]]
    loss_fn: str
    config: Mapping[str, float | str]
    forward_only: bool
    keep_graph: bool = False


@dataclass(frozen=True)
class PassResult:
    """The result of a pass.

    Args:
        logprobs: one array per datum, shaped like its target_tokens.
        metrics: values by name with a merge suffix, such as "loss:sum".
        elementwise_loss: the loss of each position, shaped like logprobs; None if the loss does not have it.
    """

    logprobs: Sequence[Floats]
    metrics: Mapping[str, float]
    elementwise_loss: Sequence[Floats] | None = None


@dataclass(frozen=True)
class SampleRequest:
    """A sampling request; further fields as on the wire.

    Args:
        prompt: token ids, [P].
        images: the images of the prompt, in order.
        stop_tokens: token ids that end a sequence, end-of-text tokens included.
        stop_texts: texts that end a sequence.
        target_logprobs: token ids to score at prompt positions from 1, [P - 1, K]; -1 is skipped.
        alt_tokens: number of tokens to sample in place of each prompt token from 1.
    """

    prompt: Ints
    images: tuple[EncodedImage, ...] = ()
    num_samples: int = 1
    max_tokens: int | None = None
    seed: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_tokens: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    prompt_logprobs_last: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_logprobs: Ints | None = None
    alt_tokens: int = 0


@dataclass(frozen=True)
class TokenTable:
    """Token ids and their logprobs, both [rows, k]. In a top-k table, row 0 may be unused (id 0, -99999)."""

    ids: NDArray[np.int32]
    logprobs: Floats


@dataclass(frozen=True)
class SampledTokens:
    """One sampled sequence."""

    tokens: NDArray[np.int32]
    logprobs: Floats
    stopped: bool
    topk: TokenTable | None = None


@dataclass(frozen=True)
class PromptScores:
    """Scores of a prompt of P tokens; None for what was not requested.

    Args:
        logprobs: logprobs of the prompt's tokens, [P], NaN where there is none.
        topk: the likeliest tokens, [P, k].
        targets: logprobs of the requested tokens, [P - 1, K].
        alternatives: tokens sampled in place of those from 1, [P - 1, k].
    """

    logprobs: Floats | None = None
    topk: TokenTable | None = None
    targets: Floats | None = None
    alternatives: TokenTable | None = None


@dataclass(frozen=True)
class SampleResult:
    """The result of a SampleRequest."""

    sequences: Sequence[SampledTokens]
    prompt: PromptScores = PromptScores()
