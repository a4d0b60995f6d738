"""Likelihood losses that weigh a token by its own probability."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from tinkex_py.errors import InvalidData
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.fields import aligned_field, is_one_number_per_position
from tinkex_py.terms.numerics import with_gradient_of
from tinkex_py.terms.ready_made import NonEmptyStr, NonNegative
from tinkex_py.terms.reduction import Positions, ReducedTerm
from tinkex_py.types import Datum
from tinkex_py.values import Integer

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


@dataclass(frozen=True, kw_only=True)
class EAFT(ReducedTerm):
    """Entropy-adaptive fine-tuning: tokens count less where the model is certain, so that it does not unlearn.

    With x the logprobs, w the mask, t the targets, s the probabilities of the K candidates, renormalized, and
    `H = -sum(s * log s)`:

    - formula: `reduce(-(H / log K)**alpha * sum(t * x))`, with H a constant for the gradient
    - gradient: `-w * (H / log K)**alpha * t`
    - shapes: `[N, K]`; `[N]` with `entropy_field`, where `sum(t * x)` is the logprob of the target token
    - units: nats

    The candidates are the likeliest K tokens of the model and the target token, 20 in the paper. Metrics: `entropy` and
    `token_weight`, the means of H and of its factor; and the denominators.

    Source: "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting" (2601.02151);
    LLaMA-Factory divides by 3.0, about log 20.

    The settings are those of `ReducedTerm`, and:

    Args:
        alpha: 0 gives `NLL`.
        targets_field: `[T, K]`: a `loss_fn_inputs` field of every datum that is 1 at the target token and 0 elsewhere.
        entropy_field: `[T]`: a field with the entropies of the model, such as the sampler's. It is required for `[T]`
            targets, whose logprobs do not tell the entropy.
        candidates: K, for `entropy_field`.
    """

    had_no_default_mask: ClassVar[bool] = False

    name: NonEmptyStr = "eaft"
    alpha: NonNegative = 1.0
    targets_field: NonEmptyStr = "weights"
    entropy_field: NonEmptyStr | None = None
    candidates: Annotated[Integer, Field(ge=2)] = 20

    @property
    def surrogate(self) -> str | None:
        """The entropy that weighs a token is a constant."""
        return "the entropy that weighs a token is a constant"

    def counted(self, data: Sequence[Datum], logprobs: torch.Tensor) -> Positions:
        """Selects what a mean counts."""
        return self.positions(data, logprobs, by_row=self.entropy_field is None)

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are means over the selected positions, and the denominators."""
        measure = self._given if self.entropy_field is not None else self._of_candidates
        positions, taken, entropy, count = measure(data, logprobs)
        weight = (entropy.detach() / math.log(count)) ** self.alpha
        loss, denominators = positions.reduce(-weight * taken, self.reduction)
        return loss, {
            "entropy": positions.mean(entropy.detach()),
            "token_weight": positions.mean(weight),
            **denominators,
        }

    def _given(
        self, data: Sequence[Datum], logprobs: torch.Tensor
    ) -> tuple[Positions, torch.Tensor, torch.Tensor, int]:
        """Returns positions, logprobs of the targets, entropies, and K, with entropies from a field."""
        name = self.entropy_field or ""
        self.check_sampled(data, logprobs, "remove entropy_field, or pass [T] targets")
        positions = self.counted(data, logprobs)
        taken = positions.select_finite(logprobs, data, "the model's output")
        entropy = positions.select_finite(aligned_field(data, name, logprobs), data, f"the field {name!r}")
        if bool((entropy < 0).any()):
            raise InvalidData(f"the field {name!r} has {entropy.min().item():g}, but entropies are at least 0")
        return positions, taken, entropy, self.candidates

    def _of_candidates(
        self, data: Sequence[Datum], logprobs: torch.Tensor
    ) -> tuple[Positions, torch.Tensor, torch.Tensor, int]:
        """Returns the same, with entropies of the candidates."""
        if logprobs.ndim < 2 or is_one_number_per_position(data, logprobs) or logprobs.shape[-1] < 2:
            raise InvalidData(
                f"EAFT needs the entropy of at least 2 candidates, but the logprobs have shape {tuple(logprobs.shape)}"
                ": pass [T, K] targets, or entropy_field=<field with the entropy of each position>"
            )
        positions = self.counted(data, logprobs)
        rows = positions.select(logprobs)
        targets = positions.select(aligned_field(data, self.targets_field, logprobs))
        chosen = rows.detach().log_softmax(-1)
        entropy = -(chosen.exp() * chosen.masked_fill(chosen == -math.inf, 0.0)).sum(-1)
        return positions, (targets * rows.masked_fill(targets == 0, 0.0)).sum(-1), entropy, logprobs.shape[-1]
