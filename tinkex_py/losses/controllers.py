"""Weight controllers: hold a KL or an entropy at a target, hold a gradient ratio, balance, keep bounds."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.balancing import DWA as DWA, FAMO as FAMO, UncertaintyWeighting as UncertaintyWeighting
from tinkex_py.losses.checks import checked_number
from tinkex_py.losses.constraints import (
    Constraint as Constraint,
    DualAscent as DualAscent,
    LogDualAscent as LogDualAscent,
    PIDMultiplier as PIDMultiplier,
)
from tinkex_py.losses.output import value_over_calls
from tinkex_py.losses.weights import WeightController

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput


class AdaptiveKL(WeightController):
    """Keeps the value of a regularizer, usually a KL, near a target.

    Update once per optimizer step, where `value` is the mean over its custom steps:

        error = clip(value / target - 1, -0.2, 0.2);    weight <- weight * (1 + error / horizon)

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), section 2.2, whose K is
    `1 / horizon`; they use 0.1. Other libraries count the horizon in samples: divide it by the number of samples per
    optimizer step.

    Args:
        initial: first weight, > 0.
        target: value to keep, > 0, in the units of the term.
        horizon: number of optimizer steps over which an error acts, > 0.2 (at 0.2 a weight could become 0 in one step
            and stay there).
        minimum: lower bound of the weight.
        maximum: upper bound of the weight.
    """

    def __init__(
        self, *, initial: float, target: float, horizon: float = 10.0, minimum: float = 0.0, maximum: float = math.inf
    ) -> None:
        checked_number("AdaptiveKL", "initial", initial, above=0.0)
        super().__init__(initial=initial, minimum=minimum, maximum=maximum)
        self.target = checked_number("AdaptiveKL", "target", target, above=0.0)
        self.horizon = checked_number("AdaptiveKL", "horizon", horizon, above=0.2)

    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """Implements `WeightController.next_weights`."""
        return {name: weight * self._factor(_mean_value(name, outputs)) for name, weight in weights.items()}

    def _factor(self, value: float) -> float:
        error = min(max(value / self.target - 1.0, -0.2), 0.2)
        return 1.0 + error / self.horizon


class AdaptiveEntropy(WeightController):
    """Raises an entropy bonus while the entropy is below a target, and applies none above it.

    Update once per optimizer step, where H is the entropy that the step's calls measured:

        coefficient <- min(maximum, coefficient + delta) if H <= target, else max(0, coefficient - delta)
        weight <- coefficient if H <= target, else 0

    The regularizer must report `entropy` with a mean over tokens, such as `SampledEntropy(reduction="token-mean")`. H
    is the mean over all tokens of the calls.

    Source: Skywork, "Skywork Open Reasoner 1"; `use_adaptive_entropy` in TRL.

    Args:
        target: entropy in nats below which the bonus acts.
        delta: change of the coefficient per optimizer step, > 0; 0.005 in TRL, 1e-4 in Skywork's scripts.
        initial: first coefficient.
        maximum: largest coefficient.
    """

    saved_numbers = ("coefficients",)

    def __init__(self, *, target: float, delta: float = 0.005, initial: float = 0.0, maximum: float = 1.0) -> None:
        super().__init__(initial=initial, maximum=maximum)
        self.target = checked_number("AdaptiveEntropy", "target", target, above=0.0)
        self.delta = checked_number("AdaptiveEntropy", "delta", delta, above=0.0)
        self._coefficients: dict[str, float] = {}

    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """Implements `WeightController.next_weights`."""
        moved: dict[str, float] = {}
        for name in weights:
            is_low = _entropy(name, outputs) <= self.target
            before = self._coefficients.get(name, self.initial)
            after = min(self.maximum, before + self.delta) if is_low else max(0.0, before - self.delta)
            self._coefficients[name] = after
            moved[name] = after if is_low else 0.0
        return moved


class TargetGradientRatio(WeightController):
    """Keeps the ratio of a regularizer's weighted gradient norm to that of the base loss.

    Update once per optimizer step, where the norms are means over its custom steps:

        weight <- ratio * ||g_base|| / ||g_reg||,   at most `max_factor` times larger or smaller than before

    The bound prevents a huge weight while the gradient of a regularizer is nearly zero (a KL at the start). The weight
    does not change while one of the two norms is zero. Source: the regularizers guide, "Use Gradient Norms for
    Tuning", which recommends ratios of 0.1 to 0.5.

    Args:
        ratio: ratio to keep, > 0.
        initial: first weight, > 0.
        max_factor: largest change factor in one optimizer step, > 1.
        minimum: lower bound of the weight.
        maximum: upper bound of the weight.
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
        """Implements `WeightController.next_weights`."""
        base = _mean_base_norm(outputs)
        moved: dict[str, float] = {}
        for name, weight in weights.items():
            own = _mean_norm(name, outputs)
            if base > 0 and own > 0:
                target = self.ratio * base / own
                moved[name] = min(max(target, weight / self.max_factor), weight * self.max_factor)
        return moved


