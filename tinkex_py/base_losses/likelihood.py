"""Losses on given answers: maximum likelihood and preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import softplus

from tinkex_py.errors import InvalidData
from tinkex_py.losses.output import TOTAL_METRIC
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.ready_made import NonEmptyStr, Positive
from tinkex_py.terms.reduction import ReducedTerm
from tinkex_py.terms.reference import ReferenceTerm
from tinkex_py.types import Datum
from tinkex_py.values import Number


@dataclass(frozen=True, kw_only=True)
class NLL(ReducedTerm):
    """Negative log-likelihood of the target tokens.

    With x the logprobs and w the weights:

    - formula: `reduce(-x)`; by default `-sum(w * x)`, the services' `cross_entropy`
    - gradient: `-w`, divided by the denominator of the reduction
    - shapes: `[N]`, `[N, K]`, or any shape with `data=[]`
    - units: nats

    Source: the Tinker API's `cross_entropy`.

    Args:
        name: default name, for use as a regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field, `[T]` or `[T, K]`, of numbers >= 0. If no datum has it, all positions have
            weight 1, as on the services. Default: `weights`, which may also be negative with reduction "sum". None: no
            mask.
    """

    weights_have_signs: ClassVar[bool] = True
    mask_is_optional: ClassVar[bool] = True

    name: NonEmptyStr = "nll"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        positions = self.positions(data, logprobs)
        return positions.reduce(-positions.select(logprobs), self.reduction)


@dataclass(frozen=True, kw_only=True, eq=False)
class DPO(ReferenceTerm):
    """Direct preference optimization: makes chosen answers likelier than rejected ones, relative to a reference.

    The datums are pairs: chosen, rejected, chosen, rejected, and so on. With `R = beta * sum(w * (p - q))` the reward
    of a datum, p the model's and q the reference's logprobs, w the mask, and `z = R(chosen) - R(rejected)`:

    - formula: for each pair `-log sigmoid(z)`; with label smoothing e
      `-(1 - e) * log sigmoid(z) - e * log sigmoid(-z)`; then the mean or sum over pairs
    - gradient: `-beta * w * (sigmoid(-z) - e)` for the chosen datum, the opposite for the rejected one, divided by the
      number of pairs for the mean
    - shapes: `[N]`
    - units: nats

    Metrics: `accuracy`, the share of pairs with `z > 0`; `margin`, the mean of z; `chosen_reward` and
    `rejected_reward`, their means; `pairs`.

    Source: R. Rafailov et al., "Direct Preference Optimization" (equation 7); label smoothing: E. Mitchell, "A Note on
    DPO with Noisy Preferences".

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: a `loss_fn_inputs` field, `[T]`, that is 0 on the prompt. If no datum has it, all positions have weight 1.
            Default: `weights`; None: no mask.
        reference: a tensor in the shape of the logprobs, or a function `reference(data)`, sync or async, that returns
            them packed, as one tensor per datum, or as the result of a client's `forward`.
        reference_field: a `loss_fn_inputs` field of every datum, `[T]`. Exactly one of `reference` and
            `reference_field` is required.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: assumed share of pairs with swapped labels, from 0 to 0.5.
    """

    mask_is_optional: ClassVar[bool] = True

    name: NonEmptyStr = "dpo"
    reduction: Literal["mean", "sum"] = "mean"
    beta: Positive = 0.1
    label_smoothing: Annotated[Number, Field(ge=0, le=0.5)] = 0.0

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss and its metrics."""
        self.check_sampled(data, logprobs, "pass [T] targets")
        if not data or len(data) % 2:
            raise InvalidData(f"DPO needs datums in pairs (chosen, rejected, chosen, rejected, ...), got {len(data)}")
        positions = self.positions(data, logprobs, by_datum=True)
        difference = positions.select(logprobs) - self._select_reference(positions, reference, data)
        rewards = self.beta * positions.sums(positions.weighted(difference))
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = chosen - rejected
        losses = softplus(-margins)
        if self.label_smoothing:
            losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * softplus(margins)
        pairs = float(len(data) // 2)
        metrics = {} if self.total is None else {TOTAL_METRIC: self.total}
        return losses.sum() / (1.0 if self.reduction == "sum" else self.total or pairs), {
            **metrics,
            "accuracy": (margins > 0).float().mean(),
            "margin": margins.detach().mean(),
            "chosen_reward": chosen.detach().mean(),
            "rejected_reward": rejected.detach().mean(),
            "pairs": pairs,
        }

    def _total_of(self, data: Sequence[Datum]) -> float | None:
        return None if self.reduction == "sum" else len(data) / 2
