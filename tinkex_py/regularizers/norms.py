"""Penalties on the size of numbers: L1, L2 and their mixture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.fields import aligned_field
from tinkex_py.terms.reduction import Positions, ReducedTerm
from tinkex_py.types import Datum


@dataclass(frozen=True, kw_only=True)
class NormTerm(ReducedTerm):
    """A penalty on one tensor.

    Args:
        name: the regularizer's name, if its spec gives none.
        reduction: how the numbers become one loss, see `Positions.reduce`.
        mask: a `loss_fn_inputs` field that says what counts, see `Positions.of`.
        target: which tensor: "logprobs"; "probs", their exponential; or the name of a `loss_fn_inputs` field. A field
            holds constants: its penalty counts in the loss, but no gradient comes from it, and the output says
            `differentiable=False`.
    """

    target: str = "logprobs"

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_text("target")

    def _target(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        if self.target in ("logprobs", "probs"):
            return logprobs
        return aligned_field(data, self.target, logprobs, per_position=True)

    def _selected(self, target: torch.Tensor, positions: Positions) -> torch.Tensor:
        values = positions.select(target)
        return values.exp() if self.target == "probs" else values


@dataclass(frozen=True, kw_only=True)
class L1(NormTerm):
    """Sum of absolute values: pulls every number towards 0 with the same force, so that small ones reach it.

    With x the target and w the mask:

    - formula: `reduce(|x|)`; by default `sum(w * |x|)`
    - gradient: `w * sign(x)`, 0 at 0; for `target="probs"` `w * exp(logprobs)`
    - shapes: `[N]`, `[N, K]`, or any shape with `data=[]`
    - units: nats for logprobs, pure numbers for probabilities

    Source: the regularizers guide, "L1 Sparsity"; R. Tibshirani, "Regression Shrinkage and Selection via the Lasso".

    Args:
        name: the regularizer's name, if its spec gives none.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 leaves a number out.
        target: "logprobs", "probs", or the name of a field. A field holds constants: its penalty counts, but no
            gradient comes from it.
    """

    name: str = "l1_sparsity"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; the denominators are its metrics."""
        target = self._target(data, logprobs)
        positions = self.positions(data, target)
        values = self._selected(target, positions)
        return positions.reduce(values.abs(), self.reduction)


@dataclass(frozen=True, kw_only=True)
class L2(NormTerm):
    """Sum of squares, without a square root: pulls large numbers harder than small ones.

    With x the target, c the center and w the mask:

    - formula: `reduce((x - c)**2)`; by default `sum(w * x**2)`
    - gradient: `2 * w * (x - c)`; with `clip` 0 where `|x - c| > clip`
    - shapes: `[N]`, `[N, K]`, or any shape with `data=[]`
    - units: nats squared for logprobs

    Source: the regularizers guide, "L2 Weight Decay"; `center` and `clip` as in the NxPenalties library.

    Args:
        name: the regularizer's name, if its spec gives none.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 leaves a number out.
        target: "logprobs", "probs", or the name of a field. A field holds constants: its penalty counts, but no
            gradient comes from it.
        center: what is pulled to: None for 0; a number; "mean" for the mean of the numbers that count; or the name of
            a field in the shape of the datum's logprobs, which makes this a distance to that field.
        clip: numbers further from the center count as if they were this far; None for no limit. Must be > 0.
    """

    name: str = "l2_weight_decay"
    center: float | str | None = None
    clip: float | None = None

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        if isinstance(self.center, str):
            self._check_text("center")
        elif self.center is not None:
            self._check_number("center")
        if self.clip is not None:
            self._check_number("clip", above=0)

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; the denominators are its metrics."""
        target = self._target(data, logprobs)
        positions = self.positions(data, target)
        values = self._selected(target, positions)
        if self.center == "mean":
            mean, _ = positions.reduce(values, "mean")
            values = values - mean
        elif isinstance(self.center, str):
            values = values - positions.select(aligned_field(data, self.center, target))
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
        name: the regularizer's name, if its spec gives none.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 leaves a number out.
        target: "logprobs", "probs", or the name of a field. A field holds constants: its penalty counts, but no
            gradient comes from it.
        l1_ratio: share of L1, from 0 (only L2) to 1 (only L1).
    """

    name: str = "elastic_net"
    l1_ratio: float = 0.5

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_number("l1_ratio", at_least=0, at_most=1)

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; the denominators are its metrics."""
        target = self._target(data, logprobs)
        positions = self.positions(data, target)
        values = self._selected(target, positions)
        mixed = self.l1_ratio * values.abs() + (1 - self.l1_ratio) * values.square()
        return positions.reduce(mixed, self.reduction)
