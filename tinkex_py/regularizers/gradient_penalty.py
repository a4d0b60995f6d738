"""A penalty on the gradient of another term."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch

from tinkex_py.losses.gradients import loss_and_metrics
from tinkex_py.losses.logprobs import split
from tinkex_py.losses.output import TOTAL_METRIC
from tinkex_py.losses.spec import PerDatum, Term, TermResult, is_async_term, term_function, why_not_a_term
from tinkex_py.terms.fields import aligned_field
from tinkex_py.terms.numerics import safe_sqrt
from tinkex_py.terms.ready_made import ADDED, NonEmptyStr, NonNegative, Positive, ReadyMadeTerm
from tinkex_py.terms.reduction import Positions
from tinkex_py.types import Datum
from tinkex_py.values import Integer


@dataclass(frozen=True, kw_only=True)
class GradientPenalty(ReadyMadeTerm):
    """Pulls the norm of another term's gradient to a target: `(||g|| - target_norm)**2` for each datum.

    With f the other term, x the logprobs, and g the slice of `df/dx` that belongs to one datum:

    - formula: the mean or sum over datums of `(||g|| - target_norm)**2`; without datums, the whole tensor is one.
      `output` evaluates g at x; `interpolated` at `u * x + (1 - u) * y`, with y a reference field and u drawn
      uniformly from [0, 1) for each datum
    - gradient: `2 * (||g|| - target_norm) * H g / ||g||` with H the second derivative of f; `u` times that where
      interpolated; 0 where g is 0
    - shapes: those that f accepts: `[N]`, `[N, K]`, or any shape with `data=[]`
    - units: those of f per nat, squared

    The second derivative is exact, from a graph of the first. It is 0 for an f that is linear in the logprobs, such as
    NLL: then the penalty has no gradient, and the output reports `differentiable=False`.

    Source: I. Gulrajani et al., "Improved Training of Wasserstein GANs" (equation 3); the NxPenalties library,
    "gradient_penalty".

    Args:
        name: default name of the regularizer.
        fn: the term f: any term that is not async.
        mode: "output" or "interpolated".
        target_norm: the target, >= 0.
        reference_field: for "interpolated": a `loss_fn_inputs` field of every datum, in the shape of its logprobs.
        reduction: "mean" or "sum" over datums.
        seed: for "interpolated": makes the draw reproducible; None draws from torch's global generator.
        total: the number of datums that the mean divides by, if they are sent in several calls.
    """

    name: NonEmptyStr = "gradient_penalty"
    fn: Term = field(repr=False)
    mode: Literal["output", "interpolated"] = "output"
    target_norm: NonNegative = 1.0
    reference_field: NonEmptyStr | None = None
    reduction: Literal["mean", "sum"] = "mean"
    seed: Integer | None = None
    total: Positive | None = field(default=None, metadata=ADDED)

    def check(self) -> None:
        """Raises InvalidSpec if `fn` is not usable, or if `mode` and `reference_field` contradict each other."""
        problem = why_not_a_term(self.fn, {})
        if problem is None and is_async_term(self.fn):
            problem = "fn must not be async, because its gradient is computed inside this term: pass a sync function"
        if problem is not None:
            raise self.invalid(problem)
        if (self.mode == "interpolated") != (self.reference_field is not None):
            raise self.invalid(
                f"mode='interpolated' needs a reference_field, and mode='output' has none, got mode={self.mode!r} and "
                f"reference_field={self.reference_field!r}"
            )
        if self.total is not None and (self.reduction == "sum" or self.coupling is not None):
            raise self.invalid(f"total is for parts of a larger mean, but {self.coupling or 'reduction is sum'}")

    @property
    def coupling(self) -> str | None:
        """The gradient of a mean depends on the number of datums."""
        reduction = getattr(self.fn, "reduction", "sum")
        own = self.fn.coupling if isinstance(self.fn, ReadyMadeTerm) else None
        return (
            own if reduction == "sum" else f"the gradient of a term with reduction={reduction!r} depends on all datums"
        )

    def _total_of(self, data: Sequence[Datum]) -> float | None:
        return None if self.reduction == "sum" else float(len(data))

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the mean norm of the gradients and the number of datums."""
        positions = Positions.of(data, logprobs, by_datum=True)
        with torch.enable_grad():
            point = logprobs if self.mode == "output" else self._between(data, logprobs, positions)
            gradient = self._gradient(data, point if point.requires_grad else point.detach().requires_grad_())
        norms = safe_sqrt(positions.sums(positions.select(gradient).square()))
        penalties = (norms - self.target_norm).square()
        loss = penalties.sum() / (1.0 if self.reduction == "sum" else self.total or float(norms.numel()))
        metrics = {"gradient_norm": norms.detach().mean(), "sequences": float(norms.numel())}
        return loss, metrics if self.total is None else {**metrics, TOTAL_METRIC: self.total}

    def _between(self, data: Sequence[Datum], logprobs: torch.Tensor, positions: Positions) -> torch.Tensor:
        reference = aligned_field(data, cast("str", self.reference_field), logprobs)
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        shares = torch.rand(positions.sequence_count, generator=generator, dtype=logprobs.dtype, device="cpu")
        shares = shares.to(logprobs.device)
        share = shares if positions.sequences is None else shares[positions.sequences].reshape(logprobs.shape)
        return share * logprobs + (1.0 - share) * reference

    def _gradient(self, data: Sequence[Datum], point: torch.Tensor) -> torch.Tensor:
        function = term_function(self.fn)
        result = function(data, split(data, point) if isinstance(self.fn, PerDatum) else point)
        value, _ = loss_and_metrics(result, self.name)
        if not value.requires_grad:
            return torch.zeros_like(point, requires_grad=False)
        (gradient,) = cast(
            "tuple[torch.Tensor | None]",
            torch.autograd.grad(value.sum(), point, create_graph=True, allow_unused=True),
        )
        return torch.zeros_like(point, requires_grad=False) if gradient is None else gradient
