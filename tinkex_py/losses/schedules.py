"""Schedules: weights that depend on the step. Any callable `step -> weight` is a schedule.

`step` is the number of optimizer steps that the training client has sent; without a client, pass it as `step=`. After
its end, a schedule keeps its last value.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from tinkex_py.arguments import plain, shown
from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.checks import checked_number, checked_steps
from tinkex_py.losses.weights import Schedule, checked_weight, weight_at


@dataclass(frozen=True)
class Constant:
    """The same weight at every step.

    Args:
        value: the weight, finite and >= 0.
    """

    value: float

    def __post_init__(self) -> None:
        checked_number("Constant", "value", self.value, at_least=0.0)
        object.__setattr__(self, "value", plain(self.value))

    def __call__(self, step: int) -> float:
        """Returns the weight at a step."""
        _check_step(self, step)
        return self.value


@dataclass(frozen=True)
class _Ramp:
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        title = type(self).__name__
        for name in ("start", "end"):
            checked_number(title, name, getattr(self, name), at_least=0.0)
            object.__setattr__(self, name, plain(getattr(self, name)))
        object.__setattr__(self, "steps", checked_steps(title, "steps", self.steps, at_least=1))

    def _between(self, part: float) -> float:
        # start + part * (end - start) may miss `end` by a rounding error at part 1, and even be negative.
        return self.start * (1 - part) + self.end * part


@dataclass(frozen=True)
class Linear(_Ramp):
    """Linear interpolation from `start` to `end`: `start + (end - start) * step / steps`.

    Args:
        start: weight at step 0.
        end: weight from step `steps` on.
        steps: number of steps, >= 1.
    """

    def __call__(self, step: int) -> float:
        """Returns the weight at a step."""
        return self._between(_progress(self, step, self.steps))


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Cosine annealing from `start` to `end`: `end + (start - end) * (1 + cos(pi * step / steps)) / 2`.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (2017), without restarts.

    Args:
        start: weight at step 0.
        end: weight from step `steps` on.
        steps: number of steps, >= 1.
    """

    def __call__(self, step: int) -> float:
        """Returns the weight at a step."""
        return self._between((1 - math.cos(math.pi * _progress(self, step, self.steps))) / 2)


@dataclass(frozen=True)
class WarmUp:
    """Linear warm-up from 0 to a weight.

    Args:
        steps: number of warm-up steps, >= 1.
        then: the weight after the warm-up, or a schedule whose step 0 is the end of the warm-up. The warm-up ends at
            its value at step 0.
    """

    steps: int
    then: float | Schedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", checked_steps("WarmUp", "steps", self.steps, at_least=1))
        checked_weight(self.then, "WarmUp.then")
        object.__setattr__(self, "then", plain(self.then))

    def __call__(self, step: int) -> float:
        """Returns the weight at a step."""
        part = _progress(self, step, self.steps)
        return part * weight_at(self.then, "WarmUp.then", max(0, step - self.steps))


@dataclass(frozen=True)
class Piecewise:
    """Piecewise constant weights.

    Args:
        values: step -> weight from that step on; step 0 is required.
    """

    values: Mapping[int, float]

    def __post_init__(self) -> None:
        given = cast("object", self.values)
        if not isinstance(given, Mapping) or 0 not in given:
            raise InvalidSpec(f"Piecewise: values must map steps, 0 among them, to weights, got {shown(self.values)}")
        values: dict[int, float] = {}
        for key, value in cast("Mapping[object, object]", given).items():
            step = checked_steps("Piecewise", "every step in values", key, at_least=0)
            checked_number("Piecewise", f"values[{step}]", value, at_least=0.0)
            values[step] = plain(value)
        object.__setattr__(self, "values", dict(sorted(values.items())))

    def __hash__(self) -> int:
        """Hash that is consistent with equality."""
        return hash(tuple(self.values.items()))

    def __call__(self, step: int) -> float:
        """Returns the weight at a step."""
        _check_step(self, step)
        _check_step(self, step)
        return self.values[max(boundary for boundary in self.values if boundary <= max(0, step))]


def _check_step(schedule: object, step: object) -> None:
    checked_number(type(schedule).__name__, "step", step)


def _progress(schedule: object, step: int, steps: int) -> float:
    _check_step(schedule, step)
    return min(max(step / steps, 0.0), 1.0)
