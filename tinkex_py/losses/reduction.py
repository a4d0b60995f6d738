"""From one number per position to one loss.

The names are those of the reinforcement learning library verl (its `agg_loss`): they differ in what a long datum
weighs against a short one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tinkex_py.errors import InvalidData
from tinkex_py.losses.logprobs import packed_field
from tinkex_py.types import Datum
from tinkex_py.types.datum import target_shape

Reduction = Literal["sum", "mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


@dataclass(frozen=True)
class Positions:
    """The positions that count, of all positions of packed logprobs.

    Positions outside the mask are left out before any arithmetic, so that not even an infinite logprob there
    reaches the loss or its gradient.

    Attributes:
        kept: their indices, `[M]`; None if all count.
        weights: what each counts, `[M]`; None if each counts 1.
        sequences: index of the datum that each belongs to, `[M]`; None if there is only one.
        sequence_count: number of datums.
    """

    kept: torch.Tensor | None
    weights: torch.Tensor | None
    sequences: torch.Tensor | None
    sequence_count: int

    @classmethod
    def of(cls, data: Sequence[Datum], logprobs: torch.Tensor, mask: str | None = None) -> "Positions":
        """The positions of packed logprobs, or of a tensor given directly.

        Args:
            data: the datums; none makes the whole tensor one sequence.
            logprobs: `[N]`, `[N, K]`, or any shape.
            mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 leaves the position out, any other
                number is its weight (of `[T, K]`, a position counts 1 if any of its entries is not 0).

        Raises:
            InvalidData: a datum lacks the mask, or the lengths do not add up.
        """
        lengths = [target_shape(datum, index)[0] for index, datum in enumerate(data)]
        count = logprobs.shape[0] if logprobs.ndim else 1
        if data and sum(lengths) != count:
            raise InvalidData(
                f"target_tokens of {len(data)} datums cover {sum(lengths)} positions, "
                f"but the logprobs have shape {tuple(logprobs.shape)}"
            )
        sequences = None
        if len(lengths) > 1:
            sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        if mask is None:
            return cls(None, None, sequences, max(1, len(lengths)))
        weights = position_weights(data, mask, count)
        kept = weights.nonzero().reshape(-1)
        return cls(
            kept,
            weights[kept].to(logprobs.dtype),
            None if sequences is None else sequences[kept],
            max(1, len(lengths)),
        )

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of `values` that count; the first axis is that of the positions."""
        plain = values.as_subclass(torch.Tensor)
        return plain if self.kept is None else plain.index_select(0, self.kept)

    def reduce(self, values: torch.Tensor, reduction: Reduction) -> tuple[torch.Tensor, dict[str, float]]:
        """One loss, and its denominator as a metric.

        - `sum`: `sum(w * v)`
        - `token-mean` (or `mean`): `sum(w * v) / sum(w)`
        - `seq-mean-token-sum`: mean over datums of their `sum(w * v)`
        - `seq-mean-token-mean`: mean over datums of their `sum(w * v) / sum(w)`

        Datums without any position that counts do not enter a mean over datums. No position at all gives 0.

        Args:
            values: `[M]`, or `[M, ...]` where every element counts with its position's weight.
            reduction: how.
        """
        if self.weights is None:
            weights, weighted = None, values
        else:
            weights = self.weights.reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
            weighted = values * weights
        tokens = float(values.numel() if weights is None else weights.sum())
        if reduction == "sum":
            return weighted.sum(), {"tokens": tokens}
        if reduction in ("mean", "token-mean"):
            return weighted.sum() / (tokens or 1.0), {"tokens": tokens}
        sums = self._per_sequence(weighted)
        per_sequence = self._per_sequence(torch.ones_like(values, requires_grad=False) if weights is None else weights)
        counted = per_sequence != 0
        sequences = int(counted.sum())
        if reduction == "seq-mean-token-mean":
            sums = sums / torch.where(counted, per_sequence, torch.ones_like(per_sequence))
        return sums.sum() / max(1, sequences), {"tokens": tokens, "sequences": float(sequences)}

    def _per_sequence(self, values: torch.Tensor) -> torch.Tensor:
        if self.sequences is None:
            return values.sum().reshape(1)
        rows = values.reshape(values.shape[0], -1).sum(1)
        return torch.zeros(self.sequence_count, dtype=rows.dtype).index_add(0, self.sequences, rows)


def position_weights(data: Sequence[Datum], mask: str, count: int) -> torch.Tensor:
    """The mask's number for each position, `[count]`.

    Raises:
        InvalidData: a datum lacks the field, or it has another length than the logprobs.
    """
    weights = packed_field(data, mask)
    if bool((weights < 0).any()):
        raise InvalidData(f"the mask {mask!r} must hold numbers >= 0, got {float(weights.min())}")
    if weights.shape[0] != count:
        raise InvalidData(f"the mask {mask!r} covers {weights.shape[0]} positions, the logprobs {count}")
    if weights.ndim > 1:
        return (weights.reshape(count, -1) != 0).any(1).float()
    return weights
