"""Weights of regularizers: a number, a schedule of the step, or a controller that reads the outputs."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from tinkex_py.arguments import check_list, check_text, shown
from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.checks import checked_number, checked_numbers, number_or_nan
from tinkex_py.losses.output import CustomLossOutput


class WeightController(ABC):
    """Base of weights that adapt to the outputs of the terms.

    One controller can serve several regularizers, in several pipelines; it keeps one weight per name. A training
    client updates the controllers of its custom steps once per optimizer step, with the outputs of all custom steps
    since the previous one. Without a client, call `Pipeline.update_controllers`.

    Subclasses implement `next_weights`.

    Args:
        initial: first weight of every regularizer, finite and >= 0.
        minimum: lower bound of the weights.
        maximum: upper bound of the weights.

    Raises:
        InvalidSpec: a number is out of range.
    """

    needs_grad_norms = False
    """Whether `next_weights` reads gradient norms. If True, they are tracked regardless of `track_grad_norms`."""

    saved_numbers: tuple[str, ...] = ()
    """State of a subclass that is saved with the weights: attribute `_NAME`, numbers by name, for each NAME."""

    def __init__(self, *, initial: float, minimum: float = 0.0, maximum: float = math.inf) -> None:
        title = type(self).__name__
        self.initial = checked_number(title, "initial", initial, at_least=0.0)
        self.minimum = checked_number(title, "minimum", minimum, at_least=0.0)
        is_unlimited = isinstance(maximum, float) and maximum == math.inf
        self.maximum = math.inf if is_unlimited else checked_number(title, "maximum", maximum, at_least=0.0)
        if not self.minimum <= self.initial <= self.maximum:
            raise InvalidSpec(
                f"{title}: initial must be between minimum ({minimum!r}) and maximum ({maximum!r}), got {initial!r}"
            )
        self._weights: dict[str, float] = {}

    @property
    def weights(self) -> Mapping[str, float]:
        """Current weights by name, of all regularizers that have used this controller."""
        return dict(self._weights)

    def weight_of(self, name: str) -> float:
        """Returns the current weight of a regularizer."""
        check_text("name", name, error=InvalidSpec)
        return self._weights.setdefault(name, self.initial)

    def update(self, outputs: Sequence[CustomLossOutput]) -> None:
        """Updates the weights after an optimizer step.

        Args:
            outputs: outputs of the custom steps that the optimizer step applied. Regularizers without an output (they
                were skipped, disabled or belong to another pipeline) keep their weight.

        Raises:
            InvalidData: `outputs` is not a list of CustomLossOutput.
        """
        check_list("outputs", outputs, CustomLossOutput)
        seen = [name for name in self._weights if any(name in output.regularizers for output in outputs)]
        if not seen:
            return
        moved = self.next_weights({name: self._weights[name] for name in seen}, outputs)
        self._weights |= {name: self._next(name, weight) for name, weight in moved.items()}

    def _next(self, name: str, weight: float) -> float:
        checked = checked_number(type(self).__name__, f"the next weight of {name!r}", weight, at_least=0.0)
        return min(max(checked, self.minimum), self.maximum)

    @abstractmethod
    def next_weights(self, weights: Mapping[str, float], outputs: Sequence[CustomLossOutput]) -> Mapping[str, float]:
        """Returns the weights after an optimizer step, by name. Names that are left out keep their weight.

        Args:
            weights: current weights by name; each name is in at least one output.
            outputs: outputs of the custom steps that the optimizer step applied.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the controller, as plain JSON values."""
        return {name: dict(getattr(self, f"_{name}")) for name in ("weights", *self.saved_numbers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `state_dict` returned.

        Raises:
            InvalidSpec: the state belongs to another class of controller.
        """
        names = ("weights", *self.saved_numbers)
        loaded = {name: checked_numbers(type(self).__name__, state, name) for name in names}
        for name, numbers in loaded.items():
            setattr(self, f"_{name}", numbers)


Schedule = Callable[[int], float]
Weight = float | Schedule | WeightController


def checked_weight(weight: object, name: str) -> Weight:
    """Returns the weight if it is a finite number >= 0 (as a float), a schedule or a controller.

    Raises:
        InvalidSpec: it is something else.
    """
    if isinstance(weight, WeightController):
        return weight
    if callable(weight) and not isinstance(weight, type | np.generic):
        try:
            inspect.signature(weight).bind(0)
        except TypeError as error:
            raise InvalidSpec(
                f"regularizer {name!r}: a weight that is a schedule must accept one argument, the step: {error}"
            ) from None
        except ValueError:  # a builtin without a signature; a wrong one fails when it is called
            pass
        return cast("Schedule", weight)
    number = number_or_nan(cast("object", weight))
    if not (math.isfinite(number) and number >= 0):
        raise InvalidSpec(
            f"regularizer {name!r}: weight must be a finite number >= 0, a schedule or a controller, got "
            f"{shown(cast('object', weight))}"
        )
    return number


def weight_at(weight: Weight, name: str, step: int) -> float:
    """Returns the value of a weight at a step.

    Args:
        weight: weight of the regularizer.
        name: name of the regularizer.
        step: number of previous optimizer steps.

    Raises:
        InvalidSpec: the schedule failed or did not return a finite number >= 0.
    """
    if isinstance(weight, int | float):
        return weight
    if isinstance(weight, WeightController):
        return weight.weight_of(name)
    try:
        given = weight(step)
    except Exception as error:
        raise InvalidSpec(
            f"regularizer {name!r}: the schedule of the weight failed at step {step} with {type(error).__name__}"
        ) from error
    number = number_or_nan(given)
    if not (math.isfinite(number) and number >= 0):
        raise InvalidSpec(
            f"regularizer {name!r}: the schedule of the weight must return a finite number >= 0, got {shown(given)} at "
            f"step {step}"
        )
    return number
