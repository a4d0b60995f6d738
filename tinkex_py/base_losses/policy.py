"""Policy gradients on sampled tokens.

The formulas are those of the built-in losses of services. As terms they also accept masks, other reductions and
regularizers.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.fields import aligned_field
from tinkex_py.terms.numerics import safe_exp
from tinkex_py.terms.ready_made import NonEmptyStr, NonNegative, Positive
from tinkex_py.terms.reduction import ReducedTerm
from tinkex_py.types import Datum

Objective = tuple[torch.Tensor, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(ReducedTerm):
    """A loss on the ratio between the probabilities of model and sampler for each token."""

    logprobs_field: NonEmptyStr = "logprobs"
    advantages_field: NonEmptyStr = "advantages"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss. Its metrics are means over the selected positions, and the denominators."""
        self.check_sampled(data, logprobs, "pass [T] targets")
        sampler = aligned_field(data, self.logprobs_field, logprobs)
        advantages = aligned_field(data, self.advantages_field, logprobs)
        positions = self.positions(data, logprobs)
        selected = positions.select(logprobs)
        log_ratio = selected - positions.select_logprobs(sampler, data, f"the field {self.logprobs_field!r}")
        ratio = safe_exp(log_ratio)
        objective, shares = self._objective(selected, ratio, positions.select(advantages))
        loss, metrics = positions.reduce(-objective, self.reduction)
        with torch.no_grad():
            means = {"mean_ratio": ratio, "approx_kl": ratio - 1.0 - log_ratio, **shares}
            measured = {name: positions.reduce(values, "mean")[0] for name, values in means.items()}
        return loss, {**measured, **metrics}

    @abstractmethod
    def _objective(self, logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor) -> Objective:
        """Returns what to maximize for each token, `[M]`, and values per token whose means are metrics."""


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

    Args:
        name: default name, for use as a regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 excludes a position. Default: `weights`, if the datums
            have it; None: no mask.
        logprobs_field: the field with the sampler's logprobs, `[T]`.
        advantages_field: the field with the advantages, `[T]`.
    """

    name: NonEmptyStr = "importance_sampling"

    def _objective(self, logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor) -> Objective:
        del logprobs
        return ratio * advantages, {}


@dataclass(frozen=True, kw_only=True)
class ClippedPolicyLoss(PolicyLoss):
    """A policy loss that limits the ratio."""

    clip_low_threshold: NonNegative
    clip_high_threshold: Positive

    def check(self) -> None:
        """Raises InvalidSpec if the lower threshold is above the upper one."""
        if self.clip_low_threshold > self.clip_high_threshold:
            raise self.invalid(
                "clip_low_threshold must not be above clip_high_threshold, got "
                f"{self.clip_low_threshold!r} and {self.clip_high_threshold!r}"
            )

    def _clipped(self, ratio: torch.Tensor) -> torch.Tensor:
        return ratio.clamp(self.clip_low_threshold, self.clip_high_threshold)


@dataclass(frozen=True, kw_only=True)
class PPO(ClippedPolicyLoss):
    """Proximal policy optimization: a token has no gradient once its ratio has moved far enough in its direction.

    With p the model's and q the sampler's logprobs, A the advantages, `r = exp(p - q)` and w the mask:

    - formula: `reduce(-min(r * A, clip(r, low, high) * A))`
    - gradient: `-w * r * A`; 0 where `A > 0` and `r > high`, and where `A < 0` and `r < low`
    - shapes: `[N]`
    - units: those of the advantages

    `exp` continues as its tangent for `p - q > 20`, so that nothing overflows. Metrics: `clip_fraction`, the share of
    tokens whose gradient is clipped away; `mean_ratio`; `approx_kl`, the mean of `r - 1 - log r`.

    Source: J. Schulman et al., "Proximal Policy Optimization Algorithms" (equation 7); the Tinker API's `ppo`.

    Args:
        name: default name, for use as a regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 excludes a position. Default: `weights`, if the datums
            have it; None: no mask.
        logprobs_field: the field with the sampler's logprobs, `[T]`.
        advantages_field: the field with the advantages, `[T]`.
        clip_low_threshold: smallest ratio, >= 0; a ratio, not a distance from 1.
        clip_high_threshold: largest ratio.
    """

    name: NonEmptyStr = "ppo"
    clip_low_threshold: NonNegative = 0.8
    clip_high_threshold: Positive = 1.2

    def _objective(self, logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor) -> Objective:
        del logprobs
        free, limited = ratio * advantages, self._clipped(ratio) * advantages
        return torch.minimum(free, limited), {"clip_fraction": (limited < free).to(ratio.dtype)}


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

    Args:
        name: default name, for use as a regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 excludes a position. Default: `weights`, if the datums
            have it; None: no mask.
        logprobs_field: the field with the sampler's logprobs, `[T]`.
        advantages_field: the field with the advantages, `[T]`.
        clip_low_threshold: smallest ratio, >= 0; a ratio, not a distance from 1.
        clip_high_threshold: largest ratio.
    """

    name: NonEmptyStr = "cispo"
    clip_low_threshold: NonNegative = 0.0
    clip_high_threshold: Positive = 4.0

    def _objective(self, logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor) -> Objective:
        constant = ratio.detach()
        clipped = self._clipped(constant)
        return clipped * logprobs * advantages, {"clip_fraction": (clipped != constant).to(ratio.dtype)}
