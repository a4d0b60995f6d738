"""Policy gradients on sampled tokens: one loss per token, from its advantage and the ratio to the sampler.

The formulas are those of the built-in losses of services. As terms they also accept masks, other reductions, a
correction and regularizers.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.fields import aligned_field
from tinkex_py.terms.numerics import safe_exp
from tinkex_py.terms.ready_made import ADDED, NonEmptyStr, NonNegative, Positive
from tinkex_py.terms.reduction import Positions, ReducedTerm, Reduction
from tinkex_py.types import Datum


@dataclass(frozen=True)
class PolicyTokens:
    """The sampled tokens that the mask selects.

    Attributes:
        positions: where they are.
        logprobs: of the model, `[M]`; the only tensor with a gradient.
        sampler: logprobs of the sampler, or of the model that the ratio compares with, `[M]`.
        advantages: `[M]`.
        data: the datums.
        all_logprobs: of the model, packed, for positions outside of the mask.
    """

    positions: Positions
    logprobs: torch.Tensor
    sampler: torch.Tensor
    advantages: torch.Tensor
    data: Sequence[Datum]
    all_logprobs: torch.Tensor

    @cached_property
    def log_ratio(self) -> torch.Tensor:
        """`log p - log q`, `[M]`."""
        return self.logprobs - self.sampler

    @cached_property
    def ratio(self) -> torch.Tensor:
        """`p / q`, continued as its tangent beyond `e**20`, `[M]`."""
        return safe_exp(self.log_ratio)


@dataclass(frozen=True)
class TokenLosses:
    """The loss of each token, `[M]`, and further numbers per token whose means are metrics."""

    values: torch.Tensor
    shares: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(ReducedTerm):
    """A loss on sampled tokens and their advantages.

    Args:
        name: default name, for use as a regularizer.
        reduction: see `ReducedTerm`.
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 excludes a position. Default: `weights`, if the datums
            have it; None: no mask.
        total: see `ReducedTerm`.
        length: see `ReducedTerm`.
        logprobs_field: the field with the sampler's logprobs, `[T]`.
        advantages_field: the field with the advantages, `[T]`.
    """

    reads_sampler: ClassVar[bool] = True
    """False if the formula has no ratio, so that the data need no logprobs of the sampler."""
    corrects: ClassVar[bool] = True
    """True if the formula multiplies by the ratio of model and sampler, so that no other weight may."""
    by_datum: ClassVar[bool] = False
    """True if the formula needs sums over datums."""
    had_no_default_mask: ClassVar[bool] = False

    logprobs_field: NonEmptyStr = "logprobs"
    advantages_field: NonEmptyStr = "advantages"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss. Its metrics are means over the selected positions, and the denominators."""
        tokens = self.tokens(data, logprobs, with_sampler=self.reads_sampler)
        losses = self.token_losses(tokens)
        loss, metrics = tokens.positions.reduce(losses.values, self.reduction)
        return loss, {**self.measured(tokens, losses.shares), **metrics}

    def tokens(
        self, data: Sequence[Datum], logprobs: torch.Tensor, *, with_sampler: bool, by_datum: bool = False
    ) -> PolicyTokens:
        """Selects the tokens; without a sampler, their own logprobs stand for its."""
        self.check_sampled(data, logprobs, "pass [T] targets")
        advantages = aligned_field(data, self.advantages_field, logprobs)
        sampler = aligned_field(data, self.logprobs_field, logprobs) if with_sampler else None
        positions = self.positions(data, logprobs, by_datum=by_datum or self.by_datum)
        selected = positions.select_finite(logprobs, data, "the model's output")
        old = selected.detach()
        if sampler is not None:
            source = f"the field {self.logprobs_field!r}"
            positions.select_logprobs(sampler, data, source)
            old = positions.select_finite(sampler, data, source)
        gains = positions.select_finite(advantages, data, f"the field {self.advantages_field!r}")
        return PolicyTokens(positions, selected, old, gains, data, logprobs)

    def measured(self, tokens: PolicyTokens, shares: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the means over the tokens, which are the metrics."""
        with torch.no_grad():
            means = {"mean_ratio": tokens.ratio, "approx_kl": tokens.ratio - 1.0 - tokens.log_ratio}
            if not self.reads_sampler:
                means = {}
            return {name: tokens.positions.mean(values) for name, values in {**means, **shares}.items()}

    @abstractmethod
    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Returns the loss of each token."""


@dataclass(frozen=True, kw_only=True)
class Reinforce(PolicyLoss):
    """Policy gradient on tokens that the current model sampled.

    With p the model's logprobs, A the advantages and w the mask:

    - formula: `reduce(-A * p)`
    - gradient: `-w * A`
    - shapes: `[N]`
    - units: nats times those of the advantages

    It does not read the sampler's logprobs: for tokens of an older model, use `ImportanceSampling`, or put this loss
    into `Corrected`.

    Source: R. J. Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
    Learning".

    The settings are those of `PolicyLoss`.
    """

    reads_sampler: ClassVar[bool] = False
    corrects: ClassVar[bool] = False

    name: NonEmptyStr = "reinforce"

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        return TokenLosses(-tokens.advantages * tokens.logprobs, {})


@dataclass(frozen=True, kw_only=True)
class ImportanceSampling(PolicyLoss):
    """Policy gradient, corrected for tokens that an older model or another engine sampled.

    With p the model's and q the sampler's logprobs, A the advantages, `r = exp(p - q)` and w the mask:

    - formula: `reduce(-r * A)`; by default `-sum(w * r * A)`
    - gradient: `-w * r * A`
    - shapes: `[N]`
    - units: those of the advantages

    `exp` continues as its tangent for `p - q > 20`, so that nothing overflows. Metrics: `mean_ratio`, and `approx_kl`,
    the mean of `r - 1 - log r`, an estimate of KL(sampler || model).

    Source: the Tinker API's `importance_sampling`.

    The settings are those of `PolicyLoss`.
    """

    had_no_default_mask: ClassVar[bool] = True

    name: NonEmptyStr = "importance_sampling"

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        return TokenLosses(-tokens.ratio * tokens.advantages, {})


@dataclass(frozen=True, kw_only=True)
class ClippedPolicyLoss(PolicyLoss):
    """A policy loss that limits the ratio.

    Args:
        clip_low_threshold: smallest ratio, >= 0; a ratio, not a distance from 1.
        clip_high_threshold: largest ratio.
    """

    clip_low_threshold: NonNegative
    clip_high_threshold: Positive

    def check(self) -> None:
        """Raises InvalidSpec if the lower threshold is above the upper one."""
        if self.clip_low_threshold > self.clip_high_threshold:
            raise self.invalid(
                "clip_low_threshold must not be above clip_high_threshold, got "
                f"{self.clip_low_threshold!r} and {self.clip_high_threshold!r}"
            )

    def clipped(self, ratio: torch.Tensor) -> torch.Tensor:
        """Returns the limited ratio."""
        return ratio.clamp(self.clip_low_threshold, self.clip_high_threshold)

    def clipped_losses(self, ratio: torch.Tensor, advantages: torch.Tensor) -> TokenLosses:
        """Returns the losses of PPO: `-min(r * A, clip(r) * A)`."""
        free, limited = ratio * advantages, self.clipped(ratio) * advantages
        stopped = limited < free
        shares = {
            "clip_fraction": stopped,
            "clip_fraction_low": stopped & (advantages < 0),
            "clip_fraction_high": stopped & (advantages > 0),
        }
        return TokenLosses(-torch.minimum(free, limited), shares)


@dataclass(frozen=True, kw_only=True)
class PPO(ClippedPolicyLoss):
    """Proximal policy optimization: a token has no gradient once its ratio has moved far enough in its direction.

    With p the model's and q the sampler's logprobs, A the advantages, `r = exp(p - q)` and w the mask:

    - formula: `reduce(-min(r * A, clip(r, low, high) * A))`; with `dual_clip`, the loss of a token with `A < 0` is at
      most `-dual_clip * A`
    - gradient: `-w * r * A`; 0 where `A > 0` and `r > high`, where `A < 0` and `r < low`, and where `dual_clip` acts
    - shapes: `[N]`
    - units: those of the advantages

    `exp` continues as its tangent for `p - q > 20`, so that nothing overflows. Metrics: `clip_fraction`, the share of
    tokens whose gradient is clipped away, and its parts `clip_fraction_low` (`A < 0`) and `clip_fraction_high`;
    `dual_clip_fraction`; `mean_ratio`; `approx_kl`, the mean of `r - 1 - log r`.

    Source: J. Schulman et al., "Proximal Policy Optimization Algorithms" (equation 7); the Tinker API's `ppo`. A
    higher `clip_high_threshold` (1.28): Q. Yu et al., "DAPO". `dual_clip`: D. Ye et al., "Mastering Complex Control in
    MOBA Games with Deep Reinforcement Learning"; `delta` in TRL is the same.

    The settings are those of `PolicyLoss`, and:

    Args:
        clip_low_threshold: smallest ratio, >= 0; a ratio, not a distance from 1.
        clip_high_threshold: largest ratio.
        dual_clip: largest ratio for `A < 0`, above `clip_high_threshold`; 3 is usual. None: no such limit.
    """

    had_no_default_mask: ClassVar[bool] = True

    name: NonEmptyStr = "ppo"
    clip_low_threshold: NonNegative = 0.8
    clip_high_threshold: Positive = 1.2
    dual_clip: Positive | None = field(default=None, metadata=ADDED)

    def check(self) -> None:
        """Raises InvalidSpec if the thresholds are not in order."""
        super().check()
        if self.dual_clip is not None and self.dual_clip <= max(1.0, self.clip_high_threshold):
            raise self.invalid(f"dual_clip must be above 1 and above clip_high_threshold, got {self.dual_clip!r}")

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        losses = self.clipped_losses(tokens.ratio, tokens.advantages)
        if self.dual_clip is None:
            return losses
        largest = torch.where(tokens.advantages < 0, -self.dual_clip * tokens.advantages, torch.inf)
        stopped = {"dual_clip_fraction": largest < losses.values}
        return TokenLosses(torch.minimum(losses.values, largest), {**losses.shares, **stopped})


@dataclass(frozen=True, kw_only=True)
class CISPO(ClippedPolicyLoss):
    """Clipped importance sampling: every token keeps its gradient, only its ratio is limited.

    With p the model's and q the sampler's logprobs, A the advantages, `r = exp(p - q)` and w the mask:

    - formula: `reduce(-c * p * A)` with `c = clip(r, low, high)`, a constant for the gradient
    - gradient: `-w * c * A`
    - shapes: `[N]`
    - units: nats times those of the advantages

    Metrics: `clip_fraction`, the share of tokens whose ratio is limited; `mean_ratio`; `approx_kl`, the mean of
    `r - 1 - log r`.

    Source: MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention"; the Tinker API's
    `cispo`.

    The settings are those of `PolicyLoss`, and:

    Args:
        clip_low_threshold: smallest ratio, >= 0; a ratio, not a distance from 1.
        clip_high_threshold: largest ratio.
    """

    had_no_default_mask: ClassVar[bool] = True

    name: NonEmptyStr = "cispo"
    clip_low_threshold: NonNegative = 0.0
    clip_high_threshold: Positive = 4.0

    @property
    def surrogate(self) -> str | None:
        """The limited ratio is a constant."""
        return "the limited ratio is a constant"

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        constant = tokens.ratio.detach()
        clipped = self.clipped(constant)
        return TokenLosses(-clipped * tokens.logprobs * tokens.advantages, {"clip_fraction": clipped != constant})


@dataclass(frozen=True, kw_only=True)
class SAPO(PolicyLoss):
    """Soft adaptive policy optimization: the gradient fades smoothly as the ratio leaves 1.

    With p the model's and q the sampler's logprobs, A the advantages, `r = exp(p - q)`, w the mask, and
    `s = sigmoid(tau * (r - 1))`, where tau is `tau_positive` for `A > 0` and `tau_negative` else:

    - formula: `reduce(-(4 / tau) * s * A)`
    - gradient: `-w * 4 * s * (1 - s) * r * A`, which is `-w * A` at `r = 1`
    - shapes: `[N]`
    - units: those of the advantages; at `r = 1` the value is `-2 * A / tau`, so it does not compare with that of PPO

    Source: C. Gao et al., "Soft Adaptive Policy Optimization".

    The settings are those of `PolicyLoss`, and:

    Args:
        tau_positive: how fast tokens with `A > 0` fade, > 0.
        tau_negative: how fast the others fade, > 0.
    """

    name: NonEmptyStr = "sapo"
    reduction: Reduction = "seq-mean-token-mean"
    tau_positive: Positive = 1.0
    tau_negative: Positive = 1.05

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        positive = tokens.advantages > 0
        tau = torch.where(positive, torch.full_like(tokens.advantages, self.tau_positive), self.tau_negative)
        return TokenLosses(-4.0 / tau * torch.sigmoid(tau * (tokens.ratio - 1.0)) * tokens.advantages, {})


@dataclass(frozen=True, kw_only=True)
class DRO(PolicyLoss):
    """Direct reward optimization: a policy gradient with a quadratic pull to the sampler.

    With p the model's and q the sampler's logprobs, A the advantages and w the mask:

    - formula: `reduce(-(p * A - beta / 2 * (p - q)**2))`
    - gradient: `-w * (A - beta * (p - q))`
    - shapes: `[N]`
    - units: nats times those of the advantages

    The mask decides which positions the penalty covers; the advantages are the caller's.

    Source: P. H. Richemond et al., "Offline Regularised Reinforcement Learning for Large Language Models Alignment";
    the Tinker API's `dro`.

    The settings are those of `PolicyLoss`, and:

    Args:
        beta: strength of the pull, > 0; 0.01 to 0.1 is usual.
    """

    corrects: ClassVar[bool] = False

    name: NonEmptyStr = "dro"
    beta: Positive

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        penalty = 0.5 * self.beta * tokens.log_ratio.square()
        return TokenLosses(penalty - tokens.logprobs * tokens.advantages, {})
