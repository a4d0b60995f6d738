"""What the engine is given and what it gives back: numpy only, so that nothing here loads torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Array = Ints | Floats
# The protocol's mark of an unused cell of a top-k table, beside token 0.
UNUSED_LOGPROB = -99999.0


@dataclass(frozen=True)
class EncodedDatum:
    """One datum in plain arrays.

    Args:
        tokens: the model input, [T].
        inputs: the loss inputs, each [T] or [T, K].
    """

    tokens: Ints
    inputs: Mapping[str, Array]


@dataclass(frozen=True)
class EnginePass:
    """One forward or forward_backward.

    Args:
        data: makes the datums; called on the engine's thread, because decoding is work too.
        loss_fn: name of the loss.
        config: its options.
        forward_only: leave gradients alone.
        keep_graph: a backward pass over the same datums will follow.
    """

    data: Callable[[], Sequence[EncodedDatum]]
    loss_fn: str
    config: Mapping[str, float | str]
    forward_only: bool
    keep_graph: bool = False


@dataclass(frozen=True)
class PassResult:
    """Outputs of one pass.

    Args:
        logprobs: per datum, float32, shaped like its target_tokens.
        metrics: names with a merge suffix, such as "loss:sum".
        elementwise_loss: the loss of each position, laid out like logprobs; None where the loss does not give it.
    """

    logprobs: Sequence[Floats]
    metrics: Mapping[str, float]
    elementwise_loss: Sequence[Floats] | None = None


@dataclass(frozen=True)
class SampleRequest:
    """One sampling request; fields as on the wire.

    Args:
        prompt: token ids, [P].
        stop_tokens: token ids that end a sequence, end-of-text tokens included where they count.
        stop_texts: texts that end a sequence.
        target_logprobs: [P - 1, K] ids to score at prompt positions from 1 on; -1 is skipped.
        alt_tokens: how many tokens to draw in the place of each prompt token from 1 on.
    """

    prompt: Ints
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
class AltTokens:
    """Draws in the place of prompt tokens: ids and logprobs, both [P - 1, k]."""

    ids: NDArray[np.int32]
    logprobs: Floats


@dataclass(frozen=True)
class TopkTable:
    """The k likeliest tokens of each row: ids [rows, k], logprobs [rows, k]. Row 0 may be unused (id 0, -99999)."""

    ids: NDArray[np.int32]
    logprobs: Floats


@dataclass(frozen=True)
class DrawnSequence:
    """One drawn sequence."""

    tokens: NDArray[np.int32]
    logprobs: Floats
    stopped: bool
    topk: TopkTable | None = None


@dataclass(frozen=True)
class SampleResult:
    """What one SampleRequest gave; prompt_logprobs is [P] with NaN where there is none."""

    sequences: Sequence[DrawnSequence]
    prompt_logprobs: Floats | None = None
    topk_prompt: TopkTable | None = None
    target_logprobs: Floats | None = None
    alt_tokens: AltTokens | None = None
    cached_tokens: int = field(default=0)
