"""Masks and reductions: from one number per position to one loss.

The reductions have the names of verl's `agg_loss`. They differ in the influence of a long datum.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from math import inf
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch

from tinkex_py.errors import InvalidData
from tinkex_py.losses.output import TOTAL_METRIC
from tinkex_py.terms.fields import aligned_field, datum_lengths, described_position, has_field
from tinkex_py.terms.numerics import segment_sum
from tinkex_py.terms.ready_made import ADDED, NonEmptyStr, Positive, ReadyMadeTerm
from tinkex_py.types import Datum
from tinkex_py.types.datum import target_shape

Reduction = Literal["sum", "mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"]

_OVER_TOKENS = ("mean", "token-mean")
_OVER_DATUMS = ("seq-mean-token-sum", "seq-mean-token-mean", "constant")

# Logprobs are at most 0. Engines with few digits round up to a little more.
_LARGEST_LOGPROB = 1e-3


class DefaultMask(Enum):
    """The default of `mask`: the field `weights` of data that has it."""

    WEIGHTS = "weights"

    def __repr__(self) -> str:
        """The name of the field, for the repr of a term."""
        return repr(self.value)


Mask = NonEmptyStr | DefaultMask | None


@dataclass(frozen=True)
class Positions:
    """The positions of a tensor of logprobs that the mask selects: single numbers, or rows over the last axis.

    Selecting comes before any arithmetic, so that not even an infinite logprob outside of the mask reaches the loss or
    its gradient.

    Attributes:
        rows: K, if each position is a row of K numbers; None if each position is one number.
        kept: indices of the selected positions, `[M]`; None if all are selected.
        weights: their weights, `[M]`; None if all are 1.
        sequences: index of the datum of each, `[M]`; None if there is only one datum, or without `by_datum`.
        sequence_count: number of datums.
        total: what a mean divides by; None for the tokens or datums of these positions.
        length: the number of tokens per datum that the reduction "constant" divides by.
    """

    rows: int | None
    kept: torch.Tensor | None
    weights: torch.Tensor | None
    sequences: torch.Tensor | None
    sequence_count: int
    total: float | None = None
    length: float | None = None

    @classmethod
    def of(
        cls,
        data: Sequence[Datum],
        logprobs: torch.Tensor,
        *,
        weights: torch.Tensor | None = None,
        by_row: bool = False,
        by_datum: bool = False,
    ) -> "Positions":
        """Selects positions of packed logprobs, or of a tensor given directly.

        Args:
            data: the datums; if there are none, the whole tensor is one sequence.
            logprobs: `[N]`, `[N, K]`, or any shape.
            weights: one number per position, flat. 0 excludes the position.
            by_row: the last axis is one position.
            by_datum: keep the datum of each position, for sums per datum.

        Raises:
            InvalidData: the lengths of the datums do not add up to those of the logprobs.
        """
        rows = logprobs.shape[-1] if by_row else None
        leading = logprobs.shape[:-1] if by_row else logprobs.shape
        each = leading[1:].numel()  # positions per entry of the first axis
        sequences = None
        if by_datum and len(data) > 1:
            lengths = torch.tensor(datum_lengths(data, leading[0] if leading else 1), device="cpu") * each
            numbers = torch.arange(len(data), device="cpu")
            sequences = torch.repeat_interleave(numbers, lengths).to(logprobs.device)
        count = len(data) if by_datum and data else 1
        if weights is None:
            return cls(rows, None, None, sequences, count)
        # ten times faster than torch.nonzero
        kept = torch.from_numpy(np.flatnonzero((weights != 0).cpu().numpy()))  # pyright: ignore[reportUnknownMemberType]
        kept = kept.to(logprobs.device)
        if kept.numel() < weights.numel():
            weights = weights.index_select(0, kept)
            sequences = None if sequences is None else sequences.index_select(0, kept)
        else:
            kept = None
        return cls(rows, kept, None if bool((weights == 1).all()) else weights, sequences, count)

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the selected values of a tensor in the shape of the logprobs: `[M]`, or `[M, K]` by row."""
        plain = values.as_subclass(torch.Tensor)
        flat = plain.reshape(-1) if self.rows is None else plain.reshape(-1, self.rows)
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def select_logprobs(self, values: torch.Tensor, data: Sequence[Datum], source: str) -> torch.Tensor:
        """Returns the selected values of a tensor of logprobs, as `select` does.

        Raises:
            InvalidData: a selected number is too large for a logprob, for example because it is a probability.
        """
        selected = self.select(values)
        wrong = np.flatnonzero((selected > _LARGEST_LOGPROB).cpu().numpy())
        if not wrong.size:
            return selected
        found = self._described(int(wrong[0]), values, data)
        raise InvalidData(f"{source} has {found}, but logprobs are at most 0: pass logarithms, not probabilities")

    def select_finite(self, values: torch.Tensor, data: Sequence[Datum], source: str) -> torch.Tensor:
        """Returns the selected values, as `select` does.

        Raises:
            InvalidData: a selected number is not finite.
        """
        selected = self.select(values)
        if not math.isfinite(selected.detach().sum().item()):
            wrong = np.flatnonzero((~torch.isfinite(selected)).cpu().numpy())
            if wrong.size:
                raise InvalidData(
                    f"{source} has {self._described(int(wrong[0]), values, data)}: leave the position out of the mask, "
                    "or the datum out of the batch"
                )
        return selected

    def _described(self, at: int, values: torch.Tensor, data: Sequence[Datum]) -> str:
        """Describes the selected number `at` of some values: its value, position and datum."""
        position, candidate = divmod(at, self.rows or 1)
        if self.kept is not None:
            position = int(self.kept[position])
        flat = position * (self.rows or 1) + candidate
        index = [int(axis) for axis in np.unravel_index(flat, values.shape)]
        return f"{values.detach().reshape(-1)[flat].item():.6g} at {described_position(data, index)}"

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """Returns each value times its weight, `[M]`."""
        return values if self.weights is None else values * self.weights

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the unweighted sum of `[M]` over each datum, `[datums]`."""
        return segment_sum(values, self.sequences, self.sequence_count)

    def sizes(self, like: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the weights of each datum, `[datums]`, in the dtype of `like`, `[M]`."""
        return self.sums(like.detach().new_ones(like.shape) if self.weights is None else self.weights)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the unweighted mean of `[M]` over each datum, `[datums]`; 0 for a datum without a position."""
        return self.sums(values) / self.sums(torch.ones_like(values)).clamp(min=1.0)

    def spread(self, by_datum: torch.Tensor) -> torch.Tensor:
        """Returns the number of the datum of each position: `[M]`, or `[1]` if there is only one datum."""
        return by_datum if self.sequences is None else by_datum.index_select(0, self.sequences)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the weighted mean of `[M]` over these positions, whatever `total` is; 0 for no position."""
        return self.weighted(values).sum() / (self.tokens(values) or 1.0)

    def tokens(self, values: torch.Tensor) -> float:
        """Returns the sum of the weights; `values` is `[M]`."""
        return float(values.numel() if self.weights is None else self.weights.sum().item())

    def measured(self, loss: torch.Tensor, metrics: Mapping[str, float], reduction: Reduction) -> torch.Tensor:
        """Returns a reduced loss as a metric: its mean over these positions, whatever `total` is."""
        if self.total is None:
            return loss.detach()
        return loss.detach() * self.total / (metrics["tokens" if reduction in _OVER_TOKENS else "sequences"] or 1.0)

    def reduce(self, values: torch.Tensor, reduction: Reduction) -> tuple[torch.Tensor, dict[str, float]]:
        """Reduces values to one loss, and returns its denominators as metrics.

        The values are `[M]`, or `[M, K]`, whose rows are summed first.

        - `sum`: `sum(w * v)`
        - `token-mean`, or `mean`: `sum(w * v) / sum(w)`
        - `seq-mean-token-sum`: mean over datums of their `sum(w * v)`
        - `seq-mean-token-mean`: mean over datums of their `sum(w * v) / sum(w)`
        - `constant`: mean over datums of their `sum(w * v) / length`

        Datums without a selected position do not enter a mean over datums. The loss of no position is 0. `total`
        replaces the number that a mean divides by: the sum of all weights, or the number of datums.
        """
        if values.ndim > 1:
            values = values.sum(-1)
        weighted, tokens = self.weighted(values), self.tokens(values)
        metrics = {"tokens": tokens}
        if self.total is not None:
            metrics[TOTAL_METRIC] = self.total
        if reduction == "sum":
            return weighted.sum(), metrics
        if reduction in _OVER_TOKENS:
            return weighted.sum() / (self.total or tokens or 1.0), metrics
        sums, sizes = self.sums(weighted), self.sizes(values)
        counted = sizes != 0
        metrics["sequences"] = float(counted.sum().item())
        if reduction == "seq-mean-token-mean":
            sums = sums / torch.where(counted, sizes, 1.0)
        elif reduction == "constant":
            assert self.length is not None, "checked at construction"
            sums = sums / self.length
        return sums.sum() / (self.total or metrics["sequences"] or 1.0), metrics


