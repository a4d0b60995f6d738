"""Weights that follow the measurements: hold a KL, hold a gradient ratio, balance gradient norms."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.checks import checked_number, checked_numbers
from tinkex_py.losses.weights import WeightController

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput


class AdaptiveKL(WeightController):
    """Holds the value of a regularizer, usually a KL, near a target.

    Once per optimizer step, with `value` the mean over its custom steps:

        error = clip(value / target - 1, -0.2, 0.2);    weight <- weight * (1 + error / horizon)

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), section 2.2, whose K is
    `1 / horizon`; they use 0.1. A horizon counted in samples, as other libraries have it, is divided by the
    samples of an optimizer step.

    Args:
        initial: first weight, > 0.
        target: the value to hold, > 0, in the units of the term.
        horizon: optimizer steps over which an error acts, > 0.2 (at 0.2 a weight would fall to 0 at once, for ever).
        minimum: no weight goes below it.
        maximum: no weight goes above it.
    """

    def __init__(
        self, *, initial: float, target: float, horizon: float = 10.0, minimum: float = 0.0, maximum: float = math.inf
    ) -> None:
        checked_number("AdaptiveKL", "initial", initial, above=0.0)
        super().__init__(initial=initial, minimum=minimum, maximum=maximum)
        self.target = checked_number("AdaptiveKL", "target", target, above=0.0)
        self.horizon = checked_number("AdaptiveKL", "horizon", horizon, above=0.2)

    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """See the class."""
        return {name: weight * self._factor(mean_value(name, outputs)) for name, weight in weights.items()}

    def _factor(self, value: float) -> float:
        error = min(max(value / self.target - 1.0, -0.2), 0.2)
        return 1.0 + error / self.horizon


class TargetGradientRatio(WeightController):
    """Holds the ratio of a regularizer's weighted gradient norm to that of the base loss.

    Once per optimizer step, with norms that are means over its custom steps:

        weight <- ratio * ||g_base|| / ||g_reg||,   but at most `max_factor` times larger or smaller than before

    The bound keeps a regularizer whose gradient is nearly zero (a KL at the very start) from a huge weight. While
    one of the two norms is zero the weight stays. Source: the regularizers guide, "Use Gradient Norms for Tuning",
    which aims for 0.1 to 0.5.

    Args:
        ratio: what to hold, > 0.
        initial: first weight, > 0.
        max_factor: largest change in one optimizer step, > 1.
        minimum: no weight goes below it.
        maximum: no weight goes above it.
    """

    needs_grad_norms = True

    def __init__(
        self,
        *,
        ratio: float = 0.3,
        initial: float = 0.01,
        max_factor: float = 2.0,
        minimum: float = 0.0,
        maximum: float = math.inf,
    ) -> None:
        checked_number("TargetGradientRatio", "initial", initial, above=0.0)
        super().__init__(initial=initial, minimum=minimum, maximum=maximum)
        self.ratio = checked_number("TargetGradientRatio", "ratio", ratio, above=0.0)
        self.max_factor = checked_number("TargetGradientRatio", "max_factor", max_factor, above=1.0)

    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """See the class."""
        base = mean_base_norm(outputs)
        moved: dict[str, float] = {}
        for name, weight in weights.items():
            own = mean_norm(name, outputs)
            if base > 0 and own > 0:
                wanted = self.ratio * base / own
                moved[name] = min(max(wanted, weight / self.max_factor), weight * self.max_factor)
        return moved


class GradNormBalance(WeightController):
    """Balances the gradient norms of the base loss and all regularizers it weighs, faster learners being held back.

    Once per optimizer step, over the tasks i (the base loss, whose weight stays 1, and the regularizers), with

        G_i = weight_i * ||g_i||;   r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0));   target_i = mean_j(G_j) * r_i^alpha
        weight_i <- weight_i * (target_i / G_i)^rate,   then all weights divided by that of the base loss

    Source: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks"
    (2018). They descend on `sum |G_i - target_i|`; the step here has the same resting point and does not depend on
    the scale of the losses. A task whose loss is, or began, at or below zero has r_i = 1. Without a gradient, or
    with a weight of 0, a regularizer keeps its weight.

    Args:
        alpha: how strongly fast learners are held back, >= 0; 0 makes all norms equal.
        rate: share of the way that is made in one optimizer step, in (0, 1].
        initial: first weight, > 0.
        minimum: no weight goes below it.
        maximum: no weight goes above it.
    """

    needs_grad_norms = True

    def __init__(
        self,
        *,
        alpha: float = 1.5,
        rate: float = 0.1,
        initial: float = 1.0,
        minimum: float = 0.0,
        maximum: float = math.inf,
    ) -> None:
        checked_number("GradNormBalance", "initial", initial, above=0.0)
        super().__init__(initial=initial, minimum=minimum, maximum=maximum)
        self.alpha = checked_number("GradNormBalance", "alpha", alpha, at_least=0.0)
        self.rate = checked_number("GradNormBalance", "rate", rate, above=0.0, at_most=1.0)
        self._first_values: dict[str, float] = {}
        self._first_base_value: float | None = None

    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """See the class."""
        base_value = fmean(output.base_loss.value for output in outputs)
        base_norm = mean_base_norm(outputs)
        values = {name: mean_value(name, outputs) for name in weights}
        norms = {name: weight * mean_norm(name, outputs) for name, weight in weights.items()}
        if self._first_base_value is None:
            self._first_base_value = base_value
        for name, value in values.items():
            self._first_values.setdefault(name, value)
        tasks = {name: norm for name, norm in norms.items() if norm > 0}
        if not tasks or base_norm <= 0:
            return {}
        progress = {name: _progress(values[name], self._first_values[name]) for name in tasks}
        base_progress = _progress(base_value, self._first_base_value)
        mean_progress = fmean([base_progress, *progress.values()])
        mean = fmean([base_norm, *tasks.values()])

        def step(norm: float, part: float) -> float:
            return (mean * (part / mean_progress) ** self.alpha / norm) ** self.rate

        base_step = step(base_norm, base_progress)
        return {name: weights[name] * step(norm, progress[name]) / base_step for name, norm in tasks.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain JSON values."""
        first = {"first_values": dict(self._first_values), "first_base_value": self._first_base_value}
        return {**super().state_dict(), **first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            InvalidSpec: this is not the state of such a controller.
        """
        first_values = checked_numbers("GradNormBalance", state, "first_values")
        if "first_base_value" not in state:
            raise InvalidSpec(f"GradNormBalance: a saved state must have 'first_base_value', got {dict(state)!r}")
        first = state["first_base_value"]
        super().load_state_dict(state)
        self._first_values = first_values
        self._first_base_value = None if first is None else checked_number("GradNormBalance", "first_base_value", first)


def mean_value(name: str, outputs: "Sequence[CustomLossOutput]") -> float:
    """Mean value of a regularizer over the outputs that have it."""
    return fmean(output.regularizers[name].value for output in outputs if name in output.regularizers)


def mean_norm(name: str, outputs: "Sequence[CustomLossOutput]") -> float:
    """Mean gradient norm of a regularizer, unweighted, over the outputs that have it; 0 where it is not known."""
    norms = [output.regularizers[name].grad_norm for output in outputs if name in output.regularizers]
    return fmean(norm or 0.0 for norm in norms)


def mean_base_norm(outputs: "Sequence[CustomLossOutput]") -> float:
    """Mean gradient norm of the base loss; 0 where it is not known."""
    return fmean(output.base_loss.grad_norm or 0.0 for output in outputs)


def _progress(value: float, first: float) -> float:
    return value / first if value > 0 and first > 0 else 1.0
