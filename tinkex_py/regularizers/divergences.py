"""Divergences between the model's distributions and a reference's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.regularizers.distributions import OVERS, Distributions, Over, js_parts, kl_parts
from tinkex_py.terms.reference import ReferenceTerm
from tinkex_py.types import Datum

Direction = Literal["forward", "reverse"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")


@dataclass(frozen=True, kw_only=True, eq=False)
class KLDivergence(ReferenceTerm):
    """Kullback-Leibler divergence between the model and a reference.

    With p the model's and q the reference's probabilities of the outcomes of one distribution:

    - formula: forward `KL(q || p) = sum(q * (log q - log p))`, which covers all that the reference does; reverse
      `KL(p || q) = sum(p * (log p - log q))`, which seeks its modes; symmetric: the mean of both. Then reduced.
    - gradient: forward `-q`; reverse `p * (1 + log p - log q)`; 0 where the outcome has no probability
    - shapes: `[N, K]`, or any tensor given directly, over its last axis; `[N]` only with `over="tokens"`
    - units: nats

    Between distributions it is never negative; numbers that do not sum to 1 may make it so. If one rules out what the
    other allows it is infinite, and the pipeline raises NonFiniteLoss.

    Source: the regularizers guide, "KL Divergence from Target Distribution" and "KL direction/symmetric".

    Args:
        name: the regularizer's name, if its spec gives none.
        reduction: over distributions: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 leaves a position out.
        reference: a tensor that can be broadcast to the logprobs, or a function `reference(data)`, sync or async,
            that gives them packed, as one tensor per datum, or as the result of a client's `forward`.
        reference_field: a `loss_fn_inputs` field of every datum, in the shape of its logprobs. Exactly one of
            `reference` and `reference_field` is given.
        direction: "forward" or "reverse".
        symmetric: take the mean of both directions; `direction` is ignored.
        over: "candidates": the last axis is a distribution. "tokens": all numbers of a datum are taken as one, which
            is the guide's formula; see "What [T] logprobs are" in the guide to the ready-made terms.
    """

    name: str = "kl_divergence"
    direction: Direction = "forward"
    symmetric: bool = False
    over: Over = "candidates"

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_choice("direction", DIRECTIONS)
        self._check_flag("symmetric")
        self._check_choice("over", OVERS)

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; the denominators are its metrics."""
        distributions = Distributions.of(self, self.over, data, logprobs)
        log_p = distributions.positions.select(logprobs)
        log_q = distributions.positions.select(reference)
        if self.symmetric:
            parts = 0.5 * (kl_parts(log_q, log_p) + kl_parts(log_p, log_q))
        else:
            parts = kl_parts(log_q, log_p) if self.direction == "forward" else kl_parts(log_p, log_q)
        return distributions.reduce(parts, self.reduction)


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
        name: the regularizer's name, if its spec gives none.
        reduction: over distributions: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 leaves a position out.
        reference: a tensor that can be broadcast to the logprobs, or a function `reference(data)`, sync or async,
            that gives them packed, as one tensor per datum, or as the result of a client's `forward`.
        reference_field: a `loss_fn_inputs` field of every datum, in the shape of its logprobs. Exactly one of
            `reference` and `reference_field` is given.
        over: "candidates": the last axis is a distribution. "tokens": all numbers of a datum are taken as one.
    """

    name: str = "jensen_shannon"
    over: Over = "candidates"

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_choice("over", OVERS)

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; the denominators are its metrics."""
        distributions = Distributions.of(self, self.over, data, logprobs)
        select = distributions.positions.select
        return distributions.reduce(js_parts(select(logprobs), select(reference)), self.reduction)
