"""Counts a training client's optimizer steps, and lets the weights of its regularizers follow them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinkex_py import telemetry
from tinkex_py.errors import PipelineError

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.weights import WeightController


class OptimizerSteps:
    """The optimizer steps of one client that the service took.

    Attributes:
        made: how many, those before a resumed run included.
    """

    def __init__(self) -> None:
        self.made = 0
        self._outputs: dict[WeightController, list[CustomLossOutput]] = {}
        self._failure: PipelineError | None = None

    def add(self, controllers: "Sequence[WeightController]", output: "CustomLossOutput") -> None:
        """A custom step was handed over: the next optimizer step applies it."""
        for controller in controllers:
            self._outputs.setdefault(controller, []).append(output)

    def discard(self, controllers: "Sequence[WeightController]", output: "CustomLossOutput") -> None:
        """The service did not take the gradient of a custom step after all."""
        for controller in controllers:
            outputs = self._outputs.get(controller, [])
            outputs[:] = [other for other in outputs if other is not output]

    def end_step(self) -> None:
        """The service took an optimizer step. Never raises: a controller that fails is reported by `check`."""
        self.made += 1
        due, self._outputs = self._outputs, {}
        for controller, outputs in due.items():
            if not outputs:
                continue
            try:
                controller.update(outputs)
            except Exception as error:  # noqa: BLE001  # user code; the optimizer step is on its way and must not fail
                title = type(controller).__name__
                self._failure = PipelineError(
                    f"the weight controller {title} failed after optimizer step {self.made} with "
                    f"{type(error).__name__}: {error}; its weights stayed as they were, and no gradient of this custom "
                    "step was sent. Call again to go on with them"
                )
                self._failure.__cause__ = error
                metadata = {"controller": title, "step": self.made, "reason": type(error).__name__}
                telemetry.emit("tinkex.regularizer.controller_failed", {}, metadata, error)

    def check(self) -> None:
        """Raises PipelineError, once, if a controller failed."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
