"""Likelihood losses that weigh a token by its own probability."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.numerics import with_gradient_of
from tinkex_py.terms.ready_made import NonEmptyStr, NonNegative
from tinkex_py.terms.reduction import ReducedTerm
from tinkex_py.types import Datum

_SMALLEST_REST = 1e-5


@dataclass(frozen=True, kw_only=True)
class TokenWeighting(ReducedTerm):
    """A loss of the probability of each target token; the settings are those of `ReducedTerm`."""

    had_no_default_mask: ClassVar[bool] = False
    allows_impossible: ClassVar[bool] = False
    """True if the loss of a token of probability 0 is finite."""

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        self.check_sampled(data, logprobs, "pass [T] targets")
        positions = self.positions(data, logprobs)
        if self.allows_impossible:
            selected = positions.select(logprobs)
        else:
            selected = positions.select_finite(logprobs, data, "the model's output")
        return positions.reduce(self.token_losses(selected), self.reduction)

    @abstractmethod
    def token_losses(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Returns the loss of each token, `[M]`."""


@dataclass(frozen=True, kw_only=True)
class Focal(TokenWeighting):
    """Focal loss: tokens with a high probability count less.

    With x the logprobs, `p = exp(x)`, g the `gamma` and w the mask:

    - formula: `reduce(-(1 - p)**g * x)`
    - gradient: `w * (-(1 - p)**g + g * (1 - p)**(g - 1) * p * x)`
    - shapes: `[N]`
    - units: nats

    Source: T.-Y. Lin et al., "Focal Loss for Dense Object Detection", without its balance of classes.

    The settings are those of `ReducedTerm`, and:

    Args:
        gamma: 0 gives `NLL`; else >= 1, because the gradient at `p = 1` is infinite in between.
    """

    name: NonEmptyStr = "focal"
    gamma: NonNegative = 2.0

    def check(self) -> None:
        """Raises InvalidSpec if gamma is between 0 and 1."""
        if 0 < self.gamma < 1:
            raise self.invalid(f"gamma must be 0 or at least 1, got {self.gamma!r}")

    def token_losses(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Implements `TokenWeighting.token_losses`."""
        if self.gamma == 0:
            return -logprobs
        return -((-torch.expm1(logprobs)).clamp(min=0.0) ** self.gamma) * logprobs


@dataclass(frozen=True, kw_only=True)
class DFT(TokenWeighting):
    """Dynamic fine-tuning: each token counts with its own probability, so that unlikely ones do not dominate.

    With x the logprobs, `p = exp(x)` and w the mask:

    - formula: `reduce(-p * x)`, with p a constant for the gradient
    - gradient: `-w * p`
    - shapes: `[N]`
    - units: nats

    Source: Y. Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
    Rectification"; with `reduction="token-mean"` it is that of TRL and LLaMA-Factory.

    The settings are those of `ReducedTerm`.
    """

    name: NonEmptyStr = "dft"

    @property
    def surrogate(self) -> str | None:
        """The probability that weighs a token is a constant."""
        return "the probability that weighs a token is a constant"

    def token_losses(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Implements `TokenWeighting.token_losses`."""
        return -logprobs.detach().exp() * logprobs


@dataclass(frozen=True, kw_only=True)
class Unlikelihood(TokenWeighting):
    """Unlikelihood: makes the target tokens of the mask less likely.

    With x the logprobs, `p = exp(x)` and w the mask:

    - formula: `reduce(-log(1 - p))`
    - gradient: `w * p / (1 - p)`; `1 - p` is at least 1e-5 in both
    - shapes: `[N]`
    - units: nats

    Use it beside `NLL`: as a regularizer whose `mask` marks the tokens to avoid.

    Source: S. Welleck et al., "Neural Text Generation with Unlikelihood Training".

    The settings are those of `ReducedTerm`.
    """

    allows_impossible: ClassVar[bool] = True

    name: NonEmptyStr = "unlikelihood"

    def token_losses(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Implements `TokenWeighting.token_losses`."""
        rest = -torch.expm1(logprobs)
        near = rest < _SMALLEST_REST
        floor = torch.full_like(logprobs, -math.log(_SMALLEST_REST))
        return torch.where(
            near,
            with_gradient_of(floor, logprobs.exp() / _SMALLEST_REST),
            -torch.where(near, 1.0, rest).log(),
        )