@dataclass(frozen=True, kw_only=True)
class ReducedTerm(ReadyMadeTerm):
    """A ready-made term with one number per position.

    Args:
        name: default name of the regularizer.
        reduction: see `Positions.reduce`.
        total: what a mean divides by, instead of the tokens or datums of the call: those of all calls before one
            optimizer step, so that their gradients add up to that of one mean. `train` sets it for its accumulation.
        length: for the reduction "constant": the fixed number of tokens that the sum of each datum is divided by.
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`, of numbers >= 0. 0 excludes a position; any
            other number is its weight. A row of `[T, K]` has weight 1 if any of its numbers is not 0. Default: the
            field `weights`, if the datums have it; if it has negative numbers, it only excludes the positions where
            it is 0. None: no mask.
    """

    weights_are_factors: ClassVar[bool] = True
    """False if a weight only excludes or keeps a position."""
    weights_have_signs: ClassVar[bool] = False
    """True if negative weights are factors too."""
    mask_is_optional: ClassVar[bool] = False
    """True if a mask that no datum has is no mask. These terms always used `weights` by default."""
    had_no_default_mask: ClassVar[bool] = True
    """True if earlier versions of the term counted every position by default."""

    reduction: Reduction = "sum"
    mask: Mask = DefaultMask.WEIGHTS
    total: Positive | None = field(default=None, metadata=ADDED)
    length: Positive | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.reduction == "constant") != (self.length is not None):
            raise self.invalid(
                "reduction='constant' needs length=<tokens per datum>, and the other reductions have none, got "
                f"reduction={self.reduction!r} and length={self.length!r}"
            )
        if self.total is None:
            return
        if self.reduction == "sum":
            raise self.invalid("total is what a mean divides by, and reduction='sum' is no mean: remove total")
        if self.coupling is not None:
            raise self.invalid(f"total is for parts of a larger batch, but {self.coupling}: remove total")

    def positions(
        self, data: Sequence[Datum], logprobs: torch.Tensor, *, by_row: bool = False, by_datum: bool = False
    ) -> Positions:
        """Selects positions with the mask of this term."""
        by_datum = by_datum or self.reduction in _OVER_DATUMS
        weights = self._weights(data, logprobs, by_row=by_row)
        positions = Positions.of(data, logprobs, weights=weights, by_row=by_row, by_datum=by_datum)
        return replace(positions, total=self.total, length=self.length) if self.reduction != "sum" else positions

    def counted(self, data: Sequence[Datum], logprobs: torch.Tensor) -> Positions:
        """Selects what a mean of this term counts."""
        return self.positions(data, logprobs)

    def _total_of(self, data: Sequence[Datum]) -> float | None:
        """Returns the tokens of these datums for a mean over tokens, and their number for a mean over datums.

        Datums without a selected position do not count. None for a sum.
        """
        if self.reduction == "sum":
            return None
        zeros = _zeros(data)
        positions = self.counted(data, zeros)
        _, counts = positions.reduce(positions.select(zeros), self.reduction)
        return counts["tokens" if self.reduction in _OVER_TOKENS else "sequences"]

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Returns the term with some settings replaced; it counts as the same term for warnings."""
        replaced = super().with_options(options)
        vars(replaced)["_warned"] = self._warned
        return replaced

    def settings(self) -> dict[str, Any]:
        """Returns the keyword arguments that create an equal term, without a default mask: all are plain values."""
        settings = super().settings()
        if isinstance(self.mask, DefaultMask):
            del settings["mask"]
        return settings

    def check_sampled(self, data: Sequence[Datum], logprobs: torch.Tensor, instead: str) -> None:
        """Raises InvalidData for packed `[T, K]`, whose numbers are not those of sampled tokens."""
        if data and logprobs.ndim > 1:
            raise InvalidData(
                f"{type(self).__name__} needs sampled tokens, one number per position, but the logprobs have shape "
                f"{tuple(logprobs.shape)}: {instead}"
            )

    def _weights(self, data: Sequence[Datum], logprobs: torch.Tensor, *, by_row: bool) -> torch.Tensor | None:
        """Returns the weight of each position, flat; None if all have weight 1."""
        is_default = isinstance(self.mask, DefaultMask)
        name = self.mask.value if isinstance(self.mask, DefaultMask) else self.mask
        if name is None or ((is_default or self.mask_is_optional) and not has_field(data, name)):
            return None
        weights = self._checked_mask(data, name, logprobs, is_default=is_default)
        at_positions = _at_positions(weights, logprobs, by_row=by_row)
        had_none = self.had_no_default_mask and not self.mask_is_optional
        if is_default and had_none and not bool((at_positions == 1).all()):
            self._warn(
                FutureWarning,
                "no mask= is given, so 'weights' of the datums is the mask: 0 leaves a position out, other numbers "
                "are factors. Earlier versions counted every position with weight 1: pass mask=None for that result, "
                "or mask='weights' (numbers >= 0) for this one without the warning",
            )
        return at_positions

    def _checked_mask(
        self, data: Sequence[Datum], name: str, logprobs: torch.Tensor, *, is_default: bool
    ) -> torch.Tensor:
        """Returns the mask, `[N]` or in the shape of the logprobs, with signs only where they have a meaning."""
        weights = aligned_field(data, name, logprobs, per_position=True)
        has_signs = bool((weights < 0).any())
        if (has_signs and not is_default) or not bool(torch.isfinite(weights).all()):
            raise _bad_mask(data, name, smallest=-inf if is_default else 0)
        if not has_signs:
            return weights if self.weights_are_factors else (weights != 0).to(weights.dtype)
        if not self.weights_have_signs:
            self._warn(
                UserWarning,
                "'weights' has negative numbers, which are no mask: positions of weight 0 are left out, all others "
                "count with weight 1. Name a field of numbers >= 0 as mask=, or pass mask=None to count every position",
            )
            return (weights != 0).to(weights.dtype)
        if self.reduction != "sum":
            raise InvalidData(
                f"{type(self).__name__}: 'weights' has negative numbers, and reduction={self.reduction!r} would divide "
                "by their sum: pass reduction='sum', or a mask= of numbers >= 0"
            )
        return weights

    @cached_property
    def _warned(self) -> set[type[Warning]]:
        return set()

    def _warn(self, category: type[Warning], text: str) -> None:
        if category not in self._warned:
            warnings.warn(f"{type(self).__name__} {self.name!r}: {text}", category, stacklevel=2)
            self._warned.add(category)


def _zeros(data: Sequence[Datum]) -> torch.Tensor:
    """Returns zeros in the shape of the packed logprobs of some datums."""
    shapes = [target_shape(datum, index) for index, datum in enumerate(data)]
    return torch.zeros(sum(shape[0] for shape in shapes), *(shapes[0][1:] if shapes else ()))


def _at_positions(weights: torch.Tensor, logprobs: torch.Tensor, *, by_row: bool) -> torch.Tensor:
    """Returns weights of the shape `[N]` or that of the logprobs as one number per position, flat."""
    if weights.ndim < logprobs.ndim:
        return weights.repeat_interleave(logprobs.shape[1 : -1 if by_row else None].numel())
    if by_row:
        weights = (weights != 0).any(-1).to(weights.dtype)
    return weights.reshape(-1)


def _bad_mask(data: Sequence[Datum], name: str, *, smallest: float) -> InvalidData:
    """Returns the error about the first number of a mask that is not finite, or less than `smallest`."""
    arrays = [datum.loss_fn_inputs[name].to_numpy() for datum in data]
    index, bad = next(
        (i, array[bad]) for i, array in enumerate(arrays) if (bad := ~(np.isfinite(array) & (array >= smallest))).any()
    )
    bound = "" if smallest == -inf else f" >= {smallest:g}"
    return InvalidData(f"the mask {name!r} must contain finite numbers{bound}, but datum {index} has {bad.flat[0]}")
