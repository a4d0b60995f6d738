"""Weights that depend on the step. A schedule is any callable `step -> weight`; these are the usual ones.

`step` is the number of optimizer steps that the training client has handed over; a pipeline used alone takes it as
`step=`. Every schedule keeps its last value after its end.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.checks import checked_number
from tinkex_py.losses.weights import Schedule, checked_weight, weight_at


@dataclass(frozen=True)
class Constant:
    """Always the same weight.

    Args:
        value: finite and >= 0.
    """

    value: float

    def __post_init__(self) -> None:
        checked_number("Constant", "value", self.value, at_least=0.0)

    def __call__(self, step: int) -> float:  # noqa: ARG002  # what a schedule is called with
        """The weight at a step."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in a straight line: `start + (end - start) * step / steps`.

    Args:
        start: weight at step 0.
        end: weight from step `steps` on.
        steps: how many, >= 1.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_ramp("Linear", self.start, self.end, self.steps)

    def __call__(self, step: int) -> float:
        """The weight at a step."""
        return _between(self.start, self.end, _progress(step, self.steps))


@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` along half a cosine: `end + (start - end) * (1 + cos(pi * step / steps)) / 2`.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (2017), without restarts.

    Args:
        start: weight at step 0.
        end: weight from step `steps` on.
        steps: how many, >= 1.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_ramp("Cosine", self.start, self.end, self.steps)

    def __call__(self, step: int) -> float:
        """The weight at a step."""
        return _between(self.end, self.start, (1 + math.cos(math.pi * _progress(step, self.steps))) / 2)


@dataclass(frozen=True)
class WarmUp:
    """From 0 to a weight in a straight line, then that weight, or another schedule counted from the end of the warm-up.

    Args:
        steps: how many, >= 1.
        then: what follows; during the warm-up its value at 0 is what is aimed at.
    """

    steps: int
    then: float | Schedule

    def __post_init__(self) -> None:
        _check_steps("WarmUp", self.steps)
        checked_weight(self.then, "WarmUp.then")

    def __call__(self, step: int) -> float:
        """The weight at a step."""
        after = weight_at(self.then, "WarmUp.then", max(0, step - self.steps))
        return after * _progress(step, self.steps)


@dataclass(frozen=True)
class Piecewise:
    """A weight that jumps: the value of the last boundary that has been reached.

    Args:
        values: step -> weight from there on; step 0 must be among them.
    """

    values: Mapping[int, float]

    def __post_init__(self) -> None:
        if 0 not in self.values:
            raise InvalidSpec(f"Piecewise: values must say what holds from step 0 on, got {dict(self.values)!r}")
        for step, value in self.values.items():
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InvalidSpec(f"Piecewise: a boundary must be an int >= 0, got {step!r}")
            checked_number("Piecewise", f"the weight from step {step}", value, at_least=0.0)
        object.__setattr__(self, "values", dict(sorted(self.values.items())))

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(tuple(self.values.items()))

    def __call__(self, step: int) -> float:
        """The weight at a step."""
        return self.values[max(boundary for boundary in self.values if boundary <= max(0, step))]


def _check_ramp(title: str, start: float, end: float, steps: int) -> None:
    checked_number(title, "start", start, at_least=0.0)
    checked_number(title, "end", end, at_least=0.0)
    _check_steps(title, steps)


def _check_steps(title: str, steps: object) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidSpec(f"{title}: steps must be an int >= 1, got {steps!r}")


def _progress(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0)


def _between(start: float, end: float, part: float) -> float:
    # Not start + part * (end - start): at part 1 that may miss `end` by a rounding, even below 0.
    return start * (1 - part) + end * part
