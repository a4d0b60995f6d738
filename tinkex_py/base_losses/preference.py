"""Learning from pairs of answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from tinkex_py.errors import InvalidData
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.reduction import Reduction
from tinkex_py.terms.reference import ReferenceTerm
from tinkex_py.types import Datum


@dataclass(frozen=True, kw_only=True, eq=False)
class DPO(ReferenceTerm):
    """Direct preference optimization: makes chosen answers likelier than rejected ones, relative to a reference.

    The datums come in pairs: chosen, rejected, chosen, rejected, and so on. With `R = beta * sum(w * (p - q))` the
    reward of a datum, p the model's and q the reference's logprobs, w the mask, and `z = R(chosen) - R(rejected)`:

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
        name: the term's name, if it is used as a regularizer and its spec gives none.
        reduction: "mean" or "sum" over pairs.
        mask: a `loss_fn_inputs` field, `[T]`, that is 0 on the prompt. Data without it counts fully; but all datums
            must have it or none. None ignores the data.
        reference: a tensor of the logprobs' shape, or a function `reference(data)`, sync or async, that gives them
            packed, as one tensor per datum, or as the result of a client's `forward`.
        reference_field: a `loss_fn_inputs` field of every datum, `[T]`. Exactly one of `reference` and
            `reference_field` is given.
        beta: how strongly the model is held to the reference, > 0.
        label_smoothing: share of pairs taken to be labelled the wrong way round, from 0 to 0.5.
    """

    name: str = "dpo"
    reduction: Reduction = "mean"
    mask: str | None = "weights"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_choice("reduction", ("mean", "sum"))
        self._check_number("beta", above=0)
        self._check_number("label_smoothing", at_least=0, at_most=0.5)

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula."""
        self._check_sampled(data, logprobs, "give [T] targets")
        if not data or len(data) % 2:
            raise InvalidData(f"DPO needs datums in pairs (chosen, rejected, chosen, rejected, ...), got {len(data)}")
        positions = self.positions(data, logprobs, by_datum=True, mask_optional=True)
        difference = positions.select(logprobs) - positions.select(reference)
        rewards = self.beta * positions.sums(positions.weighted(difference))
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = chosen - rejected
        losses = softplus(-margins)
        if self.label_smoothing:
            losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * softplus(margins)
        return (losses.mean() if self.reduction == "mean" else losses.sum()), {
            "accuracy": (margins > 0).float().mean(),
            "margin": margins.detach().mean(),
            "chosen_reward": chosen.detach().mean(),
            "rejected_reward": rejected.detach().mean(),
            "pairs": float(len(data) // 2),
        }
