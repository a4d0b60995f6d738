"""Weight controllers that balance the base loss and the regularizers by their values, without gradients.

The tasks are the base loss, whose weight stays 1, and the regularizers; all weights are divided by that of the base
loss. `initial` multiplies the weights of the regularizers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinkex_py.losses.checks import checked_number, checked_steps, saved_steps
from tinkex_py.losses.output import BASE_LOSS_NAME, value_over_calls
from tinkex_py.losses.weights import WeightController

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput

_ADAM = 0.9, 0.999, 1e-8
_SMALLEST_GAP = 1e-8
# A loss that was nearly 0 must not give a weight that overflows.
_LARGEST_EXPONENT = 20.0


class DWA(WeightController):
    """Gives more weight to tasks whose loss falls slowly: dynamic weight average.

    Over windows of optimizer steps, with `L_i(t)` the mean loss of task i in window t:

        u_i = L_i(t-1) / L_i(t-2);   weight_i <- initial * exp((u_i - u_base) / temperature)

    The first two windows have the initial weight. A task has `u_i = 1` if one of its two losses is <= 0.

    Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention" (2019); windows are epochs there.

    Args:
        temperature: > 0; a larger one makes the weights more equal.
        window: number of optimizer steps, >= 1.
        initial: first weight, > 0.
        minimum: lower bound of the weight.
        maximum: upper bound of the weight.
    """

    saved_numbers = ("sums", "counts", "latest", "before")

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        window: int = 1,
        initial: float = 1.0,
        minimum: float = 0.0,
        maximum: float = math.inf,
    ) -> None:
        checked_number("DWA", "initial", initial, above=0.0)
        super().__init__(initial=initial, minimum=minimum, maximum=maximum)
        self.temperature = checked_number("DWA", "temperature", temperature, above=0.0)
        self.window = checked_steps("DWA", "window", window, at_least=1)
        self._steps = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._before: dict[str, float] = {}

    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """Implements `WeightController.next_weights`."""
        for name, value in _values(weights, outputs).items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0.0) + 1.0
        self._steps += 1
        if self._steps % self.window:
            return {}
        self._before = self._latest
        self._latest = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        if BASE_LOSS_NAME not in self._before:
            return {}
        base = self._speed(BASE_LOSS_NAME)
        return {
            name: self.initial * math.exp(min((self._speed(name) - base) / self.temperature, _LARGEST_EXPONENT))
            for name in weights
            if name in self._before and name in self._latest
        }

    def _speed(self, name: str) -> float:
        latest, before = self._latest[name], self._before[name]
        return latest / before if latest > 0 and before > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the controller, as plain JSON values."""
        return {**super().state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `state_dict` returned.

        Raises:
            InvalidSpec: the state belongs to another class of controller.
        """
        steps = saved_steps("DWA", state, "steps")
        super().load_state_dict(state)
        self._steps = steps


class UncertaintyWeighting(WeightController):
    """Learns how uncertain each task is, and weighs it by the inverse: large losses get small weights.

    Every task has a log variance s, which descends on `L / (2 * exp(s)) + s / 2` once per optimizer step, with a slope
    of at most 1:

        s_i <- s_i - rate * clip(1/2 - L_i / (2 * exp(s_i)), -1, 1);   weight_i <- initial * exp(s_base - s_i)

    It ends at `s = log L`, where every weighted loss is equal. A task whose loss is <= 0 has no such point, and keeps
    its s.

    Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics" (2018), the form for regression. There the optimizer of the model learns s.

    Args:
        rate: step size of the descent, > 0.
        initial: first weight, > 0.
        minimum: lower bound of the weight.
        maximum: upper bound of the weight.
    """

    saved_numbers = ("log_variances",)

    def __init__(
        self, *, rate: float = 0.05, initial: float = 1.0, minimum: float = 0.0, maximum: float = math.inf
    ) -> None:
        checked_number("UncertaintyWeighting", "initial", initial, above=0.0)
        super().__init__(initial=initial, minimum=minimum, maximum=maximum)
        self.rate = checked_number("UncertaintyWeighting", "rate", rate, above=0.0)
        self._log_variances: dict[str, float] = {}

    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """Implements `WeightController.next_weights`."""
        for name, value in _values(weights, outputs).items():
            own = self._log_variances.setdefault(name, 0.0)
            if value > 0:
                self._log_variances[name] = own - self.rate * max(log_variance_slope(value, own), -1.0)
        base = self._log_variances[BASE_LOSS_NAME]
        return {name: self.initial * math.exp(base - self._log_variances[name]) for name in weights}


class FAMO(WeightController):
    """Lets all losses fall at the same relative rate: fast adaptive multitask optimization.

    With the gap `D_i = L_i - lower_bound` and `z = softmax(xi)`:

        weight_i <- initial * (z_i / D_i) / (z_base / D_base)

    After each optimizer step, xi moves by Adam against the slope `z_i * (d_i - sum(z * d))`, where
    `d_i = log D_i(before) - log D_i(now)` is the progress of the task. The paper measures it on the same batch, which
    needs a second forward pass. Here "now" is the next step: exact if all steps see the same data, else with the noise
    of the batches, which small rates average out. A step in which a gap is not above 0 changes nothing.

    Source: Liu et al., "FAMO: Fast Adaptive Multitask Optimization" (2023), with the constants of the authors' code.

    Args:
        rate: step size of Adam, > 0.
        decay: decay of xi to 0, >= 0, added to its slope.
        lower_bound: smallest possible loss of all tasks.
        initial: first weight, > 0.
        minimum: lower bound of the weight.
        maximum: upper bound of the weight.
    """

    saved_numbers = ("logits", "gaps", "first", "second")

    def __init__(
        self,
        *,
        rate: float = 0.025,
        decay: float = 0.01,
        lower_bound: float = 0.0,
        initial: float = 1.0,
        minimum: float = 0.0,
        maximum: float = math.inf,
    ) -> None:
        checked_number("FAMO", "initial", initial, above=0.0)
        super().__init__(initial=initial, minimum=minimum, maximum=maximum)
        self.rate = checked_number("FAMO", "rate", rate, above=0.0)
        self.decay = checked_number("FAMO", "decay", decay, at_least=0.0)
        self.lower_bound = checked_number("FAMO", "lower_bound", lower_bound)
        self._logits: dict[str, float] = {}
        self._gaps: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._second: dict[str, float] = {}
        self._moves = 0

    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """Implements `WeightController.next_weights`."""
        values = _values(weights, outputs)
        gaps = {name: value - self.lower_bound + _SMALLEST_GAP for name, value in values.items()}
        if min(gaps.values()) <= 0:
            self._gaps = {}
            return {}
        for name in gaps:
            self._logits.setdefault(name, 0.0)
        if self._gaps.keys() == gaps.keys():
            self._move({name: math.log(self._gaps[name]) - math.log(gap) for name, gap in gaps.items()})
        self._gaps = gaps
        shares = softmax({name: self._logits[name] for name in gaps})
        base = shares[BASE_LOSS_NAME] / gaps[BASE_LOSS_NAME]
        return {name: self.initial * shares[name] / gaps[name] / base for name in weights}

    def _move(self, progress: Mapping[str, float]) -> None:
        """One step of Adam."""
        first, second, epsilon = _ADAM
        self._moves += 1
        slopes = famo_slopes({name: self._logits[name] for name in progress}, progress)
        for name, own in slopes.items():
            slope = own + self.decay * self._logits[name]
            self._first[name] = first * self._first.get(name, 0.0) + (1 - first) * slope
            self._second[name] = second * self._second.get(name, 0.0) + (1 - second) * slope * slope
            mean = self._first[name] / (1 - first**self._moves)
            size = math.sqrt(self._second[name] / (1 - second**self._moves))
            self._logits[name] -= self.rate * mean / (size + epsilon)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the controller, as plain JSON values."""
        return {**super().state_dict(), "moves": self._moves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `state_dict` returned.

        Raises:
            InvalidSpec: the state belongs to another class of controller.
        """
        moves = saved_steps("FAMO", state, "moves")
        super().load_state_dict(state)
        self._moves = moves


def log_variance_slope(value: float, log_variance: float) -> float:
    """Returns the slope of `L / (2 * exp(s)) + s / 2` in s."""
    return 0.5 - 0.5 * value * math.exp(-log_variance)


def softmax(logits: Mapping[str, float]) -> dict[str, float]:
    """Returns the shares of the tasks."""
    largest = max(logits.values())
    powers = {name: math.exp(logit - largest) for name, logit in logits.items()}
    total = math.fsum(powers.values())
    return {name: power / total for name, power in powers.items()}


def famo_slopes(logits: Mapping[str, float], progress: Mapping[str, float]) -> dict[str, float]:
    """Returns the slope of each logit, given the progress of each task."""
    shares = softmax(logits)
    mean = math.fsum(shares[name] * own for name, own in progress.items())
    return {name: shares[name] * (own - mean) for name, own in progress.items()}


def _values(weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> dict[str, float]:
    """Returns the loss of each task over the calls of an optimizer step."""
    values = {BASE_LOSS_NAME: value_over_calls([output.base_loss for output in outputs])}
    for name in weights:
        own = [output.regularizers[name] for output in outputs if name in output.regularizers]
        values[name] = value_over_calls(own)
    return values
