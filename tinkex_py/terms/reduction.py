"""Masks and reductions: from one number per position to one loss.

The reductions have the names of verl's `agg_loss`. They differ in the influence of a long datum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import torch

from tinkex_py.errors import InvalidData
from tinkex_py.terms.fields import aligned_field, datum_lengths, has_field
from tinkex_py.terms.numerics import segment_sum
from tinkex_py.terms.ready_made import NonEmptyStr, ReadyMadeTerm
from tinkex_py.types import Datum

Reduction = Literal["sum", "mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


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
    """

    rows: int | None
    kept: torch.Tensor | None
    weights: torch.Tensor | None
    sequences: torch.Tensor | None
    sequence_count: int

    @classmethod
    def of(
        cls,
        data: Sequence[Datum],
        logprobs: torch.Tensor,
        *,
        mask: str | None = None,
        by_row: bool = False,
        by_datum: bool = False,
    ) -> "Positions":
        """Selects positions of packed logprobs, or of a tensor given directly.

        Args:
            data: the datums; if there are none, the whole tensor is one sequence.
            logprobs: `[N]`, `[N, K]`, or any shape.
            mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`. 0 excludes a position; any other number
                is its weight. A row of `[T, K]` has weight 1 if any of its numbers is not 0.
            by_row: the last axis is one position.
            by_datum: keep the datum of each position, for sums per datum.

        Raises:
            InvalidData: a datum lacks the mask, or shapes do not match.
        """
        rows = logprobs.shape[-1] if by_row else None
        leading = logprobs.shape[:-1] if by_row else logprobs.shape
        each = leading[1:].numel()  # positions per entry of the first axis
        sequences = None
        if by_datum and len(data) > 1:
            lengths = torch.tensor(datum_lengths(data, leading[0] if leading else 1)) * each
            sequences = torch.repeat_interleave(torch.arange(len(data)), lengths).to(logprobs.device)
        count = len(data) if by_datum and data else 1
        if mask is None:
            return cls(rows, None, None, sequences, count)
        weights = _mask(data, mask, logprobs, by_row=by_row)
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

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """Returns each value times its weight, `[M]`."""
        return values if self.weights is None else values * self.weights

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the unweighted sum of `[M]` over each datum, `[datums]`."""
        return segment_sum(values, self.sequences, self.sequence_count)

    def sizes(self, like: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the weights of each datum, `[datums]`, in the dtype of `like`, `[M]`."""
        return self.sums(like.detach().new_ones(like.shape) if self.weights is None else self.weights)

    def reduce(self, values: torch.Tensor, reduction: Reduction) -> tuple[torch.Tensor, dict[str, float]]:
        """Reduces values to one loss, and returns its denominators as metrics.

        The values are `[M]`, or `[M, K]`, whose rows are summed first.

        - `sum`: `sum(w * v)`
        - `token-mean`, or `mean`: `sum(w * v) / sum(w)`
        - `seq-mean-token-sum`: mean over datums of their `sum(w * v)`
        - `seq-mean-token-mean`: mean over datums of their `sum(w * v) / sum(w)`

        Datums without a selected position do not enter a mean over datums. The loss of no position is 0.
        """
        if values.ndim > 1:
            values = values.sum(-1)
        weighted = self.weighted(values)
        tokens = float(values.numel() if self.weights is None else self.weights.sum().item())
        if reduction == "sum":
            return weighted.sum(), {"tokens": tokens}
        if reduction in ("mean", "token-mean"):
            return weighted.sum() / (tokens or 1.0), {"tokens": tokens}
        sums, sizes = self.sums(weighted), self.sizes(values)
        counted = sizes != 0
        sequences = int(counted.sum().item())
        if reduction == "seq-mean-token-mean":
            sums = sums / torch.where(counted, sizes, 1.0)
        return sums.sum() / max(1, sequences), {"tokens": tokens, "sequences": float(sequences)}


@dataclass(frozen=True, kw_only=True)
class ReducedTerm(ReadyMadeTerm):
    """A ready-made term with one number per position.

    Args:
        name: default name of the regularizer.
        reduction: see `Positions.reduce`.
        mask: see `Positions.of`; None selects everything with weight 1.
    """

    reduction: Reduction = "sum"
    mask: NonEmptyStr | None = None

    def positions(
        self,
        data: Sequence[Datum],
        logprobs: torch.Tensor,
        *,
        by_row: bool = False,
        by_datum: bool = False,
        mask_optional: bool = False,
    ) -> Positions:
        """Selects positions with the mask of this term; with `mask_optional` all of them if no datum has it."""
        mask = self.mask
        if mask is not None and mask_optional and not has_field(data, mask):
            mask = None
        by_datum = by_datum or self.reduction.startswith("seq-")
        return Positions.of(data, logprobs, mask=mask, by_row=by_row, by_datum=by_datum)

    def check_sampled(self, data: Sequence[Datum], logprobs: torch.Tensor, instead: str) -> None:
        """Raises InvalidData for packed `[T, K]`, whose numbers are not those of sampled tokens."""
        if data and logprobs.ndim > 1:
            raise InvalidData(
                f"{type(self).__name__} needs sampled tokens, one number per position, but the logprobs have shape "
                f"{tuple(logprobs.shape)}: {instead}"
            )


def _mask(data: Sequence[Datum], name: str, logprobs: torch.Tensor, *, by_row: bool) -> torch.Tensor:
    weights = aligned_field(data, name, logprobs, per_position=True)
    if weights.numel():
        smallest, largest = weights.aminmax()
        if not (smallest.item() >= 0 and largest.item() < inf):  # NaN fails both
            raise _bad_mask(data, name)
    if weights.ndim < logprobs.ndim:
        return weights.repeat_interleave(logprobs.shape[1 : -1 if by_row else None].numel())
    if by_row:
        weights = (weights != 0).any(-1).to(weights.dtype)
    return weights.reshape(-1)


def _bad_mask(data: Sequence[Datum], name: str) -> InvalidData:
    arrays = [datum.loss_fn_inputs[name].to_numpy() for datum in data]
    index, bad = next(
        (i, array[bad]) for i, array in enumerate(arrays) if (bad := ~((array >= 0) & (array < inf))).any()
    )
    return InvalidData(f"the mask {name!r} must contain finite numbers >= 0, but datum {index} has {bad.flat[0]}")
