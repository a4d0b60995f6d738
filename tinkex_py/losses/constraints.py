"""Weight controllers that keep the value of a regularizer within a bound: the weight is the multiplier of a constraint.

The training minimizes the base loss subject to `value <= at_most`, or `value >= at_least`. The violation is
`value - at_most`, or `at_least - value`: at most 0 where the bound holds. The term adds `weight * value` to the loss,
or `-weight * value` under `at_least`.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.checks import checked_number
from tinkex_py.losses.output import TOTAL_METRIC, ConstraintOutput, MetricValue, denominator_of, mean_violation
from tinkex_py.losses.weights import WeightController

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput

# A long violation must not give an exponential that overflows.
_LARGEST_EXPONENT = 20.0


class Constraint(WeightController):
    """Base of the controllers that keep a regularizer within a bound.

    They move once per optimizer step, after it, on the mean of the term over all of its calls: the sum of value times
    denominator over the sum of the denominators, which are the metric `tokens`, `sequences` or `pairs` of the term. The
    values of a term without such a metric count the same in every call. Within one optimizer step the multiplier does
    not change. The bounded term must be a mean, because a sum grows with the batch.

    Subclasses implement `next_multiplier`.

    Args:
        at_most: upper bound of the value; exactly one of the two bounds is required.
        at_least: lower bound of the value.
        initial: first multiplier.
        maximum: largest multiplier.

    Raises:
        InvalidSpec: a number is out of range, or there is not exactly one bound.
    """

    def __init__(self, *, at_most: float | None, at_least: float | None, initial: float, maximum: float) -> None:
        super().__init__(initial=initial, maximum=maximum)
        title = type(self).__name__
        if (at_most is None) == (at_least is None):
            raise InvalidSpec(
                f"{title}: exactly one of at_most and at_least is required, got at_most={shown(at_most)} and "
                f"at_least={shown(at_least)}: for a range, use two regularizers with different names"
            )
        self.at_most = None if at_most is None else checked_number(title, "at_most", at_most)
        self.at_least = None if at_least is None else checked_number(title, "at_least", at_least)

    def __str__(self) -> str:
        """The controller and its bound, such as `DualAscent(at_most=0.05)`."""
        return f"{type(self).__name__}({'at_least' if self.at_most is None else 'at_most'}={self.bound:g})"

    @property
    def bound(self) -> float:
        """The bound."""
        bound = self.at_least if self.at_most is None else self.at_most
        assert bound is not None, "checked at construction"
        return bound

    @property
    def sign(self) -> float:
        """1.0 for an upper bound, -1.0 for a lower one: the direction in which a value is worse."""
        return -1.0 if self.at_most is None else 1.0

    def measured(self, value: float, metrics: Mapping[str, MetricValue], reduction: object) -> ConstraintOutput:
        """Returns how one call stands to the bound.

        Args:
            value: of the term; a part of the mean if it divides by the total of the step.
            metrics: of the term.
            reduction: setting of the term; None if it has none.
        """
        denominator = denominator_of(metrics, reduction)
        if TOTAL_METRIC in metrics and denominator:
            value = value * metrics[TOTAL_METRIC] / denominator
        violation = self.sign * (value - self.bound)
        return ConstraintOutput(
            at_most=self.at_most,
            at_least=self.at_least,
            value=value,
            denominator=denominator,
            violation=violation,
            feasible=violation <= 0,
        )

    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """Implements `WeightController.next_weights`."""
        moved: dict[str, float] = {}
        for name, multiplier in weights.items():
            calls = [output.regularizers[name].constraint for output in outputs if name in output.regularizers]
            violation = mean_violation([call for call in calls if call is not None])
            if violation is not None:
                moved[name] = self.next_multiplier(name, multiplier, violation)
        return moved

    @abstractmethod
    def next_multiplier(self, name: str, multiplier: float, violation: float) -> float:
        """Returns the multiplier of a regularizer after an optimizer step; it is then limited to `[0, maximum]`.

        Args:
            name: the regularizer.
            multiplier: that of the step.
            violation: that of the step.
        """


class DualAscent(Constraint):
    """Raises the multiplier while the bound is violated, and lowers it while it is not: projected dual ascent.

    Once per optimizer step:

        multiplier <- min(maximum, max(0, multiplier + rate * violation))

    Source: gradient ascent on the dual of the constrained problem; `Lagrange` in OmniSafe, there through Adam.

    Args:
        at_most: upper bound of the value; exactly one of the two bounds is required.
        at_least: lower bound of the value.
        rate: step size, > 0. None: `0.1 / |bound|`, or 0.1 for a bound of 0.
        initial: first multiplier, >= 0.
        maximum: largest multiplier.
    """

    def __init__(
        self,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        rate: float | None = None,
        initial: float = 0.0,
        maximum: float = 100.0,
    ) -> None:
        super().__init__(at_most=at_most, at_least=at_least, initial=initial, maximum=maximum)
        chosen = default_rate(self.bound) if rate is None else rate
        self.rate = checked_number("DualAscent", "rate", chosen, above=0.0)

    def next_multiplier(self, name: str, multiplier: float, violation: float) -> float:
        """Implements `Constraint.next_multiplier`."""
        del name
        return max(0.0, multiplier + self.rate * violation)


def default_rate(bound: float) -> float:
    """Returns the step size of `DualAscent` for a bound."""
    return 0.1 / (abs(bound) or 1.0)


class LogDualAscent(Constraint):
    """Dual ascent on the logarithm of the multiplier, which stays above 0.

    Once per optimizer step:

        multiplier <- min(maximum, multiplier * exp(rate * multiplier * violation))

    The factor `multiplier` in the exponent makes small multipliers slow.

    Source: Dai et al., "Safe RLHF: Safe Reinforcement Learning from Human Feedback" (2023), with its defaults.

    Args:
        at_most: upper bound of the value; exactly one of the two bounds is required.
        at_least: lower bound of the value.
        rate: step size, > 0.
        initial: first multiplier, > 0.
        maximum: largest multiplier.
    """

    def __init__(
        self,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        rate: float = 0.1,
        initial: float = 1.0,
        maximum: float = 5.0,
    ) -> None:
        checked_number("LogDualAscent", "initial", initial, above=0.0)
        super().__init__(at_most=at_most, at_least=at_least, initial=initial, maximum=maximum)
        self.rate = checked_number("LogDualAscent", "rate", rate, above=0.0)

    def next_multiplier(self, name: str, multiplier: float, violation: float) -> float:
        """Implements `Constraint.next_multiplier`."""
        del name
        return multiplier * math.exp(min(self.rate * multiplier * violation, _LARGEST_EXPONENT))


class PIDMultiplier(Constraint):
    """A multiplier that follows the violation (P), its sum (I) and its rise (D): it oscillates less than dual ascent.

    Once per optimizer step, with `sum <- min(maximum / i, max(0, sum + violation))`, and a rise of 0 at the first step:

        multiplier <- min(maximum, max(0, p * violation + i * sum + d * max(0, violation - violation before)))

    Source: Stooke, Achiam and Abbeel, "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods" (2020),
    with the gains of OmniSafe.

    Args:
        at_most: upper bound of the value; exactly one of the two bounds is required.
        at_least: lower bound of the value.
        p: gain of the violation, >= 0.
        i: gain of the sum, > 0.
        d: gain of the rise, >= 0.
        initial: first multiplier, >= 0.
        maximum: largest multiplier.
    """

    saved_numbers = ("sums", "before")

    def __init__(
        self,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        p: float = 0.1,
        i: float = 0.01,
        d: float = 0.01,
        initial: float = 0.0,
        maximum: float = 100.0,
    ) -> None:
        super().__init__(at_most=at_most, at_least=at_least, initial=initial, maximum=maximum)
        self.p = checked_number("PIDMultiplier", "p", p, at_least=0.0)
        self.i = checked_number("PIDMultiplier", "i", i, above=0.0)
        self.d = checked_number("PIDMultiplier", "d", d, at_least=0.0)
        self._sums: dict[str, float] = {}
        self._before: dict[str, float] = {}

    def next_multiplier(self, name: str, multiplier: float, violation: float) -> float:
        """Implements `Constraint.next_multiplier`."""
        del multiplier
        total = min(self.maximum / self.i, max(0.0, self._sums.get(name, 0.0) + violation))
        rise = max(0.0, violation - self._before.get(name, violation))
        self._sums[name], self._before[name] = total, violation
        return max(0.0, self.p * violation + self.i * total + self.d * rise)
