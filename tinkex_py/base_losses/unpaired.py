"""KTO: a loss on single answers, each of which is desirable or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tinkex_py.errors import InvalidData
from tinkex_py.losses.output import TOTAL_METRIC
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.ready_made import NonEmptyStr, NonNegative, Positive
from tinkex_py.terms.reference import ReferenceTerm
from tinkex_py.types import Datum
from tinkex_py.types.datum import number_of
from tinkex_py.values import Number

_LABELS = (1.0, -1.0, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class KTO(ReferenceTerm):
    """Kahneman-Tversky optimization: makes desirable answers likelier and undesirable ones less likely, without pairs.

    With h the sum of `w * (p - q)` over a datum, p the model's and q the reference's logprobs, w the mask, z0 the
    reference point, and `u = beta * (h - z0)` for a desirable answer, `u = beta * (z0 - h)` for an undesirable one:

    - formula: for each datum with label 1 `desirable_weight * (1 - sigmoid(u))`, with label -1
      `undesirable_weight * (1 - sigmoid(u))`; then the mean or sum over these datums
    - gradient: `-beta * w * sigmoid(u) * (1 - sigmoid(u))` times the weight for a desirable answer, the opposite for an
      undesirable one, divided by the number of datums for the mean
    - shapes: `[N]`
    - units: none

    The reference point estimates the KL divergence from the reference: the mean of h over datums with label 0, at least
    0, without a gradient. These are mismatched: the prompt of one datum with the answer of another. They must be in the
    same call as the others. Or pass the number itself, such as the metric of the last step.

    Metrics: `reference_point`; `desirable_reward` and `undesirable_reward`, the means of `beta * h`, if there are such
    datums; `sequences`, the datums with label 1 or -1.

    Source: K. Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization".

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over datums.
        mask: as in `DPO`.
        reference: as in `DPO`.
        reference_field: as in `DPO`. Exactly one of `reference` and `reference_field` is required.
        beta: strength of the pull to the reference, > 0.
        desirable_weight: factor of the desirable answers, >= 0.
        undesirable_weight: factor of the undesirable answers, >= 0.
        label_field: a field with one number per datum: 1 desirable, -1 undesirable, 0 mismatched.
        reference_point: z0. None: from the datums with label 0. 0 is TRL's `apo_zero_unpaired`.
    """

    mask_is_optional: ClassVar[bool] = True

    name: NonEmptyStr = "kto"
    reduction: Literal["mean", "sum"] = "mean"
    beta: Positive = 0.1
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0
    label_field: NonEmptyStr = "label"
    reference_point: Number | None = None

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss and its metrics."""
        self.check_sampled(data, logprobs, "pass [T] targets")
        labels = logprobs.new_tensor(self._labels(data))
        positions = self.positions(data, logprobs, by_datum=True)
        difference = positions.select(logprobs) - self._select_reference(positions, reference, data)
        scores = positions.sums(positions.weighted(difference))
        counted = labels != 0
        point = self._reference_point(scores[~counted].detach())
        scores, labels = scores[counted], labels[counted]
        factors = torch.where(labels > 0, self.desirable_weight, self.undesirable_weight)
        losses = factors * torch.sigmoid(-self.beta * labels * (scores - point))
        rewards = self.beta * scores.detach()
        sides = {"desirable_reward": rewards[labels > 0], "undesirable_reward": rewards[labels < 0]}
        count = float(losses.numel())
        return losses.sum() / (1.0 if self.reduction == "sum" else self.total or count), {
            **({} if self.total is None else {TOTAL_METRIC: self.total}),
            "reference_point": point,
            **{name: side.mean() for name, side in sides.items() if side.numel()},
            "sequences": count,
        }

    @property
    def coupling(self) -> str | None:
        """The mismatched datums decide the loss of all others."""
        return None if self.reference_point is not None else "the reference point is a mean over the mismatched datums"

    @property
    def surrogate(self) -> str | None:
        """The reference point is a constant."""
        return None if self.reference_point is not None else "the reference point is a constant"

    def _total_of(self, data: Sequence[Datum]) -> float | None:
        return None if self.reduction == "sum" else float(sum(map(bool, self._labels(data))))

    def _labels(self, data: Sequence[Datum]) -> list[float]:
        labels = [number_of(datum, index, self.label_field) for index, datum in enumerate(data)]
        for index, label in enumerate(labels):
            if label not in _LABELS:
                raise InvalidData(
                    f"{self.label_field!r} of datum {index} is {label:g}: KTO needs 1 for a desirable answer, -1 for "
                    "an undesirable one, 0 for a mismatched one"
                )
        if not any(labels):
            raise InvalidData(f"KTO needs at least one datum whose {self.label_field!r} is 1 or -1, got {len(labels)}")
        return labels

    def _reference_point(self, mismatched: torch.Tensor) -> float:
        if self.reference_point is not None:
            return self.reference_point
        if not mismatched.numel():
            raise InvalidData(
                f"KTO has no reference point: add datums whose {self.label_field!r} is 0, the prompt of one datum with "
                "the answer of another, or pass reference_point="
            )
        return max(0.0, float(mismatched.mean().item()))
