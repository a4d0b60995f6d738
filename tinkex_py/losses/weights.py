"""What a regularizer's weight may be: a number, a schedule of the step, or a controller that reads the outputs."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.checks import checked_number, checked_numbers, number_or_nan

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput


class WeightController(ABC):
    """A weight that follows what the terms measured.

    One controller may weigh several regularizers, of several pipelines; it keeps a weight for each name. A training
    client updates the controllers of its custom steps once per optimizer step, with the outputs of all custom steps
    since the one before. Where a pipeline is used alone, call `Pipeline.update_controllers`.

    Subclasses say in `next_weights` how the weights move.

    Args:
        initial: first weight of every regularizer, finite and >= 0.
        minimum: no weight goes below it.
        maximum: no weight goes above it.

    Raises:
        InvalidSpec: a number cannot be used.
    """

    needs_grad_norms = False
    """Whether `next_weights` reads gradient norms; they are tracked then, whatever the pipeline says."""

    def __init__(self, *, initial: float, minimum: float = 0.0, maximum: float = math.inf) -> None:
        title = type(self).__name__
        self.initial = checked_number(title, "initial", initial, at_least=0.0)
        self.minimum = checked_number(title, "minimum", minimum, at_least=0.0)
        self.maximum = math.inf if maximum == math.inf else checked_number(title, "maximum", maximum, at_least=0.0)
        if not self.minimum <= self.initial <= self.maximum:
            raise InvalidSpec(f"{title}: initial {initial!r} must lie between minimum {minimum!r} and {maximum!r}")
        self._weights: dict[str, float] = {}

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights of all regularizers that this controller has weighed so far, by name."""
        return dict(self._weights)

    def weight_of(self, name: str) -> float:
        """The weight of a regularizer now."""
        return self._weights.setdefault(name, self.initial)

    def update(self, outputs: "Sequence[CustomLossOutput]") -> None:
        """Moves the weights once, after an optimizer step.

        Args:
            outputs: of the custom steps that this optimizer step applied. Regularizers that are in none of them (they
                were skipped, disabled or belong to another pipeline) keep their weight.
        """
        seen = [name for name in self._weights if any(name in output.regularizers for output in outputs)]
        if not seen:
            return
        moved = self.next_weights({name: self._weights[name] for name in seen}, outputs)
        self._weights |= {name: self._next(name, weight) for name, weight in moved.items()}

    def _next(self, name: str, weight: float) -> float:
        checked = checked_number(type(self).__name__, f"the next weight of {name!r}", weight, at_least=0.0)
        return min(max(checked, self.minimum), self.maximum)

    @abstractmethod
    def next_weights(self, weights: Mapping[str, float], outputs: "Sequence[CustomLossOutput]") -> Mapping[str, float]:
        """The weights after an optimizer step.

        Args:
            weights: those that are due, by name; each is in at least one output.
            outputs: of the custom steps that the optimizer step applied.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain JSON values."""
        return {"weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            InvalidSpec: this is not the state of such a controller.
        """
        self._weights = checked_numbers(type(self).__name__, state, "weights")


Schedule = Callable[[int], float]
Weight = float | Schedule | WeightController


def checked_weight(weight: object, name: str) -> Weight:
    """A weight that can be used: a finite number >= 0, a schedule, or a controller.

    Raises:
        InvalidSpec: naming the spec and the value.
    """
    if isinstance(weight, WeightController):
        return weight
    if callable(weight) and not isinstance(weight, type | np.generic):
        try:
            inspect.signature(weight).bind(0)
        except TypeError as error:
            raise InvalidSpec(f"regularizer {name!r}: a schedule is called as weight(step): {error}") from None
        except ValueError:  # a builtin without a signature: it is checked when it is called
            pass
        return cast("Schedule", weight)
    number = number_or_nan(cast("object", weight))
    if not (math.isfinite(number) and number >= 0):
        raise InvalidSpec(
            f"regularizer {name!r}: weight must be a finite number >= 0, a schedule or a controller, got {weight!r}"
        )
    return number


def weight_at(weight: Weight, name: str, step: int) -> float:
    """The number a weight stands for at a step.

    Args:
        weight: of the regularizer.
        name: of the regularizer.
        step: optimizer steps made before.

    Raises:
        InvalidSpec: the schedule failed, or gave no finite number >= 0.
    """
    if isinstance(weight, int | float):
        return weight
    if isinstance(weight, WeightController):
        return weight.weight_of(name)
    try:
        given = weight(step)
    except Exception as error:
        raise InvalidSpec(
            f"regularizer {name!r}: the schedule of its weight failed at step {step} with {type(error).__name__}"
        ) from error
    number = number_or_nan(given)
    if not (math.isfinite(number) and number >= 0):
        raise InvalidSpec(
            f"regularizer {name!r}: the schedule of its weight gave {given!r} at step {step}, not a finite number >= 0"
        )
    return number
