"""One optimizer step: the gradients of its batches, and the update behind them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinkex_py import telemetry
from tinkex_py.client.custom_step import Execution
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import PrecedingRequestFailed
from tinkex_py.runs.batches import Batch
from tinkex_py.types import AdamParams, OptimizerParams, OptimStepResponse

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.pipeline import Pipeline


@dataclass
class MicroBatch:
    """One batch of a step: `output` once the service holds its gradient, else `error` if it was tried."""

    batch: Batch
    output: "CustomLossOutput | None" = None
    error: Exception | None = None


class OptimizerStep:
    """An optimizer step, which can be sent repeatedly until all of it took effect.

    Attributes:
        pipeline: its loss.
        fingerprints: of the batches.
        grad_norm: whether the update asks for the norm of the gradient.
        parts: the batches and their results.
        response: the service's response to the update; None before.
        update_error: why the update failed.
        gradients_settled: set as soon as every batch that was sent has a result; the update may still be in flight.
        started_at: monotonic time in seconds at which it was first sent.
    """

    def __init__(
        self,
        number: int,
        batches: Sequence[Batch],
        params: AdamParams | OptimizerParams,
        pipeline: "Pipeline",
        fingerprints: Sequence[str] = (),
        *,
        grad_norm: bool = False,
    ) -> None:
        self.number = number
        self.fingerprints = fingerprints
        self.grad_norm = grad_norm
        self.params = params
        self.pipeline = pipeline
        self.parts = [MicroBatch(batch) for batch in batches]
        self.response: OptimStepResponse | None = None
        self.update_error: Exception | None = None
        self.gradients_settled = asyncio.Event()
        self.started_at = time.monotonic()

    async def send(
        self,
        training: AsyncTrainingClient,
        execution: Execution,
        *,
        after: "OptimizerStep | None" = None,
    ) -> None:
        """Sends what is missing, the update behind the gradients. Failures are stored in the step, none is raised.

        Nothing is sent if the update of the step `after`, which may still be in flight, has failed.
        """
        missing = [part for part in self.parts if part.output is None]
        sequences = sum(len(part.batch) for part in self.parts) if len(self.parts) > 1 else None
        left = len(missing)
        self.gradients_settled.clear()

        async def gradient(part: MicroBatch) -> None:
            nonlocal left
            part.error = None
            try:
                _check(after)
                part.output = await training.forward_backward_custom(
                    part.batch, self.pipeline, execution=execution, sequences_per_step=sequences
                )
            except Exception as error:  # noqa: BLE001  # recovery decides about it
                part.error = error
            left -= 1
            if left == 0:
                self.gradients_settled.set()

        async def update() -> None:
            self.update_error = None
            try:
                _check(after)
                self.response = await training.optim_step(self.params, grad_norm=self.grad_norm)
            except Exception as error:  # noqa: BLE001  # recovery decides about it
                self.update_error = error

        if not missing:
            self.gradients_settled.set()
        try:
            with telemetry.lifecycle("tinkex.run.step", {"step": self.number, "batches": len(self.parts)}):
                await asyncio.gather(*map(gradient, missing), update())
        finally:
            self.gradients_settled.set()

    @property
    def has_gradients(self) -> bool:
        """Whether the service holds the gradients of all batches."""
        return all(part.output is not None for part in self.parts)

    @property
    def is_made(self) -> bool:
        """Whether all of it took effect."""
        return self.has_gradients and self.response is not None

    @property
    def failures(self) -> list[Exception]:
        """Why it was not made, the cause first."""
        errors = [part.error for part in self.parts] + [self.update_error]
        given = [error for error in errors if error is not None]
        return sorted(given, key=lambda error: isinstance(error, PrecedingRequestFailed))


def _check(before: OptimizerStep | None) -> None:
    if before is not None and before.update_error is not None:
        raise PrecedingRequestFailed(f"optimizer step {before.number} did not take effect, so this was not sent")


@dataclass(frozen=True)
class Flight:
    """A step, the task that sends it, and the seconds that requests of the run had been queued before."""

    step: OptimizerStep
    task: "asyncio.Task[None]"
    queued_before: float


Start = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


@asynccontextmanager
async def owned_tasks() -> AsyncGenerator[Start]:
    """Yields a function that starts tasks; leaving the block cancels those that still run and waits for them."""
    tasks: set[asyncio.Task[None]] = set()

    def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="tinkex.step")
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    try:
        yield start
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
