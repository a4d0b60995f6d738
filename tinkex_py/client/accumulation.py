"""The gradients that the service holds since the last optimizer step, and the weight controllers behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinkex_py import telemetry
from tinkex_py.errors import PipelineError, SurrogateMismatch

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.weights import WeightController


@dataclass(eq=False)
class GradientCall:
    """One gradient call that was handed over.

    Attributes:
        datums: number of datums whose gradients the service holds or may hold.
        scaled_for: the number of datums that the gradient was scaled for; None if the scale does not depend on it.
        controllers: the weight controllers of a custom step.
        output: the loss of a custom step, which its controllers read.
    """

    datums: int
    scaled_for: int | None = None
    controllers: "Sequence[WeightController]" = ()
    output: "CustomLossOutput | None" = None


class Accumulation:
    """The gradient calls of one training client since its last optimizer step.

    Attributes:
        steps: number of optimizer steps, including those before a run was resumed.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._calls: list[GradientCall] = []
        self._controller_failure: PipelineError | None = None
        self._last_step: Sequence[GradientCall] = ()
        self._states_before: list[tuple[WeightController, dict[str, Any]]] = []

    @property
    def count(self) -> int:
        """Number of backward passes handed over, and not refused, since the last optimizer step."""
        return len(self._calls)

    def add(self, call: GradientCall) -> None:
        """Records a gradient call at its hand-over."""
        self._calls.append(call)

    def refuse(self, call: GradientCall) -> None:
        """Removes a gradient call of which the service refused every chunk."""
        call.datums = 0
        self._calls = [other for other in self._calls if other is not call]

    def take(self) -> list[GradientCall]:
        """Returns and clears the calls at the hand-over of an optimizer step."""
        taken, self._calls = self._calls, []
        return taken

    def put_back(self, calls: Sequence[GradientCall]) -> None:
        """Restores the calls of an optimizer step that was refused."""
        self._calls[:0] = calls

    def undo_step(self, calls: Sequence[GradientCall]) -> None:
        """Restores the calls of an accepted optimizer step that failed, and the weights before it.

        If a later step has moved the weights, they stay, and the calls do not move them again.
        """
        if calls is self._last_step:
            for controller, state in self._states_before:
                controller.load_state_dict(state)
        else:
            for call in calls:
                call.output = None
        self.put_back(calls)

    def check_divisor(self) -> None:
        """Raises SurrogateMismatch if gradients were scaled for another number of datums than the service holds."""
        held = sum(call.datums for call in self._calls)
        promised = {call.scaled_for for call in self._calls if call.datums and call.scaled_for is not None}
        wrong = sorted(promised - {held})
        if not wrong:
            return
        way_out = f"create a new client from the last checkpoint, and pass sequences_per_step={held} to every call"
        if promised == {wrong[0]} and held < wrong[0]:
            way_out = f"send the other {wrong[0] - held} datums with sequences_per_step={wrong[0]} first, or {way_out}"
        raise SurrogateMismatch(
            f"the service divides by the {held} datums since the last optim_step, but gradients were scaled for "
            f"{' and '.join(map(str, wrong))} (sequences_per_step; the default is one call's datums). The optim_step "
            f"was not sent: {way_out}"
        )

    def end_step(self, calls: Sequence[GradientCall]) -> None:
        """Counts an accepted optimizer step and updates the weight controllers of its calls.

        Never raises: `check_controllers` reports the failure of a controller.
        """
        self.steps += 1
        outputs: dict[WeightController, list[CustomLossOutput]] = {}
        for call in calls:
            if call.output is not None and call.datums:
                for controller in call.controllers:
                    outputs.setdefault(controller, []).append(call.output)
        self._last_step, self._states_before = calls, []
        for controller, seen in outputs.items():
            try:
                before = controller.state_dict()
                controller.update(seen)
                self._states_before.append((controller, before))
            except Exception as error:  # noqa: BLE001  # user code; the optimizer step was accepted and must not fail
                self._controller_failure = self._failed(controller, error)

    def check_controllers(self) -> None:
        """Raises PipelineError, once, if a controller failed."""
        failure, self._controller_failure = self._controller_failure, None
        if failure is not None:
            raise failure

    def _failed(self, controller: "WeightController", error: Exception) -> PipelineError:
        title = type(controller).__name__
        failure = PipelineError(
            f"the weight controller {title} failed after optimizer step {self.steps} with {type(error).__name__}: "
            f"{error}; its weights are unchanged, and no gradient of this custom step was sent. Call again to continue "
            "with these weights"
        )
        failure.__cause__ = error
        metadata = {"controller": title, "step": self.steps, "reason": type(error).__name__}
        telemetry.emit("tinkex.regularizer.controller_failed", {}, metadata, error)
        return failure
