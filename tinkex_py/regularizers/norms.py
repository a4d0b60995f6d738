"""Penalties on the size of numbers: L1, L2 and their mixture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.fields import aligned_field
from tinkex_py.terms.ready_made import NonEmptyStr, Positive
from tinkex_py.terms.reduction import Positions, ReducedTerm
from tinkex_py.types import Datum
from tinkex_py.values import Number


@dataclass(frozen=True, kw_only=True)
class NormTerm(ReducedTerm):
    """A penalty on the logprobs, the probabilities or a field."""

    target: NonEmptyStr = "logprobs"

    def target_tensor(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        """Returns the field, or the logprobs for both "logprobs" and "probs"."""
        if self.target in ("logprobs", "probs"):
            return logprobs
        return aligned_field(data, self.target, logprobs, per_position=True)

    def counted(self, data: Sequence[Datum], logprobs: torch.Tensor) -> Positions:
        """Selects the numbers that a mean counts."""
        return self.positions(data, self.target_tensor(data, logprobs))

    def selected(
        self, data: Sequence[Datum], logprobs: torch.Tensor, *, by_row: bool = False
    ) -> tuple[Positions, torch.Tensor]:
        """Returns the selected positions, and the numbers to penalize: `[M]`, or `[M, K]` by row."""
        target = self.target_tensor(data, logprobs)
        positions = self.positions(data, target, by_row=by_row)
        values = positions.select(target)
        return positions, values.exp() if self.target == "probs" else values


@dataclass(frozen=True, kw_only=True)
class L1(NormTerm):
    """Sum of absolute values: pulls every number to 0 with the same force, so that small ones reach it.

    With x the target and w the mask:

    - formula: `reduce(|x|)`; by default `sum(w * |x|)`
    - gradient: `w * sign(x)`, 0 at 0; for `target="probs"` `w * exp(logprobs)`
    - shapes: `[N]`, `[N, K]`, or any shape with `data=[]`
    - units: nats for logprobs, dimensionless for probabilities

    Source: the regularizers guide, "L1 Sparsity"; R. Tibshirani, "Regression Shrinkage and Selection via the Lasso".

    Args:
        name: default name of the regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a number. Default: `weights`, if
            the datums have it; None: no mask.
        target: "logprobs", "probs" for their exponential, or the name of a field. A field is a constant: its penalty
            counts in the loss, but it has no gradient, and the output reports `differentiable=False`.
    """

    name: NonEmptyStr = "l1_sparsity"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        positions, values = self.selected(data, logprobs)
        return positions.reduce(values.abs(), self.reduction)


@dataclass(frozen=True, kw_only=True)
class L2(NormTerm):
    """Sum of squares, without a square root: pulls large numbers more strongly than small ones.

    With x the target, c the center and w the mask:

    - formula: `reduce((x - c)**2)`; by default `sum(w * x**2)`
    - gradient: `2 * w * (x - c)`; with `clip` 0 where `|x - c| > clip`
    - shapes: `[N]`, `[N, K]`, or any shape with `data=[]`
    - units: nats squared for logprobs

    Source: the regularizers guide, "L2 Weight Decay"; `center` and `clip` as in the NxPenalties library.

    Args:
        name: default name of the regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a number. Default: `weights`, if
            the datums have it; None: no mask.
        target: "logprobs", "probs", or the name of a field, as in `L1`.
        center: where the pull leads: None for 0; a number; "mean" for the mean of the selected numbers; or the name of
            a field in the shape of the datum's logprobs, which makes this a distance to that field.
        clip: upper bound on the distance from the center that counts, > 0; None for no bound.
    """

    name: NonEmptyStr = "l2_weight_decay"
    center: Number | NonEmptyStr | None = None
    clip: Positive | None = None

    @property
    def coupling(self) -> str | None:
        """The mean as a center is that of all datums."""
        return "center='mean' is the mean of all datums" if self.center == "mean" else None

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        positions, values = self.selected(data, logprobs)
        if self.center == "mean":
            values = values - positions.mean(values)
        elif isinstance(self.center, str):
            center = aligned_field(data, self.center, self.target_tensor(data, logprobs))
            values = values - positions.select(center)
        elif self.center is not None:
            values = values - self.center
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        return positions.reduce(values.square(), self.reduction)


@dataclass(frozen=True, kw_only=True)
class ElasticNet(NormTerm):
    """A mixture of L1 and L2.

    With x the target, a the `l1_ratio` and w the mask:

    - formula: `reduce(a * |x| + (1 - a) * x**2)`
    - gradient: `w * (a * sign(x) + 2 * (1 - a) * x)`
    - shapes: `[N]`, `[N, K]`, or any shape with `data=[]`
    - units: those of L1 and L2, mixed

    Source: H. Zou and T. Hastie, "Regularization and Variable Selection via the Elastic Net".

    Args:
        name: default name of the regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a number. Default: `weights`, if
            the datums have it; None: no mask.
        target: "logprobs", "probs", or the name of a field, as in `L1`.
        l1_ratio: share of L1, from 0 (only L2) to 1 (only L1).
    """

    name: NonEmptyStr = "elastic_net"
    l1_ratio: Annotated[Number, Field(ge=0, le=1)] = 0.5

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        positions, values = self.selected(data, logprobs)
        mixed = self.l1_ratio * values.abs() + (1 - self.l1_ratio) * values.square()
        return positions.reduce(mixed, self.reduction)
