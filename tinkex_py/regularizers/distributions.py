"""Terms over distributions: entropy, Kullback-Leibler and Jensen-Shannon divergence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tinkex_py.errors import InvalidData
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.distributions import Over, distributions, kl_parts, log_softmax, symmetric_kl_parts
from tinkex_py.terms.ready_made import ADDED, NonEmptyStr, Positive
from tinkex_py.terms.reduction import Positions, ReducedTerm
from tinkex_py.terms.reference import ReferenceTerm
from tinkex_py.types import Datum

Mode = Literal["maximize", "minimize"]


@dataclass(frozen=True, kw_only=True)
class Entropy(ReducedTerm):
    """Entropy of each distribution, to raise or lower it.

    With `H = -sum(p * log p)` over the outcomes of one distribution:

    - formula: `reduce(-H)` to maximize, `reduce(H)` to minimize; the pipeline always minimizes the loss
    - gradient of `-H`: `p * (1 + log p)`, 0 where p is 0; through the softmax if a temperature is set
    - shapes: `[N, K]`, or any tensor given directly, over its last axis; `[N]` only with `over="tokens"`
    - units: nats; with `normalize` a number from 0 to 1 if the probabilities sum to 1

    The probabilities are used as they are: K candidates are not normalized to sum to 1, except with a temperature.

    Source: the regularizers guide, "Entropy Regularization" and "entropy temperature".

    Args:
        name: default name of the regularizer.
        reduction: over distributions: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a position. Default: `weights`, if
            the datums have it; None: no mask.
        mode: "maximize" or "minimize" the entropy.
        temperature: 1.0 uses the logprobs as they are, else `log_softmax(logprobs / temperature)`: sharper below 1.0,
            flatter above. Must be > 0.
        normalize: divide by `log n`, the largest entropy of n outcomes (by log 2 for a single outcome).
        over: "candidates": the last axis is a distribution. "tokens": all numbers of a datum are treated as one, which
            is the guide's formula; see "Terms over distributions" in the guide to the ready-made terms.
    """

    name: NonEmptyStr = "entropy"
    mode: Mode = "maximize"
    temperature: Positive = 1.0
    normalize: bool = False
    over: Over = "candidates"

    def counted(self, data: Sequence[Datum], logprobs: torch.Tensor) -> Positions:
        """Selects what a mean counts."""
        return distributions(self, self.over, data, logprobs)

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the entropy and the denominators."""
        by_datum = self.normalize or self.temperature != 1.0
        positions = distributions(self, self.over, data, logprobs, by_datum=by_datum)
        log_p = positions.select(logprobs)
        if self.temperature != 1.0:
            log_p = log_softmax(log_p / self.temperature, positions)
        parts = -log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)
        if self.normalize:
            parts = parts / _largest_entropy(log_p, positions)
        entropy, metrics = positions.reduce(parts, self.reduction)
        return (-entropy if self.mode == "maximize" else entropy), {
            "entropy": positions.measured(entropy, metrics, self.reduction),
            **metrics,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class KLDivergence(ReferenceTerm):
    """Kullback-Leibler divergence between the model and a reference.

    With p the model's and q the reference's probabilities of the outcomes of one distribution:

    - formula: forward `KL(q || p) = sum(q * (log q - log p))`, which is mode-covering; reverse
      `KL(p || q) = sum(p * (log p - log q))`, which is mode-seeking; symmetric: the mean of both. Then reduced.
    - gradient: forward `-q`; reverse `p * (1 + log p - log q)`; 0 where the outcome has no probability; normalized:
      forward `p - q`; reverse `p * (log p - log q - KL)`
    - shapes: `[N, K]`, or any tensor given directly, over its last axis; `[N]` only with `over="tokens"`
    - units: nats

    It is never negative between distributions; numbers that do not sum to 1 can make it negative. If one distribution
    excludes what the other allows, it is infinite, and the pipeline raises NonFiniteLoss.

    Source: the regularizers guide, "KL Divergence from Target Distribution" and "KL direction/symmetric".

    Args:
        name: default name of the regularizer.
        reduction: over distributions: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a position. Default: `weights`, if
            the datums have it; None: no mask.
        reference: a tensor that can be broadcast to the logprobs, or a function `reference(data)`, sync or async,
            that returns them packed, as one tensor per datum, or as the result of a client's `forward`.
        reference_field: a `loss_fn_inputs` field of every datum, in the shape of its logprobs. Exactly one of
            `reference` and `reference_field` is required.
        direction: "forward" or "reverse".
        symmetric: use the mean of both directions; `direction` is ignored.
        normalize: make both distributions sum to 1 first, by `log_softmax`; for candidates that are only a part of the
            vocabulary.
        over: "candidates": the last axis is a distribution. "tokens": all numbers of a datum are treated as one, which
            is the guide's formula; see "Terms over distributions" in the guide to the ready-made terms.
    """

    name: NonEmptyStr = "kl_divergence"
    direction: Literal["forward", "reverse"] = "forward"
    symmetric: bool = False
    normalize: bool = field(default=False, metadata=ADDED)
    over: Over = "candidates"

    def counted(self, data: Sequence[Datum], logprobs: torch.Tensor) -> Positions:
        """Selects what a mean counts."""
        return distributions(self, self.over, data, logprobs)

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        positions = distributions(self, self.over, data, logprobs, by_datum=self.normalize)
        log_p, log_q = positions.select(logprobs), self._select_reference(positions, reference, data)
        if self.normalize:
            if positions.rows == 1:
                raise InvalidData(
                    "KLDivergence with normalize=True is 0 for a single candidate per position: pass at least two"
                )
            log_p, log_q = log_softmax(log_p, positions), log_softmax(log_q, positions)
        if self.symmetric:
            parts = symmetric_kl_parts(log_p, log_q)
        else:
            parts = kl_parts(log_q, log_p) if self.direction == "forward" else kl_parts(log_p, log_q)
        return positions.reduce(parts, self.reduction)


@dataclass(frozen=True, kw_only=True, eq=False)
class JensenShannon(ReferenceTerm):
    """Jensen-Shannon divergence between the model and a reference: symmetric, from 0 to log 2, never infinite.

    With p the model's and q the reference's probabilities, and `m = (p + q) / 2`:

    - formula: `(KL(p || m) + KL(q || m)) / 2`, then reduced
    - gradient: `p * (log p - log m) / 2`
    - shapes: `[N, K]`, or any tensor given directly, over its last axis; `[N]` only with `over="tokens"`
    - units: nats

    Source: J. Lin, "Divergence Measures Based on the Shannon Entropy".

    Args:
        name: default name of the regularizer.
        reduction: over distributions: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a position. Default: `weights`, if
            the datums have it; None: no mask.
        reference: as in `KLDivergence`.
        reference_field: as in `KLDivergence`. Exactly one of `reference` and `reference_field` is required.
        over: "candidates": the last axis is a distribution. "tokens": all numbers of a datum are treated as one.
    """

    name: NonEmptyStr = "jensen_shannon"
    over: Over = "candidates"

    def counted(self, data: Sequence[Datum], logprobs: torch.Tensor) -> Positions:
        """Selects what a mean counts."""
        return distributions(self, self.over, data, logprobs)

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        positions = distributions(self, self.over, data, logprobs)
        smallest = torch.finfo(logprobs.dtype).min
        log_p = positions.select(logprobs).clamp(min=smallest)
        log_q = self._select_reference(positions, reference, data).clamp(min=smallest)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
        parts = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m))
        return positions.reduce(parts, self.reduction)


def _largest_entropy(values: torch.Tensor, positions: Positions) -> torch.Tensor | float:
    """Returns `log n` for n outcomes, in a shape that divides the values; log 2 for n = 1."""
    if positions.rows is not None or positions.sequences is None:
        return math.log(max(2, values.shape[-1]))
    outcomes = torch.bincount(positions.sequences, minlength=positions.sequence_count)
    return outcomes.clamp(min=2).to(values.dtype).log()[positions.sequences]
