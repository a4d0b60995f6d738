"""Distributions over candidates: selecting, normalizing and comparing them.

In all formulas `0 * log 0` is 0: an outcome without probability adds nothing and has no gradient.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from tinkex_py.errors import InvalidData
from tinkex_py.terms.fields import described_position, is_one_number_per_position
from tinkex_py.terms.numerics import log1mexp, segment_log_softmax
from tinkex_py.terms.reduction import Positions, ReducedTerm
from tinkex_py.types import Datum

Over = Literal["candidates", "tokens"]

# A probability outside of the candidates of 0 would have the logarithm -inf.
_LARGEST_MASS = -1e-7


def distributions(
    term: ReducedTerm, over: Over, data: Sequence[Datum], logprobs: torch.Tensor, *, by_datum: bool = False
) -> Positions:
    """Selects the distributions of packed logprobs, or of a tensor given directly.

    Args:
        term: the term, whose mask and reduction apply.
        over: "candidates": the last axis is one distribution; "tokens": all numbers of a datum are.
        data: the datums.
        logprobs: `[N, K]`, or a tensor given directly; `[N]` with `over="tokens"`.
        by_datum: with `over="tokens"`, keep the datum of each number.

    Returns:
        Rows over the candidates, or single numbers.

    Raises:
        InvalidData: the logprobs are a client's `[T]`, without `over="tokens"`.
    """
    if over == "tokens":
        return term.positions(data, logprobs, by_datum=by_datum)
    if is_one_number_per_position(data, logprobs):
        literally = "; or pass over='tokens' to treat all numbers of a datum as one distribution, which they are not"
        raise InvalidData(
            f"{type(term).__name__} is a formula over distributions, but the logprobs have shape "
            f"{tuple(logprobs.shape)}: one number per position, that of the target token. Pass [T, K] targets; or use "
            f"SampledKL or SampledEntropy for sampled tokens{literally if hasattr(term, 'over') else ''}"
        )
    if not logprobs.ndim:
        raise InvalidData(f"{type(term).__name__} needs at least one axis of outcomes, got a 0-d tensor")
    return term.positions(data, logprobs, by_row=True)


def check_distinct(data: Sequence[Datum], positions: Positions) -> None:
    """Raises InvalidData if a selected position of datums with targets lists a candidate twice."""
    if not data or any("target_tokens" not in datum.loss_fn_inputs for datum in data):
        return
    targets = np.concatenate([datum.loss_fn_inputs["target_tokens"].to_numpy() for datum in data])
    kept = np.arange(len(targets)) if positions.kept is None else positions.kept.cpu().numpy()
    ordered = np.sort(targets[kept], axis=-1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if twice.size:
        row, column = twice[0]
        raise InvalidData(
            f"the candidates at {described_position(data, [int(kept[row])])} contain the token "
            f"{ordered[row, column]} twice, so it would count twice: pass distinct candidates"
        )


def log_softmax(values: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Normalizes each distribution: a row, or the numbers of a datum."""
    if positions.rows is not None:
        return values.log_softmax(-1)
    return segment_log_softmax(values, positions.sequences, positions.sequence_count)


def with_tail(values: torch.Tensor) -> torch.Tensor:
    """Appends to logprobs of K candidates, `[M, K]`, that of all other tokens together: `[M, K + 1]`."""
    mass = values.logsumexp(-1, keepdim=True).clamp(max=_LARGEST_MASS)
    return torch.cat([values, log1mexp(mass)], -1)


def kl_parts(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Returns `p * (log p - log q)` of each outcome: infinite where q excludes what p allows."""
    p = log_p.exp()
    impossible = p == 0
    return p * (log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0))


def symmetric_kl_parts(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Returns the summands of the mean of both directions."""
    return 0.5 * (kl_parts(log_p, log_q) + kl_parts(log_q, log_p))
