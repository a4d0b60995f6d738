"""What the service holds since the last optimizer step, and what that step then moves on the client."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinkex_py import telemetry
from tinkex_py.errors import PipelineError, SurrogateMismatch

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.weights import WeightController


@dataclass(eq=False)
class GradientCall:
    """One gradient call that was handed over.

    Attributes:
        datums: those whose gradients the service holds, as far as is known; unknown ones count.
        scaled_for: the number of datums that the gradient was scaled for; None if it does not depend on that.
        controllers: the weight controllers of a custom step.
        output: the loss of a custom step, until its controllers have read it.
    """

    datums: int
    scaled_for: int | None = None
    controllers: "Sequence[WeightController]" = ()
    output: "CustomLossOutput | None" = None


class Accumulation:
    """The gradient calls of one training client since its last optimizer step.

    Attributes:
        steps: optimizer steps that the service took, those before a resumed run included.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._calls: list[GradientCall] = []
        self._controller_failure: PipelineError | None = None

    @property
    def count(self) -> int:
        """Backward passes handed over, and not refused, since the last optimizer step."""
        return len(self._calls)

    def add(self, call: GradientCall) -> None:
        """A gradient call is handed over."""
        self._calls.append(call)

    def refuse(self, call: GradientCall) -> None:
        """The service refused all of a call: it is as if it had not been handed over."""
        call.datums = 0
        self._calls = [other for other in self._calls if other is not call]

    def take(self) -> list[GradientCall]:
        """An optimizer step is handed over: it uses up these calls."""
        taken, self._calls = self._calls, []
        return taken

    def put_back(self, calls: Sequence[GradientCall]) -> None:
        """The optimizer step that took these calls has not happened."""
        self._calls[:0] = calls

    def check_divisor(self) -> None:
        """Checks that the service divides by the number that the gradients were scaled for.

        Raises:
            SurrogateMismatch: it holds another number of datums.
        """
        held = sum(call.datums for call in self._calls)
        promised = {call.scaled_for for call in self._calls if call.datums and call.scaled_for is not None}
        wrong = sorted(promised - {held})
        if not wrong:
            return
        way_out = "make a new client from the last checkpoint, and give every call sequences_per_step=" + str(held)
        if promised == {wrong[0]} and held < wrong[0]:
            way_out = f"send the other {wrong[0] - held} datums with sequences_per_step={wrong[0]} first, or {way_out}"
        raise SurrogateMismatch(
            f"the service divides by the {held} datums since the last optim_step, but gradients were scaled for "
            f"{' and '.join(map(str, wrong))} (sequences_per_step; the default is one call's datums). The optim_step "
            f"was not sent: {way_out}"
        )

    def end_step(self, calls: Sequence[GradientCall]) -> None:
        """The service accepted the optimizer step that took these calls: the weights of their regularizers move.

        Never raises: the failure of a controller is reported by `check_controllers`.
        """
        self.steps += 1
        outputs: dict[WeightController, list[CustomLossOutput]] = {}
        for call in calls:
            if call.output is not None and call.datums:
                for controller in call.controllers:
                    outputs.setdefault(controller, []).append(call.output)
            call.output = None
        for controller, seen in outputs.items():
            try:
                controller.update(seen)
            except Exception as error:  # noqa: BLE001  # user code; the optimizer step is on its way and must not fail
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
            f"{error}; its weights stayed as they were, and no gradient of this custom step was sent. Call again to "
            "go on with them"
        )
        failure.__cause__ = error
        metadata = {"controller": title, "step": self.steps, "reason": type(error).__name__}
        telemetry.emit("tinkex.regularizer.controller_failed", {}, metadata, error)
        return failure
