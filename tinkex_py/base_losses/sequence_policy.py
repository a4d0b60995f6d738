"""Policy gradients whose ratio is that of a whole answer."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tinkex_py.base_losses.policy import ClippedPolicyLoss, PolicyLoss, PolicyTokens, TokenLosses
from tinkex_py.errors import InvalidData
from tinkex_py.terms.fields import aligned_field, has_field
from tinkex_py.terms.numerics import EXACT_UP_TO, safe_exp, with_gradient_of
from tinkex_py.terms.ready_made import NonEmptyStr, NonNegative, Positive
from tinkex_py.terms.reduction import Positions, Reduction

_LOWEST_RATIO = math.exp(-0.4)  # of GMPO


@dataclass(frozen=True, kw_only=True)
class GSPO(ClippedPolicyLoss):
    """Group sequence policy optimization: all tokens of an answer have its geometric mean ratio.

    With p the model's and q the sampler's logprobs, A the advantages, w the mask, and for each datum
    `g = exp(mean(p - q))`, a constant for the gradient:

    - formula: `reduce(-min(r * A, clip(r, low, high) * A))` with `r = g * exp(p - stop_gradient(p))`, which is g
    - gradient: `-w * g * A`; 0 where `A > 0` and `g > high`, and where `A < 0` and `g < low`
    - shapes: `[N]`
    - units: those of the advantages

    It is the token form of the paper (GSPO-token), in which A may differ between the tokens. With equal advantages and
    reduction `seq-mean-token-mean`, its gradient is that of the sequence form. With `seq-mean-token-sum` it is LUSPO.

    Source: C. Zheng et al., "Group Sequence Policy Optimization"; the Tinker API's `gspo`; LUSPO: "Length-Unbiased
    Sequence Policy Optimization".

    The settings are those of `PolicyLoss`, and:

    Args:
        clip_low_threshold: smallest ratio; the paper has 1 - 3e-4.
        clip_high_threshold: largest ratio; the paper has 1 + 4e-4.
        ratio_mask: a `loss_fn_inputs` field of every datum, `[T]`, that is not 0 on the positions over which g is the
            mean. None: `sequence_ratio_mask`, as on the services, if the datums have it, else the positions of `mask`.
    """

    by_datum: ClassVar[bool] = True

    name: NonEmptyStr = "gspo"
    ratio_mask: NonEmptyStr | None = None

    @property
    def surrogate(self) -> str | None:
        """The ratio of the answer is a constant."""
        return "the ratio of the answer is a constant"

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        ratio = tokens.positions.spread(safe_exp(self._mean_log_ratios(tokens))).expand_as(tokens.logprobs)
        return self.clipped_losses(with_gradient_of(ratio, ratio * tokens.logprobs), tokens.advantages)

    def _mean_log_ratios(self, tokens: PolicyTokens) -> torch.Tensor:
        """Returns the mean of `p - q` for each datum, without a gradient."""
        name = self.ratio_mask
        if name is None and has_field(tokens.data, "sequence_ratio_mask"):
            name = "sequence_ratio_mask"
        if name is None:
            return tokens.positions.means(tokens.log_ratio.detach())
        logprobs = tokens.all_logprobs.detach()
        mask = (aligned_field(tokens.data, name, logprobs) != 0).to(logprobs.dtype)
        positions = Positions.of(tokens.data, logprobs, weights=mask, by_datum=True)
        sampler = aligned_field(tokens.data, self.logprobs_field, logprobs)
        log_ratio = positions.select(logprobs) - positions.select(sampler)
        empty = (positions.sizes(log_ratio) == 0) & (tokens.positions.sizes(tokens.logprobs) != 0)
        if bool(empty.any()):
            raise InvalidData(
                f"{name!r} of datum {int(empty.nonzero()[0])} has only zeros, so that there is no sequence ratio: "
                "leave the datum out, or mark its answer"
            )
        return positions.means(log_ratio)


@dataclass(frozen=True, kw_only=True)
class GMPO(ClippedPolicyLoss):
    """Geometric-mean policy optimization: the ratio of an answer is the geometric mean of its clipped token ratios.

    With p the model's and q the sampler's logprobs, A the advantage of the datum and w the mask:

    - formula: `-A * g` with `g = exp(mean(d))` for each datum, where `d = p - q`, at most `log high` if `A > 0`, and at
      least `log low` if `A < 0`; then the mean over datums
    - gradient: `-A * g / |y|` with |y| the number of tokens of the datum, 0 where d is clipped
    - shapes: `[N]`
    - units: those of the advantages

    Every token has the loss of its answer, so another reduction weighs answers by their length.

    Source: Y. Zhao et al., "Geometric-Mean Policy Optimization".

    The settings are those of `PolicyLoss`, and:

    Args:
        clip_low_threshold: smallest ratio of a token, > 0; a ratio, not its logarithm.
        clip_high_threshold: largest ratio of a token.
    """

    by_datum: ClassVar[bool] = True

    name: NonEmptyStr = "gmpo"
    reduction: Reduction = "seq-mean-token-mean"
    clip_low_threshold: NonNegative = _LOWEST_RATIO
    clip_high_threshold: Positive = 1.0 / _LOWEST_RATIO

    def check(self) -> None:
        """Raises InvalidSpec if the thresholds are not in order, or the lower one has no logarithm."""
        super().check()
        if self.clip_low_threshold == 0:
            raise self.invalid("clip_low_threshold must be above 0, because its logarithm is the bound")

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        positions, advantages = tokens.positions, tokens.advantages
        of_datum = positions.means(advantages)
        self._check_constant(tokens, of_datum)
        free = tokens.log_ratio
        limited = torch.where(
            advantages > 0,
            free.clamp(max=math.log(self.clip_high_threshold)),
            free.clamp(min=math.log(self.clip_low_threshold)),
        )
        stopped = limited != free
        losses = -of_datum * safe_exp(positions.means(limited))
        return TokenLosses(positions.spread(losses).expand_as(free), {"clip_fraction": stopped})

    def _check_constant(self, tokens: PolicyTokens, of_datum: torch.Tensor) -> None:
        mean = tokens.positions.spread(of_datum)
        differs = (tokens.advantages - mean).abs() > 1e-5 * mean.abs().clamp(min=1.0)
        if bool(differs.any()):
            raise InvalidData(
                f"GMPO needs one advantage per datum, but {self.advantages_field!r} varies within a datum (one token "
                f"has {tokens.advantages[differs][0].item():.6g}): give all tokens of an answer the same advantage"
            )


@dataclass(frozen=True, kw_only=True)
class VESPO(PolicyLoss):
    """A sequence policy gradient with a smooth weight that is 1 on policy and falls for old samples.

    With p the model's and q the sampler's logprobs, A the advantages, w the mask, and for each datum
    `W = exp(sum(p - q))`, whose logarithm is limited to 20 either way:

    - formula: `reduce(-phi * A * p)` with `phi = W**k * exp(lam * (1 - W))`, a constant for the gradient
    - gradient: `-w * phi * A`
    - shapes: `[N]`
    - units: nats times those of the advantages

    phi is 1 at `W = 1` and largest at `W = k / lam`. Metrics: `mean_phi`, `mean_ratio`, `approx_kl`.

    Source: "VESPO: Variational Sequence-Level Soft Policy Optimization"; the defaults are those of the authors' code
    and of TRL.

    The settings are those of `PolicyLoss`, and:

    Args:
        k_positive: k for `A >= 0`.
        lam_positive: lam for `A >= 0`.
        k_negative: k for `A < 0`.
        lam_negative: lam for `A < 0`.
    """

    by_datum: ClassVar[bool] = True

    name: NonEmptyStr = "vespo"
    reduction: Reduction = "token-mean"
    k_positive: NonNegative = 2.0
    lam_positive: NonNegative = 3.0
    k_negative: NonNegative = 3.0
    lam_negative: NonNegative = 2.0

    @property
    def surrogate(self) -> str | None:
        """The weight of the answer is a constant."""
        return "the weight of the answer is a constant"

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        log_w = tokens.positions.spread(sequence_log_ratios(tokens)).expand_as(tokens.advantages)
        positive = tokens.advantages >= 0
        k = torch.where(positive, torch.full_like(log_w, self.k_positive), self.k_negative)
        lam = torch.where(positive, torch.full_like(log_w, self.lam_positive), self.lam_negative)
        phi = (k * log_w + lam * (1.0 - log_w.exp())).exp()
        return TokenLosses(-phi * tokens.advantages * tokens.logprobs, {"mean_phi": phi})


@dataclass(frozen=True, kw_only=True)
class TOPR(PolicyLoss):
    """Tapered off-policy REINFORCE: only tokens of negative advantage are weighted, with a ratio of at most 1.

    With p the model's and q the sampler's logprobs, A the advantages, w the mask, and r the ratio of the datum,
    `exp(sum(p - q))`, or that of the token:

    - formula: `reduce(-a * A * p)` with `a = 1` for `A > 0`, else `min(r, 1)`, a constant for the gradient
    - gradient: `-w * a * A`
    - shapes: `[N]`
    - units: nats times those of the advantages

    The paper weighs rewards, not normalized advantages: the baseline decides how many answers count as positive.

    Source: N. Le Roux et al., "Tapered Off-Policy REINFORCE".

    The settings are those of `PolicyLoss`, and:

    Args:
        level: "sequence" or "token".
    """

    by_datum: ClassVar[bool] = True

    name: NonEmptyStr = "topr"
    level: Literal["sequence", "token"] = "sequence"

    @property
    def surrogate(self) -> str | None:
        """The limited ratio is a constant."""
        return "the limited ratio is a constant"

    def token_losses(self, tokens: PolicyTokens) -> TokenLosses:
        """Implements `PolicyLoss.token_losses`."""
        log_ratio = tokens.log_ratio.detach()
        if self.level == "sequence":
            log_ratio = tokens.positions.spread(sequence_log_ratios(tokens))
        tapered = torch.where(tokens.advantages > 0, 1.0, log_ratio.clamp(max=0.0).exp())
        return TokenLosses(-tapered * tokens.advantages * tokens.logprobs, {"mean_weight": tapered})


def sequence_log_ratios(tokens: PolicyTokens) -> torch.Tensor:
    """Returns the sum of `p - q` over each datum, limited to 20 either way, without a gradient: `[datums]`."""
    return tokens.positions.sums(tokens.log_ratio.detach()).clamp(-EXACT_UP_TO, EXACT_UP_TO)
