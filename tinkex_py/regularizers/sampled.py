"""Estimators of KL divergence and entropy from the logprobs of sampled tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.regularizers.distributions import Mode
from tinkex_py.terms.fields import aligned_field
from tinkex_py.terms.numerics import safe_exp, safe_expm1, with_gradient_of
from tinkex_py.terms.ready_made import ADDED, NonEmptyStr
from tinkex_py.terms.reduction import Positions, ReducedTerm
from tinkex_py.terms.reference import ReferenceTerm
from tinkex_py.types import Datum

Estimator = Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledKL(ReferenceTerm):
    """`KL(model || reference)`, estimated from tokens that the model sampled.

    With `d = log p - log q`, p the model's and q the reference's probability of the token, one number per position:

    | estimator | value | gradient in d | expected gradient over samples of p |
    | --- | --- | --- | --- |
    | `k1` | `d` | `1` | 0 |
    | `k2` | `d**2 / 2` | `d` | the gradient of `KL(p || q)` |
    | `k3` | `exp(-d) - 1 + d` | `1 - exp(-d)` | the gradient of `KL(q || p)` |
    | `abs` | `abs(d)` | `sign(d)` | the gradient of neither |
    | `k1+`, `k2+`, `k3+`, `abs+` | as without `+` | `d` | the gradient of `KL(p || q)` |

    The values of k1 and k3 are unbiased estimates of `KL(p || q)`; k3 has the lower variance and is never negative. k2
    and abs are biased. A `+` keeps the value and uses the gradient of k2, which is unbiased.

    - formula: `reduce(estimator(d))`
    - gradient: `w` times the table's column, with w the mask
    - shapes: `[N]`, or any shape with `data=[]`
    - units: nats

    This holds for tokens sampled from the current model. For tokens of older weights or of a data set, the value is a
    distance on those tokens, not a KL divergence. The gradient is that of the divergence at each position given its
    prefix; the influence of a token on later positions is not included. In k3, `exp` continues as its tangent for
    `-d > 20`, so that nothing overflows.

    Source: J. Schulman, "Approximating KL Divergence"; `kl_penalty` of the library verl; with `sampler_field`, the
    unbiased estimate of DeepSeek-AI, "DeepSeek-V3.2" (equation 7).

    Args:
        name: default name of the regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 excludes a position, such as those of the prompt.
            Default: `weights`, if the datums have it; None: no mask.
        reference: a tensor that can be broadcast to the logprobs, or a function `reference(data)`, sync or async,
            that returns them packed, as one tensor per datum, or as the result of a client's `forward`.
        reference_field: a `loss_fn_inputs` field of every datum, `[T]`. Exactly one of `reference` and
            `reference_field` is required.
        estimator: one of the table.
        sampler_field: the field with the sampler's logprobs, for tokens that another policy sampled. With
            `r = p / p_sampler`, the value is then `r` times the estimate, and the gradient of k3 and of every `+` is
            `r * d`: unbiased again. k2 and abs are refused.
    """

    name: NonEmptyStr = "sampled_kl"
    estimator: Estimator = "k3+"
    sampler_field: NonEmptyStr | None = field(default=None, metadata=ADDED)

    def check(self) -> None:
        """Raises InvalidSpec if the estimator has a biased gradient under the ratio to the sampler."""
        super().check()
        if self.sampler_field is not None and self.estimator in ("k2", "abs"):
            raise self.invalid(
                f"estimator={self.estimator!r} times the ratio to the sampler has the gradient of no divergence: use "
                f"'{self.estimator}+', 'k1' or 'k3' with sampler_field"
            )

    @property
    def surrogate(self) -> str | None:
        """The gradient is that of k2."""
        return "the gradient is that of k2" if self.estimator.endswith("+") else None

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        self.check_sampled(data, logprobs, "use KLDivergence")
        positions = self.positions(data, logprobs)
        selected = positions.select(logprobs)
        difference = selected - self._select_reference(positions, reference, data)
        ratio = _ratio(positions, selected, data, logprobs, self.sampler_field)
        return positions.reduce(self._estimates(difference, ratio), self.reduction)

    def _estimates(self, difference: torch.Tensor, ratio: torch.Tensor | None) -> torch.Tensor:
        kind = self.estimator.removesuffix("+")
        if kind == self.estimator or (kind == "k2" and ratio is None):
            own = _estimate(kind, difference)
            return own if ratio is None else ratio * own
        value, gradient = _estimate(kind, difference.detach()), _estimate("k2", difference)
        if ratio is not None:
            value, gradient = ratio * value, ratio.detach() * gradient
        return with_gradient_of(value, gradient)


@dataclass(frozen=True, kw_only=True)
class SampledEntropy(ReducedTerm):
    """The entropy of the model, estimated from tokens that it sampled, to raise or lower it.

    `-log p` of a sampled token is an unbiased estimate of the entropy at its position. Its own gradient is 0 on
    average. The gradient is therefore that of `(log p)**2 / 2`, whose expectation is that of the negative entropy.

    - formula: `reduce(log p)` to maximize, `reduce(-log p)` to minimize
    - gradient: `w * log p` to maximize, `-w * log p` to minimize, with w the mask
    - shapes: `[N]`, or any shape with `data=[]`
    - units: nats

    This holds for tokens sampled from the current model, at each position given its prefix, as in `SampledKL`.

    Source: the score-function estimator; R. J. Williams and J. Peng, "Function Optimization Using Connectionist
    Reinforcement Learning Algorithms".

    Args:
        name: default name of the regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 excludes a position, such as those of the prompt.
            Default: `weights`, if the datums have it; None: no mask.
        mode: "maximize" or "minimize" the entropy.
        sampler_field: the field with the sampler's logprobs, for tokens that another policy sampled. With
            `r = p / p_sampler`, the value is then `r * log p`, and the gradient `r * (log p + 1)`.
    """

    name: NonEmptyStr = "sampled_entropy"
    mode: Mode = "maximize"
    sampler_field: NonEmptyStr | None = field(default=None, metadata=ADDED)

    @property
    def surrogate(self) -> str | None:
        """The derivative of the value is 0 on average."""
        return None if self.sampler_field is not None else "the derivative of the value is 0 on average"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the estimated entropy and the denominators."""
        self.check_sampled(data, logprobs, "use Entropy")
        positions = self.positions(data, logprobs)
        values = positions.select(logprobs)
        ratio = _ratio(positions, values, data, logprobs, self.sampler_field)
        surrogate = with_gradient_of(values, 0.5 * values.square()) if ratio is None else ratio * values
        negative, metrics = positions.reduce(surrogate, self.reduction)
        entropy = -positions.measured(negative, metrics, self.reduction)
        return (negative if self.mode == "maximize" else -negative), {"entropy": entropy, **metrics}


def _ratio(
    positions: Positions, selected: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor, field_name: str | None
) -> torch.Tensor | None:
    """Returns the ratio of model and sampler, with its gradient; None without a field of the sampler's logprobs."""
    if field_name is None:
        return None
    sampler = aligned_field(data, field_name, logprobs)
    return safe_exp(selected - positions.select_logprobs(sampler, data, f"the field {field_name!r}"))


def _estimate(kind: str, difference: torch.Tensor) -> torch.Tensor:
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return safe_expm1(-difference) + difference
    return difference.abs()