class GradNormBalance(WeightController):
    """Balances the gradient norms of the base loss and the regularizers, and slows down tasks that learn faster.

    Update once per optimizer step, over the tasks i (the base loss, whose weight stays 1, and the regularizers), with

        G_i = weight_i * ||g_i||;   r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0));   target_i = mean_j(G_j) * r_i^alpha
        weight_i <- weight_i * (target_i / G_i)^rate,   then all weights divided by that of the base loss

    Source: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks"
    (2018). The paper minimizes `sum |G_i - target_i|` by gradient descent; the update here has the same fixed point
    and does not depend on the scale of the losses. A task has r_i = 1 if its current or first loss is <= 0. A
    regularizer with a zero gradient or a weight of 0 keeps its weight.

    Args:
        alpha: how strongly tasks that learn fast are slowed down, >= 0; 0 makes all norms equal.
        rate: fraction of the distance to the target per optimizer step, in (0, 1].
        initial: first weight, > 0.
        minimum: lower bound of the weight.
        maximum: upper bound of the weight.
    """

    needs_grad_norms = True
    saved_numbers = ("first_values",)

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
        """Implements `WeightController.next_weights`."""
        base_value = value_over_calls([output.base_loss for output in outputs])
        base_norm = _mean_base_norm(outputs)
        values = {name: _mean_value(name, outputs) for name in weights}
        norms = {name: weight * _mean_norm(name, outputs) for name, weight in weights.items()}
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
        """Returns the state of the controller, as plain JSON values."""
        return {**super().state_dict(), "first_base_value": self._first_base_value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `state_dict` returned.

        Raises:
            InvalidSpec: the state belongs to another class of controller.
        """
        if not isinstance(state, Mapping) or "first_base_value" not in state:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidSpec(f"GradNormBalance: the saved state must contain 'first_base_value', got {shown(state)}")
        first = state["first_base_value"]
        checked = None if first is None else checked_number("GradNormBalance", "first_base_value", first)
        super().load_state_dict(state)
        self._first_base_value = checked


def _mean_value(name: str, outputs: "Sequence[CustomLossOutput]") -> float:
    return value_over_calls([output.regularizers[name] for output in outputs if name in output.regularizers])


def _entropy(name: str, outputs: "Sequence[CustomLossOutput]") -> float:
    """Returns the entropy that a regularizer reported, as the mean over the tokens of all calls."""
    metrics = [output.regularizers[name].custom_metrics for output in outputs if name in output.regularizers]
    if not all("entropy" in own and "tokens" in own for own in metrics):
        raise InvalidSpec(
            f"AdaptiveEntropy: the regularizer {name!r} must report the metrics 'entropy' and 'tokens', as "
            "SampledEntropy does"
        )
    tokens = math.fsum(own["tokens"] for own in metrics)
    return math.fsum(own["entropy"] * own["tokens"] for own in metrics) / (tokens or 1.0)


def _mean_norm(name: str, outputs: "Sequence[CustomLossOutput]") -> float:
    norms = [output.regularizers[name].grad_norm for output in outputs if name in output.regularizers]
    return fmean(norm or 0.0 for norm in norms)


def _mean_base_norm(outputs: "Sequence[CustomLossOutput]") -> float:
    return fmean(output.base_loss.grad_norm or 0.0 for output in outputs)


def _progress(value: float, first: float) -> float:
    return value / first if value > 0 and first > 0 else 1.0
