"""Losses on pairs of answers, relative to a reference: DPO and its variants."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch.nn.functional import softplus

from tinkex_py.terms.pairs import Answers, PairLosses, ReferencedPairTerm
from tinkex_py.terms.ready_made import ADDED, NonEmptyStr, NonNegative, Positive
from tinkex_py.values import Number


@dataclass(frozen=True, kw_only=True, eq=False)
class DPO(ReferencedPairTerm):
    """Direct preference optimization: makes chosen answers likelier than rejected ones, relative to a reference.

    The datums are pairs: chosen, rejected, chosen, rejected, and so on. With `R = beta * sum(w * (p - q))` the reward
    of a datum, p the model's and q the reference's logprobs, w the mask, and `z = R(chosen) - R(rejected)`:

    - formula: for each pair `-log sigmoid(z)`; with label smoothing e
      `-(1 - e) * log sigmoid(z) - e * log sigmoid(-z)`; robust
      `(-(1 - e) * log sigmoid(z) + e * log sigmoid(-z)) / (1 - 2 * e)`; then the mean or sum over pairs
    - gradient: `-beta * w * (sigmoid(-z) - e)` for the chosen datum, the opposite for the rejected one; robust with
      `(1 - e) * sigmoid(-z) + e * sigmoid(z)` over `1 - 2 * e` in place of the bracket; divided by the number of pairs
      for the mean
    - shapes: `[N]`
    - units: nats

    Metrics: `accuracy`, the share of pairs with `z > 0`; `margin`, the mean of z; `chosen_reward` and
    `rejected_reward`, the means of R; `chosen_logprob` and `rejected_logprob`, the means of `sum(w * p)`; `pairs`.

    Source: R. Rafailov et al., "Direct Preference Optimization" (equation 7); label smoothing: E. Mitchell, "A Note on
    DPO with Noisy Preferences"; robust: S. R. Chowdhury et al., "Provably Robust DPO".

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: a `loss_fn_inputs` field, `[T]`, that is 0 on the prompt. If no datum has it, all positions have weight 1.
            Default: `weights`; None: no mask.
        pair_field: a field with one whole number per datum, n for the chosen and -n for the rejected answer of pair
            n >= 1, in any order. Default: the datums are pairs in a row.
        reference: a tensor in the shape of the logprobs, or a function `reference(data)`, sync or async, that returns
            them packed, as one tensor per datum, or as the result of a client's `forward`.
        reference_field: a `loss_fn_inputs` field of every datum, `[T]`. Exactly one of `reference` and
            `reference_field` is required.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: assumed share of pairs with swapped labels, from 0 to 0.5.
        robust: an unbiased estimate of the loss without swapped labels, which can be negative. Needs a
            `label_smoothing` below 0.5.
    """

    name: NonEmptyStr = "dpo"
    beta: Positive = 0.1
    label_smoothing: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    robust: bool = field(default=False, metadata=ADDED)

    def check(self) -> None:
        """Raises InvalidSpec if the settings contradict each other."""
        super().check()
        if self.robust and self.label_smoothing == 0.5:
            raise self.invalid("robust=True divides by 1 - 2 * label_smoothing, got label_smoothing=0.5: pass less")

    def _reward(self, answers: Answers) -> torch.Tensor:
        return self.beta * answers.score

    def _losses(self, chosen: Answers, rejected: Answers) -> PairLosses:
        margins = self._reward(chosen) - self._reward(rejected)
        losses, share = softplus(-margins), self.label_smoothing
        if self.robust:
            return ((1.0 - share) * losses - share * softplus(margins)) / (1.0 - 2.0 * share), {}
        if share:
            losses = (1.0 - share) * losses + share * softplus(margins)
        return losses, {}


@dataclass(frozen=True, kw_only=True, eq=False)
class IPO(ReferencedPairTerm):
    """Identity preference optimization: pulls the difference of an answer pair to a target, and not beyond it.

    The datums are pairs, as for `DPO`. With h the mean of `p - q` over the tokens of an answer, p the model's and q the
    reference's logprobs, weighted with the mask w, and `d = h(chosen) - h(rejected)`:

    - formula: for each pair `(d - 1 / (2 * beta))**2`, then the mean or sum over pairs
    - gradient: `2 * (d - 1 / (2 * beta)) * w / sum(w)` for the chosen datum, the opposite for the rejected one, divided
      by the number of pairs for the mean
    - shapes: `[N]`
    - units: nats squared

    Metrics: those of `DPO`, with the reward `beta * h`.

    Source: M. G. Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences" (equation
    17, whose tau is beta). The paper's equation has sums over the tokens; its authors confirmed means, as in TRL.

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: as in `DPO`.
        pair_field: as in `DPO`.
        reference: as in `DPO`.
        reference_field: as in `DPO`. Exactly one of `reference` and `reference_field` is required.
        beta: strength of the pull to the reference, > 0: a larger one makes the target smaller.
        normalize: h is the mean over the tokens of an answer; False: the sum.
    """

    name: NonEmptyStr = "ipo"
    beta: Positive = 0.1
    normalize: bool = True

    def _reward(self, answers: Answers) -> torch.Tensor:
        return self.beta * self._score(answers)

    def _losses(self, chosen: Answers, rejected: Answers) -> PairLosses:
        return (self._score(chosen) - self._score(rejected) - 0.5 / self.beta).square(), {}

    def _score(self, answers: Answers) -> torch.Tensor:
        return answers.per_token(answers.score) if self.normalize else answers.score


@dataclass(frozen=True, kw_only=True, eq=False)
class Hinge(ReferencedPairTerm):
    """Hinge loss on pairs: no gradient once the margin of a pair is large enough.

    The datums are pairs, as for `DPO`, and z is its difference of rewards:

    - formula: for each pair `max(0, 1 - z)`, then the mean or sum over pairs
    - gradient: `-beta * w` for the chosen datum where `z < 1`, the opposite for the rejected one, divided by the number
      of pairs for the mean
    - shapes: `[N]`
    - units: none

    Metrics: those of `DPO`.

    Source: T. Liu et al., "Statistical Rejection Sampling Improves Preference Optimization". `SLiC` is the form without
    a reference.

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: as in `DPO`.
        pair_field: as in `DPO`.
        reference: as in `DPO`.
        reference_field: as in `DPO`. Exactly one of `reference` and `reference_field` is required.
        beta: scale of the rewards, > 0: the margin that is large enough is `1 / beta` nats.
    """

    name: NonEmptyStr = "hinge"
    beta: Positive = 0.1

    def _reward(self, answers: Answers) -> torch.Tensor:
        return self.beta * answers.score

    def _losses(self, chosen: Answers, rejected: Answers) -> PairLosses:
        return torch.relu(1.0 - (self._reward(chosen) - self._reward(rejected))), {}


@dataclass(frozen=True, kw_only=True, eq=False)
class DPOP(ReferencedPairTerm):
    """DPO-positive: DPO that also keeps the chosen answers at least as likely as under the reference.

    The datums are pairs, as for `DPO`. With h the weighted sum of `p - q` over the tokens of an answer, p the model's
    and q the reference's logprobs, and `z = beta * (h(chosen) - h(rejected) - penalty * max(0, -h(chosen)))`:

    - formula: for each pair `-log sigmoid(z)`, then the mean or sum over pairs
    - gradient: `-beta * w * sigmoid(-z)` for the chosen datum, times `1 + penalty` while `h(chosen) < 0`; the opposite,
      without the factor, for the rejected one; divided by the number of pairs for the mean
    - shapes: `[N]`
    - units: nats

    Metrics: those of `DPO`, where margin and rewards do not contain the penalty; `shortfall`, the mean of
    `max(0, -h(chosen))`.

    Source: A. Pal et al., "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive".

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: as in `DPO`.
        pair_field: as in `DPO`.
        reference: as in `DPO`.
        reference_field: as in `DPO`. Exactly one of `reference` and `reference_field` is required.
        beta: strength of the pull to the reference, > 0.
        penalty: factor of the shortfall of chosen answers, the paper's lambda, >= 0; 0 is DPO.
    """

    name: NonEmptyStr = "dpop"
    beta: Positive = 0.3
    penalty: NonNegative = 50.0

    def _reward(self, answers: Answers) -> torch.Tensor:
        return self.beta * answers.score

    def _losses(self, chosen: Answers, rejected: Answers) -> PairLosses:
        shortfall = torch.relu(-chosen.score)
        margins = self.beta * (chosen.score - rejected.score - self.penalty * shortfall)
        return softplus(-margins), {"shortfall": shortfall}
