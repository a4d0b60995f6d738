"""Corrections for tokens that another policy sampled: weights and masks, all constants for the gradient.

`x = exp(old - q)` is the ratio of the trainer's and the sampler's probability of a token: old is the logprob that the
trainer had at the start of the step, or has now, and q that of the sampler.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch

from tinkex_py.base_losses.policy import PolicyTokens
from tinkex_py.errors import InvalidData
from tinkex_py.terms.numerics import EXACT_UP_TO
from tinkex_py.terms.ready_made import CheckedSettings, NonNegative, Positive

Level = Literal["token", "sequence"]
Statistic = Literal["token", "any-token", "geometric", "product", "k3-mean", "k3-max"]

# The smallest probability of "another token", in the binary KL divergence.
_SMALLEST_REST = 1e-8


@dataclass(frozen=True)
class Drift:
    """How far the trainer is from the sampler, on the tokens of a policy loss. No tensor has a gradient.

    Attributes:
        tokens: the tokens; their `sampler` holds q.
        old: logprobs of the trainer, `[M]`.
    """

    tokens: PolicyTokens
    old: torch.Tensor

    @cached_property
    def log_ratio(self) -> torch.Tensor:
        """`log x`, `[M]`."""
        return self.old - self.tokens.sampler

    @cached_property
    def ratio(self) -> torch.Tensor:
        """x, with its logarithm limited to 20 either way, `[M]`."""
        return _exp(self.log_ratio)

    @cached_property
    def product(self) -> torch.Tensor:
        """The product of x over each datum, `[datums]`."""
        return _exp(self.tokens.positions.sums(self.log_ratio))

    @property
    def k3(self) -> torch.Tensor:
        """`x - 1 - log x`, an estimate of KL(sampler || trainer), `[M]`."""
        return self.ratio - 1.0 - self.log_ratio

    def at_level(self, level: Level) -> torch.Tensor:
        """Returns x, or for "sequence" its product over the datum, for each token."""
        return self.ratio if level == "token" else self.spread(self.product)

    def spread(self, by_datum: torch.Tensor) -> torch.Tensor:
        """Returns for each token the number of its datum, `[M]`."""
        return self.tokens.positions.spread(by_datum).expand_as(self.old)


@dataclass(frozen=True, kw_only=True)
class Correction(CheckedSettings, ABC):
    """A factor for the loss of each token.

    Raises:
        InvalidSpec: a setting is invalid.
    """

    reweights: ClassVar[bool] = False
    """True if the factors are importance weights, not only 0 and 1."""

    @property
    def coupling(self) -> str | None:
        """Why the factors of a datum depend on other datums; None if they do not."""
        return None

    @abstractmethod
    def factors(self, drift: Drift) -> torch.Tensor:
        """Returns the factor of each token, `[M]`, without a gradient."""


@dataclass(frozen=True, kw_only=True)
class TruncatedIS(Correction):
    """Truncated importance sampling (TIS): `min(x, cap)`, and at least `floor`.

    Source: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; `rollout_is` in
    verl, `token_truncate` and `sequence_truncate` in TRL.

    Args:
        cap: largest weight, > 0.
        floor: smallest weight.
        level: "token", or "sequence" for the product of x over the datum on all of its tokens.
        normalize: divide by the mean weight of the call's tokens, so that the mean is 1. This couples datums.
    """

    reweights: ClassVar[bool] = True

    cap: Positive = 2.0
    floor: NonNegative = 0.0
    level: Level = "token"
    normalize: bool = False

    def check(self) -> None:
        """Raises InvalidSpec if the bounds are not in order."""
        if self.floor > self.cap:
            raise self.invalid(f"floor must not be above cap, got {self.floor!r} and {self.cap!r}")

    @property
    def coupling(self) -> str | None:
        """The mean weight is that of all datums."""
        return "the weights are divided by the mean of all datums (normalize=True)" if self.normalize else None

    def factors(self, drift: Drift) -> torch.Tensor:
        """Implements `Correction.factors`."""
        weights = drift.at_level(self.level).clamp(self.floor, self.cap)
        if not self.normalize:
            return weights
        mean = drift.tokens.positions.mean(weights)
        return weights / torch.where(mean > 0, mean, 1.0)


@dataclass(frozen=True, kw_only=True)
class MaskedIS(Correction):
    """Masked importance sampling (IcePop): x where `low <= x <= high`, else 0.

    Source: the Ling team, "IcePop" (Ring-1T); `icepop` in OpenRLHF and slime, `token_mask` and `sequence_mask` in TRL.

    Args:
        low: smallest ratio that counts.
        high: largest ratio that counts, > 0.
        level: "token", or "sequence" for the product of x over the datum.
    """

    reweights: ClassVar[bool] = True

    low: NonNegative = 0.5
    high: Positive = 5.0
    level: Level = "token"

    def check(self) -> None:
        """Raises InvalidSpec if the bounds are not in order."""
        if self.low > self.high:
            raise self.invalid(f"low must not be above high, got {self.low!r} and {self.high!r}")

    def factors(self, drift: Drift) -> torch.Tensor:
        """Implements `Correction.factors`."""
        ratio = drift.at_level(self.level)
        return ratio * ((ratio >= self.low) & (ratio <= self.high))


@dataclass(frozen=True, kw_only=True)
class Rejection(Correction):
    """Leaves out tokens or whole datums whose statistic is outside of `[low, high]`. What is left keeps its weight.

    | statistic | of | leaves out |
    | --- | --- | --- |
    | `token` | x | the token |
    | `any-token` | x of every token | the datum, if any token is outside: with `low` only, a veto |
    | `geometric` | geometric mean of x over the datum | the datum |
    | `product` | product of x over the datum | the datum |
    | `k3-mean`, `k3-max` | mean or largest `x - 1 - log x` over the datum | the datum |

    The bounds are on x, not on its inverse.

    Source: `seq-mask-tis` in NeMo-RL and OpenRLHF, `sequence_mask` in TRL, `rollout_rs` in verl.

    Args:
        statistic: one of the table.
        low: smallest value that is kept.
        high: largest value that is kept, > 0; None: no such bound.
    """

    statistic: Statistic
    low: NonNegative = 0.0
    high: Positive | None = None

    def check(self) -> None:
        """Raises InvalidSpec if the bounds keep everything or nothing."""
        if self.high is None and self.low == 0:
            raise self.invalid("pass low=, high= or both: without a bound everything is kept")
        if self.high is not None and self.low > self.high:
            raise self.invalid(f"low must not be above high, got {self.low!r} and {self.high!r}")

    def factors(self, drift: Drift) -> torch.Tensor:
        """Implements `Correction.factors`."""
        positions = drift.tokens.positions
        if self.statistic == "token":
            return self._kept(drift.ratio)
        if self.statistic == "any-token":
            return drift.spread((positions.sums(1.0 - self._kept(drift.ratio)) == 0).to(drift.ratio.dtype))
        if self.statistic == "product":
            return drift.spread(self._kept(drift.product))
        if self.statistic == "geometric":
            return drift.spread(self._kept(_exp(positions.means(drift.log_ratio))))
        if self.statistic == "k3-mean":
            return drift.spread(self._kept(positions.means(drift.k3)))
        largest = drift.k3.new_zeros(positions.sequence_count)
        sequences = positions.sequences
        index = torch.zeros_like(drift.k3, dtype=torch.int64) if sequences is None else sequences
        return drift.spread(self._kept(largest.scatter_reduce(0, index, drift.k3, "amax")))

    def _kept(self, statistic: torch.Tensor) -> torch.Tensor:
        kept = statistic >= self.low
        if self.high is not None:
            kept = kept & (statistic <= self.high)
        return kept.to(statistic.dtype)


@dataclass(frozen=True, kw_only=True)
class OffPolicyMask(Correction):
    """Leaves out datums of negative advantage that the current model has moved away from: `mean(q - p) > limit`.

    The advantages of a datum must have one sign.

    Source: DeepSeek-AI, "DeepSeek-V3.2" (equation 9); `off_policy_mask_threshold` in TRL, `--opsm-delta` in slime.

    Args:
        limit: largest mean of `q - p` over the datum, p being the current model's logprobs.
    """

    limit: NonNegative

    def factors(self, drift: Drift) -> torch.Tensor:
        """Implements `Correction.factors`."""
        tokens, positions = drift.tokens, drift.tokens.positions
        falls, rises = (
            positions.sums(side.to(drift.old.dtype)) for side in (tokens.advantages < 0, tokens.advantages > 0)
        )
        mixed = (falls > 0) & (rises > 0)
        if bool(mixed.any()):
            raise InvalidData(
                "OffPolicyMask needs advantages of one sign per datum, but those of datum "
                f"{int(mixed.nonzero()[0])} have both: give all tokens of an answer the same advantage"
            )
        moved = positions.means(tokens.sampler - tokens.logprobs.detach()) > self.limit
        return drift.spread((~((falls > 0) & moved)).to(drift.old.dtype))


@dataclass(frozen=True, kw_only=True)
class ProbabilityMask(Correction):
    """Leaves out tokens whose probability has already moved far in the direction of their advantage (DPPO).

    p is the probability under the trainer and mu that under the sampler. A token is left out if `A > 0` and p rose
    above mu by more than `high`, or if `A < 0` and p fell below mu by more than `low`. The distance is `|p - mu|`
    ("tv"), or the divergence KL(mu || p) of the distributions "this token, or another" ("kl").

    Source: "Rethinking the Trust Region in LLM Reinforcement Learning" (DPPO); the default loss of prime-rl, `dppo_tv`
    and `dppo_kl` in verl.

    Args:
        low: largest distance of a fall, > 0.
        high: largest distance of a rise, > 0.
        measure: "tv" or "kl".
        either_way: leave the token out whatever the sign of its advantage; prime-rl's `ipo` with 0.1.
    """

    low: Positive = 0.2
    high: Positive = 0.2
    measure: Literal["tv", "kl"] = "tv"
    either_way: bool = False

    def factors(self, drift: Drift) -> torch.Tensor:
        """Implements `Correction.factors`."""
        advantages, p, mu = drift.tokens.advantages, drift.old.exp(), drift.tokens.sampler.exp()
        distance = (p - mu).abs() if self.measure == "tv" else binary_kl(drift.tokens.sampler, drift.old)
        rose, fell = (p > mu) & (distance > self.high), (p < mu) & (distance > self.low)
        left_out = rose | fell if self.either_way else (rose & (advantages > 0)) | (fell & (advantages < 0))
        return (~left_out).to(p.dtype)


def binary_kl(log_mu: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Returns `KL(mu || p)` of the distributions "this token, or another"."""
    rest_mu, rest_p = (-torch.expm1(of).clamp(max=-_SMALLEST_REST) for of in (log_mu, log_p))
    return log_mu.exp() * (log_mu - log_p) + rest_mu * (rest_mu.log() - rest_p.log())


def _exp(logarithm: torch.Tensor) -> torch.Tensor:
    return logarithm.clamp(-EXACT_UP_TO, EXACT_UP_TO).exp()
