"""From one number per position to one loss.

The names of the reductions are those of the reinforcement learning library verl (its `agg_loss`): they differ in what
a long datum weighs against a short one.
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
from tinkex_py.terms.ready_made import ReadyMadeTerm
from tinkex_py.types import Datum

Reduction = Literal["sum", "mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


@dataclass(frozen=True)
class Positions:
    """What counts, of a tensor of logprobs: single numbers, or rows over its last axis.

    What the mask leaves out is left out before any arithmetic, so that not even an infinite logprob there reaches the
    loss or its gradient.

    Attributes:
        rows: K, if each position is a row of K numbers; None if each number counts for itself.
        kept: indices of those that count, `[M]`; None if all do.
        weights: what each counts, `[M]`; None if each counts 1.
        sequences: index of the datum that each belongs to, `[M]`; None if there is only one, or it was not asked for.
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
        """The positions of packed logprobs, or of a tensor given directly.

        Args:
            data: the datums; none makes the whole tensor one sequence.
            logprobs: `[N]`, `[N, K]`, or any shape.
            mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`: 0 leaves out, any other number is a
                weight. Of `[T, K]` a row counts 1 if any of its numbers is not 0.
            by_row: the last axis makes one position.
            by_datum: sums per datum will be asked for.

        Raises:
            InvalidData: a datum lacks the mask, or shapes do not fit.
        """
        rows = logprobs.shape[-1] if by_row else None
        leading = logprobs.shape[:-1] if by_row else logprobs.shape
        each = leading[1:].numel()  # how many positions of ours belong to one entry of the first axis
        sequences = None
        if by_datum and len(data) > 1:
            lengths = torch.tensor(datum_lengths(data, leading[0] if leading else 1)) * each
            sequences = torch.repeat_interleave(torch.arange(len(data)), lengths).to(logprobs.device)
        count = len(data) if by_datum and data else 1
        if mask is None:
            return cls(rows, None, None, sequences, count)
        weights = _mask(data, mask, logprobs, by_row=by_row)
        # numpy's is ten times faster than torch's nonzero
        kept = torch.from_numpy(np.flatnonzero((weights != 0).cpu().numpy()))  # pyright: ignore[reportUnknownMemberType]
        kept = kept.to(logprobs.device)
        if kept.numel() < weights.numel():
            weights = weights.index_select(0, kept)
            sequences = None if sequences is None else sequences.index_select(0, kept)
        else:
            kept = None
        return cls(rows, kept, None if bool((weights == 1).all()) else weights, sequences, count)

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """Those of `values` that count: `[M]`, or `[M, K]` by row. `values` has the shape of the logprobs."""
        plain = values.as_subclass(torch.Tensor)
        flat = plain.reshape(-1) if self.rows is None else plain.reshape(-1, self.rows)
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """`[M]`: each value times what it counts."""
        return values if self.weights is None else values * self.weights

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `[M]` over each datum, `[datums]`; `values` are taken as they are."""
        return segment_sum(values, self.sequences, self.sequence_count)

    def sizes(self, like: torch.Tensor) -> torch.Tensor:
        """What each datum's positions count together, `[datums]`; in the dtype of `like`, `[M]`."""
        return self.sums(like.detach().new_ones(like.shape) if self.weights is None else self.weights)

    def reduce(self, values: torch.Tensor, reduction: Reduction) -> tuple[torch.Tensor, dict[str, float]]:
        """One loss, and its denominators as metrics.

        - `sum`: `sum(w * v)`
        - `token-mean`, or `mean`: `sum(w * v) / sum(w)`
        - `seq-mean-token-sum`: mean over datums of their `sum(w * v)`
        - `seq-mean-token-mean`: mean over datums of their `sum(w * v) / sum(w)`

        Datums without any position that counts do not enter a mean over datums. No position at all gives 0.

        Args:
            values: one per position, `[M]`.
            reduction: how.
        """
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
        name: the regularizer's name, if its spec gives none.
        reduction: how the numbers become one loss, see `Positions.reduce`.
        mask: a `loss_fn_inputs` field that says what counts, see `Positions.of`; None counts everything once.
    """

    reduction: Reduction = "sum"
    mask: str | None = None

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_choice("reduction", REDUCTIONS)
        self._check_text("mask", optional=True)

    def positions(
        self,
        data: Sequence[Datum],
        logprobs: torch.Tensor,
        *,
        by_row: bool = False,
        by_datum: bool = False,
        mask_optional: bool = False,
    ) -> Positions:
        """The positions that count under this term's mask; with `mask_optional` all of them if no datum has it."""
        mask = self.mask
        if mask is not None and mask_optional and not has_field(data, mask):
            mask = None
        by_datum = by_datum or self.reduction.startswith("seq-")
        return Positions.of(data, logprobs, mask=mask, by_row=by_row, by_datum=by_datum)

    def _check_sampled(self, data: Sequence[Datum], logprobs: torch.Tensor, instead: str) -> None:
        """Raises InvalidData on packed `[T, K]`, whose numbers are not those of sampled tokens."""
        if data and logprobs.ndim > 1:
            raise InvalidData(
                f"{type(self).__name__} is for sampled tokens, one number per position, but the logprobs have shape "
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
    return InvalidData(f"the mask {name!r} must hold numbers >= 0, but datum {index} has {bad.flat[0]}")
