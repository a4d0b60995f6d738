"""Estimates from sampled tokens: KL divergence and entropy where only the logprob of each target token is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.regularizers.entropy import MODES, Mode
from tinkex_py.terms.numerics import safe_expm1, valued_as
from tinkex_py.terms.reduction import ReducedTerm
from tinkex_py.terms.reference import ReferenceTerm
from tinkex_py.types import Datum

Estimator = Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"]
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledKL(ReferenceTerm):
    """`KL(model || reference)`, estimated from tokens that the model itself sampled.

    With `d = log p - log q`, p the model's and q the reference's probability of the token, one number per position:

    | estimator | value | gradient in d | its mean over samples of p |
    | --- | --- | --- | --- |
    | `k1` | `d` | `1` | 0: it pulls nowhere |
    | `k2` | `d**2 / 2` | `d` | the gradient of `KL(p || q)` |
    | `k3` | `exp(-d) - 1 + d` | `1 - exp(-d)` | the gradient of `KL(q || p)` |
    | `abs` | `abs(d)` | `sign(d)` | that of neither |
    | `k1+`, `k2+`, `k3+`, `abs+` | as without `+` | `d` | the gradient of `KL(p || q)` |

    The values of k1 and k3 are unbiased estimates of `KL(p || q)`; k3 has the lower variance and is never negative. k2
    and abs are biased. A `+` keeps the value and takes the gradient of k2, the one that is right on average.

    - formula: `reduce(estimator(d))`
    - gradient: `w` times the table's column, with w the mask
    - shapes: `[N]`, or any shape with `data=[]`
    - units: nats

    Both hold for tokens sampled from the model as it is now. For tokens of older weights or of a data set the value is
    a distance on those tokens and no KL divergence. The gradient is that of each position's divergence given its
    prefix: that a token also changes which later positions are reached does not enter. In k3, `exp` goes on as its
    tangent for `-d > 20`, so that nothing overflows.

    Source: J. Schulman, "Approximating KL Divergence"; `kl_penalty` of the library verl.

    Args:
        name: the regularizer's name, if its spec gives none.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 leaves a position out, as prompts should be.
        reference: a tensor that can be broadcast to the logprobs, or a function `reference(data)`, sync or async,
            that gives them packed, as one tensor per datum, or as the result of a client's `forward`.
        reference_field: a `loss_fn_inputs` field of every datum, `[T]`. Exactly one of `reference` and
            `reference_field` is given.
        estimator: one of the table.
    """

    name: str = "sampled_kl"
    estimator: Estimator = "k3+"

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_choice("estimator", ESTIMATORS)

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; the denominators are its metrics."""
        self._check_sampled(data, logprobs, "use KLDivergence")
        positions = self.positions(data, logprobs)
        difference = positions.select(logprobs) - positions.select(reference)
        return positions.reduce(self._estimates(difference), self.reduction)

    def _estimates(self, difference: torch.Tensor) -> torch.Tensor:
        kind = self.estimator.removesuffix("+")
        if kind == self.estimator or kind == "k2":
            return _estimate(kind, difference)
        return valued_as(_estimate(kind, difference.detach()), gradient_of=_estimate("k2", difference))


@dataclass(frozen=True, kw_only=True)
class SampledEntropy(ReducedTerm):
    """The model's entropy, estimated from tokens that it sampled itself; to be raised or lowered.

    `-log p` of a sampled token is an unbiased estimate of the entropy at its position. Its own gradient is 0 on
    average, so the gradient is taken from `(log p)**2 / 2`, whose mean is the gradient of the negative entropy.

    - formula: `reduce(log p)` to maximize, `reduce(-log p)` to minimize
    - gradient: `w * log p` to maximize, `-w * log p` to minimize, with w the mask
    - shapes: `[N]`, or any shape with `data=[]`
    - units: nats

    It holds for tokens sampled from the model as it is now, position by position, as in `SampledKL`.

    Source: the score-function estimator; R. J. Williams and J. Peng, "Function Optimization Using Connectionist
    Reinforcement Learning Algorithms".

    Args:
        name: the regularizer's name, if its spec gives none.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]`; 0 leaves a position out, as prompts should be.
        mode: "maximize" or "minimize" the entropy.
    """

    name: str = "sampled_entropy"
    mode: Mode = "maximize"

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_choice("mode", MODES)

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; the estimated entropy and the denominators are its metrics."""
        self._check_sampled(data, logprobs, "use Entropy")
        positions = self.positions(data, logprobs)
        values = positions.select(logprobs)
        surrogate = valued_as(values, gradient_of=0.5 * values.square())
        negative, metrics = positions.reduce(surrogate, self.reduction)
        return (negative if self.mode == "maximize" else -negative), {"entropy": -negative.detach(), **metrics}


def _estimate(kind: str, difference: torch.Tensor) -> torch.Tensor:
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return safe_expm1(-difference) + difference
    return difference.abs()
