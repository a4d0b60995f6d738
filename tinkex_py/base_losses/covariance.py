"""Policy losses that hold the entropy up where advantage and logprob rise together."""

import zlib
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from tinkex_py.base_losses.policy import PPO, PolicyLoss, PolicyTokens, TokenLosses
from tinkex_py.terms.ready_made import NonEmptyStr, NonNegative
from tinkex_py.values import Integer, Number

Share = Annotated[Number, Field(gt=0, le=1)]

_COUPLING = "the covariances are those of all tokens of the call"


@dataclass(frozen=True, kw_only=True)
class ClipCov(PPO):
    """PPO without a few random tokens of high covariance between advantage and logprob.

    With the settings of `PPO`, and the covariances `(A - mean A) * (p - mean p)` over all tokens of the call, which
    are constants:

    - formula: that of `PPO`; 0 for a share of the tokens, drawn from those that PPO does not clip and whose covariance
      is between `cov_low` and `cov_high`
    - gradient: that of `PPO`; 0 for the drawn tokens
    - shapes: `[N]`
    - units: those of the advantages

    The draw depends on `seed` and on the logprobs, so that a replay draws the same. The call's datums are coupled.
    Metrics: those of `PPO`, and `cov_clip_fraction`.

    Source: G. Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models".

    The settings are those of `PPO`, and:

    Args:
        clip_share: tokens to draw, as a share of all, > 0; at least one is drawn.
        cov_low: smallest covariance of a token that may be drawn.
        cov_high: largest one.
        seed: of the draw.
    """

    had_no_default_mask: ClassVar[bool] = False

    name: NonEmptyStr = "clip_cov"
    clip_share: Share = 2e-4
    cov_low: Number = 1.0
    cov_high: Number = 5.0
    seed: Integer = 0

    @property
    def coupling(self) -> str | None:
        """The covariances are those of all tokens."""
        return _COUPLING

    @property
    def surrogate(self) -> str | None:
        """The tokens that are drawn depend on the logprobs."""
        return "the tokens that are drawn depend on the logprobs"

    def check(self) -> None:
        """Raises InvalidSpec if the bounds are not in order."""
        super().check()
        if self.cov_low >= self.cov_high:
            raise self.invalid(f"cov_low must be below cov_high, got {self.cov_low!r} and {self.cov_high!r}")

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        losses = super().token_losses(tokens)
        covariances = covariances_of(tokens)
        allowed = (covariances > self.cov_low) & (covariances < self.cov_high) & ~losses.shares["clip_fraction"]
        candidates = allowed.cpu().nonzero().reshape(-1)
        count = max(1, int(self.clip_share * covariances.numel()))
        order = torch.randperm(candidates.numel(), generator=self._generator(tokens), device="cpu")
        drawn = torch.zeros_like(covariances)
        drawn[candidates[order[:count]].to(drawn.device)] = 1.0
        return TokenLosses(losses.values * (1.0 - drawn), {**losses.shares, "cov_clip_fraction": drawn})

    def _generator(self, tokens: PolicyTokens) -> torch.Generator:
        numbers = tokens.logprobs.detach().cpu().contiguous().numpy().tobytes()
        return torch.Generator("cpu").manual_seed(zlib.crc32(numbers, self.seed & 0xFFFFFFFF))


@dataclass(frozen=True, kw_only=True)
class KLCov(PolicyLoss):
    """Importance sampling with a pull to the sampler on the tokens of the highest covariance.

    With p the model's and q the sampler's logprobs, A the advantages, `r = exp(p - q)`, w the mask, and the covariances
    `(A - mean A) * (p - mean p)` over all tokens of the call, which are constants:

    - formula: `reduce(-r * A)`, plus `kl_weight * |p - q|` for the `kl_share` of the tokens with the highest covariance
    - gradient: `-w * r * A`, plus `w * kl_weight * sign(p - q)` for those tokens, which is 0 at `p = q`
    - shapes: `[N]`
    - units: those of the advantages, and nats

    There is no clip. The call's datums are coupled. Metrics: `kl_cov_fraction`, `mean_ratio`, `approx_kl`.

    Source: G. Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models".

    The settings are those of `PolicyLoss`, and:

    Args:
        kl_share: tokens that are pulled, as a share of all, > 0; at least one. The paper has 2e-3 and 2e-4.
        kl_weight: strength of the pull; 1 in the authors' code, 0.1 in a configuration of verl.
    """

    name: NonEmptyStr = "kl_cov"
    kl_share: Share = 2e-3
    kl_weight: NonNegative = 1.0

    @property
    def coupling(self) -> str | None:
        """The covariances are those of all tokens."""
        return _COUPLING

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        covariances = covariances_of(tokens)
        pulled = torch.zeros_like(covariances)
        if covariances.numel():
            pulled[covariances.topk(max(1, int(self.kl_share * covariances.numel()))).indices] = 1.0
        pull = self.kl_weight * pulled * tokens.log_ratio.abs()
        return TokenLosses(pull - tokens.ratio * tokens.advantages, {"kl_cov_fraction": pulled})


def covariances_of(tokens: PolicyTokens) -> torch.Tensor:
    """Returns `(A - mean A) * (p - mean p)` of each token, `[M]`, without a gradient."""
    advantages, logprobs = tokens.advantages, tokens.logprobs.detach()
    if not advantages.numel():
        return advantages
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())
