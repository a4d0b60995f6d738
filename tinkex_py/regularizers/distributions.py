"""What entropy and divergences share: which numbers make a distribution, and their formulas, outcome by outcome.

For all formulas `0 * log 0` is 0: an outcome without probability adds nothing and gets no gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tinkex_py.errors import InvalidData
from tinkex_py.terms.fields import is_one_number_per_position
from tinkex_py.terms.numerics import segment_log_softmax
from tinkex_py.terms.reduction import Positions, ReducedTerm, Reduction
from tinkex_py.types import Datum

Over = Literal["candidates", "tokens"]
OVERS: tuple[Over, ...] = ("candidates", "tokens")


@dataclass(frozen=True)
class Distributions:
    """The distributions in a tensor of logprobs.

    Attributes:
        over: "candidates": the last axis is one distribution; "tokens": all numbers of a datum are.
        positions: what counts: rows over the candidates, or single numbers.
    """

    over: Over
    positions: Positions

    @classmethod
    def of(
        cls, term: ReducedTerm, over: Over, data: Sequence[Datum], logprobs: torch.Tensor, *, by_datum: bool = False
    ) -> "Distributions":
        """Those of packed logprobs, or of a tensor given directly.

        Args:
            term: whose mask and reduction count, and whose name an error tells.
            over: what makes a distribution.
            data: the datums.
            logprobs: `[N, K]`, or a tensor given directly; `[N]` with `over="tokens"`.
            by_datum: with `over="tokens"`, whether each datum's distribution must be told from the others.

        Raises:
            InvalidData: `[T]` logprobs of a client without `over="tokens"`.
        """
        if over == "tokens":
            return cls(over, term.positions(data, logprobs, by_datum=by_datum))
        if is_one_number_per_position(data, logprobs):
            raise InvalidData(
                f"{type(term).__name__} is a formula over distributions, but the logprobs have shape "
                f"{tuple(logprobs.shape)}: one number per position, that of the target token. Give [T, K] targets; or "
                "use SampledKL or SampledEntropy for sampled tokens; or say over='tokens' to take all numbers of a "
                "datum as one distribution, which they are not"
            )
        if not logprobs.ndim:
            raise InvalidData(f"{type(term).__name__} needs at least one axis of outcomes, got a 0-d tensor")
        return cls(over, term.positions(data, logprobs, by_row=True))

    def log_softmax(self, values: torch.Tensor) -> torch.Tensor:
        """Selected values, normalized within each distribution."""
        if self.over == "candidates":
            return values.log_softmax(-1)
        return segment_log_softmax(values, self.positions.sequences, self.positions.sequence_count)

    def largest_entropy(self, values: torch.Tensor) -> torch.Tensor | float:
        """`log n` of a distribution over n outcomes, in a shape that divides the selected values; log 2 for n = 1."""
        if self.over == "candidates":
            return math.log(max(2, values.shape[-1]))
        sequences, count = self.positions.sequences, self.positions.sequence_count
        if sequences is None:
            return math.log(max(2, values.numel()))
        return torch.bincount(sequences, minlength=count).clamp(min=2).to(values.dtype).log()[sequences]

    def reduce(self, parts: torch.Tensor, reduction: Reduction) -> tuple[torch.Tensor, dict[str, float]]:
        """One loss from the parts of the outcomes, and its denominators."""
        return self.positions.reduce(parts.sum(-1) if self.over == "candidates" else parts, reduction)


def entropy_parts(log_p: torch.Tensor) -> torch.Tensor:
    """`-p * log p`."""
    return -log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)


def kl_parts(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`p * (log p - log q)`: infinite where q rules out what p allows."""
    p = log_p.exp()
    impossible = p == 0
    return p * (log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0))


def js_parts(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`(p * (log p - log m) + q * (log q - log m)) / 2` with `m = (p + q) / 2`."""
    smallest = torch.finfo(log_p.dtype).min
    log_p, log_q = log_p.clamp(min=smallest), log_q.clamp(min=smallest)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m))
