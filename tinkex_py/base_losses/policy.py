"""Policy gradients on sampled tokens: importance sampling and its clipped forms.

The formulas are those of the losses that services have built in. As terms they take masks, other reductions, and
regularizers beside them.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.fields import aligned_field
from tinkex_py.terms.numerics import safe_exp
from tinkex_py.terms.reduction import ReducedTerm
from tinkex_py.types import Datum

Gains = tuple[torch.Tensor, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(ReducedTerm):
    """A loss on the ratio between the model's probability of each token and that of the sampler.

    Args:
        name: the term's name, if it is used as a regularizer and its spec gives none.
        reduction: how the numbers become one loss, see `Positions.reduce`.
        mask: a `loss_fn_inputs` field that says what counts, see `Positions.of`.
        logprobs_field: the field with the sampler's logprobs, `[T]`.
        advantages_field: the field with the advantages, `[T]`.
    """

    logprobs_field: str = "logprobs"
    advantages_field: str = "advantages"

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_text("logprobs_field")
        self._check_text("advantages_field")

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula. Its metrics are means over the positions that count, and the denominators."""
        self._check_sampled(data, logprobs, "give [T] targets")
        sampler = aligned_field(data, self.logprobs_field, logprobs)
        advantages = aligned_field(data, self.advantages_field, logprobs)
        positions = self.positions(data, logprobs)
        chosen = positions.select(logprobs)
        log_ratio = chosen - positions.select(sampler)
        ratio = safe_exp(log_ratio)
        gains, shares = self._gains(chosen, ratio, positions.select(advantages))
        loss, metrics = positions.reduce(-gains, self.reduction)
        with torch.no_grad():
            means = {"mean_ratio": ratio, "approx_kl": ratio - 1.0 - log_ratio, **shares}
            measured = {name: positions.reduce(values, "mean")[0] for name, values in means.items()}
        return loss, {**measured, **metrics}

    @abstractmethod
    def _gains(self, chosen: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor) -> Gains:
        """What each token gains, `[M]`, and further numbers per token whose means are metrics."""


@dataclass(frozen=True, kw_only=True)
class ImportanceSampling(PolicyLoss):
    """Policy gradient, corrected for tokens that an older model or another engine sampled.

    With p the model's and q the sampler's logprobs, A the advantages, `r = exp(p - q)` and w the mask:

    - formula: `reduce(-r * A)`; by default `-sum(w * r * A)`
    - gradient: `-w * r * A`
    - shapes: `[N]`
    - units: those of the advantages

    `exp` goes on as its tangent for `p - q > 20`, so that nothing overflows. Metrics: `mean_ratio`, and `approx_kl`,
    the mean of `r - 1 - log r`, an estimate of KL(sampler || model).

    Source: the Tinker API's `importance_sampling`.

    Args:
        name: the term's name, if it is used as a regularizer and its spec gives none.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 leaves a position out.
        logprobs_field: the field with the sampler's logprobs, `[T]`.
        advantages_field: the field with the advantages, `[T]`.
    """

    name: str = "importance_sampling"

    def _gains(self, chosen: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor) -> Gains:
        del chosen
        return ratio * advantages, {}


@dataclass(frozen=True, kw_only=True)
class ClippedPolicyLoss(PolicyLoss):
    """A policy loss that limits the ratio.

    Args:
        name: the term's name, if it is used as a regularizer and its spec gives none.
        reduction: how the numbers become one loss, see `Positions.reduce`.
        mask: a `loss_fn_inputs` field that says what counts, see `Positions.of`.
        logprobs_field: the field with the sampler's logprobs, `[T]`.
        advantages_field: the field with the advantages, `[T]`.
        clip_low_threshold: smallest ratio, >= 0.
        clip_high_threshold: largest ratio, >= the smallest.
    """

    clip_low_threshold: float
    clip_high_threshold: float

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_number("clip_low_threshold", at_least=0)
        self._check_number("clip_high_threshold", above=0)
        if self.clip_low_threshold > self.clip_high_threshold:
            raise InvalidSpec(
                f"{type(self).__name__}: clip_low_threshold must not be above clip_high_threshold, got "
                f"{self.clip_low_threshold!r} and {self.clip_high_threshold!r}"
            )

    def _clipped(self, ratio: torch.Tensor) -> torch.Tensor:
        return ratio.clamp(self.clip_low_threshold, self.clip_high_threshold)


@dataclass(frozen=True, kw_only=True)
class PPO(ClippedPolicyLoss):
    """Proximal policy optimization: a token stops counting once its ratio has moved far enough in its direction.

    With p the model's and q the sampler's logprobs, A the advantages, `r = exp(p - q)` and w the mask:

    - formula: `reduce(-min(r * A, clip(r, low, high) * A))`
    - gradient: `-w * r * A`; 0 where `A > 0` and `r > high`, and where `A < 0` and `r < low`
    - shapes: `[N]`
    - units: those of the advantages

    `exp` goes on as its tangent for `p - q > 20`, so that nothing overflows. Metrics: `clip_fraction`, the share of
    tokens whose gradient is clipped away; `mean_ratio`; `approx_kl`, the mean of `r - 1 - log r`.

    Source: J. Schulman et al., "Proximal Policy Optimization Algorithms" (equation 7); the Tinker API's `ppo`.

    Args:
        name: the term's name, if it is used as a regularizer and its spec gives none.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 leaves a position out.
        logprobs_field: the field with the sampler's logprobs, `[T]`.
        advantages_field: the field with the advantages, `[T]`.
        clip_low_threshold: smallest ratio, >= 0; a ratio, not a distance from 1.
        clip_high_threshold: largest ratio.
    """

    name: str = "ppo"
    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2

    def _gains(self, chosen: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor) -> Gains:
        del chosen
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
        name: the term's name, if it is used as a regularizer and its spec gives none.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 leaves a position out.
        logprobs_field: the field with the sampler's logprobs, `[T]`.
        advantages_field: the field with the advantages, `[T]`.
        clip_low_threshold: smallest ratio, >= 0; a ratio, not a distance from 1.
        clip_high_threshold: largest ratio.
    """

    name: str = "cispo"
    clip_low_threshold: float = 0.0
    clip_high_threshold: float = 4.0

    def _gains(self, chosen: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor) -> Gains:
        constant = ratio.detach()
        clipped = self._clipped(constant)
        return clipped * chosen * advantages, {"clip_fraction": (clipped != constant).to(ratio.dtype)}
