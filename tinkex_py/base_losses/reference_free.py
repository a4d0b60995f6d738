"""Losses on pairs of answers that need no reference: SimPO, ORPO, CPO and SLiC."""

from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from tinkex_py.terms.numerics import log1mexp
from tinkex_py.terms.pairs import Answers, PairLosses, ReferenceFreePairTerm
from tinkex_py.terms.ready_made import NonEmptyStr, NonNegative, Positive

# Odds of an answer whose tokens are certain would be infinite.
_LARGEST_MEAN = -1e-6


@dataclass(frozen=True, kw_only=True)
class SimPO(ReferenceFreePairTerm):
    """Simple preference optimization: DPO on means over tokens, with a margin and without a reference.

    The datums are pairs, as for `DPO`. With a the mean logprob of the tokens of an answer, weighted with the mask w,
    and `z = beta * (a(chosen) - a(rejected)) - gamma`:

    - formula: for each pair `-log sigmoid(z)`, then the mean or sum over pairs
    - gradient: `-beta * sigmoid(-z) * w / sum(w)` for the chosen datum, the opposite for the rejected one, divided by
      the number of pairs for the mean
    - shapes: `[N]`
    - units: nats

    Metrics: those of `DPO`, with the reward `beta * a`.

    Source: Y. Meng, M. Xia and D. Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward". TRL's
    `simpo` adds `cpo_alpha` times the NLL, which is 1 by default: here, add a regularizer.

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: as in `DPO`.
        pair_field: as in `DPO`.
        beta: scale of the rewards, > 0.
        gamma: margin of the rewards, >= 0. The authors' code has the ratio `gamma / beta`, here 0.25.
    """

    name: NonEmptyStr = "simpo"
    beta: Positive = 2.0
    gamma: NonNegative = 0.5

    def _reward(self, answers: Answers) -> torch.Tensor:
        return self.beta * answers.per_token(answers.logprob)

    def _losses(self, chosen: Answers, rejected: Answers) -> PairLosses:
        return softplus(self.gamma - (self._reward(chosen) - self._reward(rejected))), {}


@dataclass(frozen=True, kw_only=True)
class ORPO(ReferenceFreePairTerm):
    """Odds ratio preference optimization: the NLL of the chosen answer, and the odds of both.

    The datums are pairs, as for `DPO`. With a the mean logprob of the tokens of an answer, weighted with the mask w,
    `odds(a) = a - log(1 - exp(a))` and `o = odds(a(chosen)) - odds(a(rejected))`:

    - formula: for each pair `-a(chosen) - beta * log sigmoid(o)`, then the mean or sum over pairs
    - gradient: `-(1 + beta * sigmoid(-o) / (1 - exp(a))) * w / sum(w)` for the chosen datum,
      `beta * sigmoid(-o) / (1 - exp(a)) * w / sum(w)` for the rejected one, divided by the number of pairs for the mean
    - shapes: `[N]`
    - units: nats

    Metrics: those of `DPO`, with the reward `beta * a`; `log_odds`, the mean of o; `nll`, the mean of `-a(chosen)`. In
    the odds, a is at most -1e-6, so that they stay finite.

    Source: J. Hong, N. Lee and J. Thorne, "ORPO: Monolithic Preference Optimization without Reference Model". TRL takes
    the NLL over prompt and answer.

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: as in `DPO`.
        pair_field: as in `DPO`.
        beta: factor of the odds, the paper's lambda, > 0.
    """

    name: NonEmptyStr = "orpo"
    beta: Positive = 0.1

    def _reward(self, answers: Answers) -> torch.Tensor:
        return self.beta * answers.per_token(answers.logprob)

    def _losses(self, chosen: Answers, rejected: Answers) -> PairLosses:
        log_odds = _odds(chosen) - _odds(rejected)
        nll = -chosen.per_token(chosen.logprob)
        return nll + self.beta * softplus(-log_odds), {"log_odds": log_odds, "nll": nll}


@dataclass(frozen=True, kw_only=True)
class CPO(ReferenceFreePairTerm):
    """Contrastive preference optimization: DPO without a reference, and the NLL of the chosen answer.

    The datums are pairs, as for `DPO`. With l the weighted sum and a the weighted mean of the logprobs of an answer, w
    the mask, and `z = beta * (l(chosen) - l(rejected))`:

    - formula: for each pair `-log sigmoid(z) - nll_weight * a(chosen)`, then the mean or sum over pairs
    - gradient: `-beta * w * sigmoid(-z) - nll_weight * w / sum(w)` for the chosen datum, `beta * w * sigmoid(-z)` for
      the rejected one, divided by the number of pairs for the mean
    - shapes: `[N]`
    - units: nats

    Metrics: those of `DPO`, with the reward `beta * l`; `nll`, the mean of `-a(chosen)`.

    Source: H. Xu et al., "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
    Translation". TRL takes the NLL as the mean over the tokens of all chosen answers.

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: as in `DPO`.
        pair_field: as in `DPO`.
        beta: scale of the rewards, > 0.
        nll_weight: factor of the NLL, >= 0.
    """

    name: NonEmptyStr = "cpo"
    beta: Positive = 0.1
    nll_weight: NonNegative = 1.0

    def _reward(self, answers: Answers) -> torch.Tensor:
        return self.beta * answers.logprob

    def _losses(self, chosen: Answers, rejected: Answers) -> PairLosses:
        losses = softplus(-(self._reward(chosen) - self._reward(rejected)))
        nll = -chosen.per_token(chosen.logprob)
        return losses + self.nll_weight * nll, {"nll": nll}


@dataclass(frozen=True, kw_only=True)
class SLiC(ReferenceFreePairTerm):
    """Sequence likelihood calibration: a hinge on the logprobs of both answers, and the NLL of the chosen one.

    The datums are pairs, as for `DPO`. With l the weighted sum of the logprobs of an answer and w the mask:

    - formula: for each pair `max(0, margin - l(chosen) + l(rejected)) - nll_weight * l(chosen)`, then the mean or sum
      over pairs
    - gradient: `-w` for the chosen datum while the hinge is above 0, and `-nll_weight * w`; `w` for the rejected one
      while the hinge is above 0; divided by the number of pairs for the mean
    - shapes: `[N]`
    - units: nats

    Metrics: those of `DPO`, with the reward l; `nll`, the mean of `-l(chosen)`.

    Source: Y. Zhao et al., "SLiC-HF: Sequence Likelihood Calibration with Human Feedback"; defaults of the library
    HALOs.

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: as in `DPO`.
        pair_field: as in `DPO`.
        margin: difference of the logprobs from which a pair has no hinge, > 0.
        nll_weight: factor of the NLL, a sum over the tokens, >= 0.
    """

    name: NonEmptyStr = "slic"
    margin: Positive = 1.0
    nll_weight: NonNegative = 0.1

    def _reward(self, answers: Answers) -> torch.Tensor:
        return answers.logprob

    def _losses(self, chosen: Answers, rejected: Answers) -> PairLosses:
        hinge = torch.relu(self.margin - (chosen.logprob - rejected.logprob))
        return hinge - self.nll_weight * chosen.logprob, {"nll": -chosen.logprob}


def _odds(answers: Answers) -> torch.Tensor:
    """Returns the log odds of each answer's mean."""
    mean = answers.per_token(answers.logprob).clamp(max=_LARGEST_MEAN)
    return mean - log1mexp(mean)
