"""`train`: optimizer steps with checkpoints, from the start or from where a run ended."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from tinkex_py import telemetry
from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import ConfigError, PipelineError, RegularizerError, TinkexError
from tinkex_py.runs.batches import Batches, BatchReader
from tinkex_py.runs.description import Optimizer
from tinkex_py.runs.folder import RunFolder
from tinkex_py.runs.progress import ProgressView, chosen_view
from tinkex_py.runs.queue_clock import QueueClock
from tinkex_py.runs.records import RunInfo, RunStatus, StepRecord, scalars
from tinkex_py.runs.run import Model, Plan, Run
from tinkex_py.runs.settings import TrainSettings
from tinkex_py.runs.sink import MetricSink
from tinkex_py.runs.sinks import Sinks
from tinkex_py.runs.step import OptimizerStep, is_worth_repeating
from tinkex_py.threads import FileThread
from tinkex_py.types import AdamParams

if TYPE_CHECKING:
    from tinkex_py.losses.pipeline import Pipeline

Evaluate = Callable[[AsyncTrainingClient, int], Awaitable[Mapping[str, float]]]


@dataclass(frozen=True)
class TrainedRun:
    """What a run came to.

    Attributes:
        info: as in `run.json`.
        folder: the run's files; `read_steps` reads its steps.
        last: the last optimizer step; None if there was none.
        checkpoint: path of the last checkpoint on the service, which holds the model as it is now.
        training: the model's client, which the caller may go on with.
    """

    info: RunInfo
    folder: Path
    last: StepRecord | None
    checkpoint: str
    training: AsyncTrainingClient

    def _repr_html_(self) -> str:
        from tinkex_py.html_table import html_facts
        from tinkex_py.losses.output import output_html

        last = None if self.last is None else output_html(self.last.losses[-1])
        done = {"steps": 0 if self.last is None else self.last.step, "checkpoint": self.checkpoint}
        facts = {"folder": str(self.folder), "status": self.info.status, "reason": self.info.reason, **done}
        return html_facts(f"Run {self.info.name}", facts) + (last or "")


async def train(
    service: AsyncServiceClient,
    model: Model,
    batches: Batches,
    pipeline: "Pipeline",
    *,
    folder: Path | str,
    optimizer: Optimizer | None = None,
    settings: TrainSettings | None = None,
    config: Mapping[str, JsonValue] | None = None,
    evaluate: Evaluate | None = None,
    sinks: Sequence[MetricSink] = (),
    stop: asyncio.Event | None = None,
    progress: bool | ProgressView = False,
) -> TrainedRun:
    """Trains a model and writes down how it went; a run that was interrupted goes on from its last checkpoint.

    One folder is one run. Where it holds a run already, that run is taken up: model, optimizer, weights that move and
    place in the data are those of the last checkpoint, and what was made after it is made again. So a process that was
    killed at any moment and started anew gives the numbers of one that was not.

    Args:
        service: where the model is; it keeps the checkpoints.
        model: the training client of a new run, or a function that makes it, `async () -> AsyncTrainingClient`, which
            is not called where a run is taken up.
        batches: lists of datums, plain or async; or a function that is called with the number of batches to leave
            out. A plain iterator cannot go back to the last checkpoint within the process.
        pipeline: the loss. Its weight controllers become those of the run.
        folder: the run's files.
        optimizer: of every step, or a function of the number of steps made before; default `AdamParams()`.
        settings: of the run; default `TrainSettings()`.
        config: plain values that belong to the run, such as the names of model and data; written to `run.json`, and
            they must be the same when it is taken up.
        evaluate: called as `await evaluate(training, step)` between two steps, gives named numbers.
        sinks: where the numbers go besides; called in threads.
        stop: once it is set, the run ends after the steps in flight, with a checkpoint. A batch that is awaited then is
            given up, and taken again by the run that goes on.
        progress: True shows it in the terminal or notebook; or a view of your own.

    Returns:
        The run, whatever its status is: "finished", or "stopped" by `stop` or `settings.early_stop`.

    Raises:
        ConfigError: the folder belongs to a run with other settings, or to another process; or an argument cannot be
            used. Nothing was changed.
        TinkexError: a step failed and could not be made good. The run can be taken up later.
    """
    if not isinstance(service, AsyncServiceClient):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"service must be an AsyncServiceClient, got a {type(service).__name__}")
    if not isinstance(model, AsyncTrainingClient) and not callable(model):
        raise ConfigError(f"model must be a training client or a function that makes one, got a {type(model).__name__}")
    reader, lines, view = BatchReader(batches), Sinks(sinks), chosen_view(progress)
    plan = Plan(service, model, pipeline, optimizer or AdamParams(), settings or TrainSettings(), config or {})
    with RunFolder(folder) as own:
        async with FileThread("tinkex-run") as files, lines:
            run = Run(plan, own, files, reader)
            try:
                await _Loop(run, evaluate, lines, stop or asyncio.Event(), view).go()
            finally:
                await reader.aclose()
    return TrainedRun(run.info, own.path, run.last, run.state.checkpoints[-1].path, run.training)


class _StepLost(Exception):
    """A step cannot be made good with this model; `cause` says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Loop:
    """Opens a run and makes its steps, two in flight where nothing has to happen between them."""

    def __init__(
        self, run: Run, evaluate: Evaluate | None, sinks: Sinks, stop: asyncio.Event, view: ProgressView
    ) -> None:
        self._run = run
        self._settings = run.plan.settings
        self._evaluate = evaluate
        self._sinks = sinks
        self._stop = stop
        self._view = view
        self._clock = QueueClock(self._tell_waiting)
        self._logged = 0
        self._is_shown = False

    async def go(self) -> None:
        try:
            with self._clock:
                await self._run.open()
                self._sinks.start(self._run.info)
                self._view.start(self._run.info, self._run.made)
                self._is_shown = True
                await self._all_steps()
        except asyncio.CancelledError:
            await self._end("stopped", "cancelled", at_once=True)
            raise
        except Exception as error:
            await self._end("failed", _reason(error))
            raise
        await self._end(*self._outcome())

    async def _all_steps(self) -> None:
        while True:
            try:
                async with _owned_tasks() as start:
                    await self._steps(start)
                if self._run.made > self._run.state.step:
                    await self._save()
            except _StepLost as lost:
                self._view.doing(f"going back to the checkpoint of step {self._run.state.step}")
                await self._run.go_back(lost.cause)
            else:
                return

    async def _steps(self, start: "_Start") -> None:
        flight = await self._begin(start, None)
        while flight is not None:
            step, following = flight.step, None
            await step.gradients_settled.wait()
            if step.has_gradients and not self._pauses_after(step):
                following = await self._begin(start, flight)
            await flight.task
            if not step.is_made:
                await self._mend(step, following)
                if following is not None:
                    following = self._send(start, following.step, None)
            await self._finish(flight)
            flight = following or await self._begin(start, None)

    async def _begin(self, start: "_Start", before: "_Flight | None") -> "_Flight | None":
        """Sends the next step; None if there is none."""
        number = self._run.made + 1 if before is None else before.step.number + 1
        steps = self._settings.steps
        if self._stop.is_set() or self._is_out_of_patience() or (steps is not None and number > steps):
            return None
        batches = await self._run.reader.take_unless(self._stop, self._settings.accumulate)
        if not batches:
            return None
        optimizer = self._run.plan.optimizer
        params = optimizer(number - 1) if callable(optimizer) else optimizer
        self._view.doing(f"step {number}")
        return self._send(start, OptimizerStep(number, batches, params), before)

    def _send(self, start: "_Start", step: OptimizerStep, before: "_Flight | None") -> "_Flight":
        plan = self._run.plan
        after = None if before is None else before.step
        sending = step.send(self._run.training, plan.pipeline, self._settings.execution, after=after)
        return _Flight(step, start(sending), self._clock.seconds)

    async def _mend(self, step: OptimizerStep, following: "_Flight | None") -> None:
        """Sends what is missing of a step until all of it took effect.

        Raises:
            _StepLost: that is not possible with this model.
            Exception: what failed, where another try would fail too.
        """
        cause = step.failures[0]
        if following is not None:
            await following.task
            if not following.step.is_untouched:
                raise _StepLost(cause)
        left = self._settings.resends
        while not step.is_made:
            cause = step.failures[0]
            if not is_worth_repeating(cause):
                raise cause
            if not step.can_be_mended(self._run.training):
                raise _StepLost(cause)
            if left == 0:
                # A term that goes on failing would do so from the checkpoint too.
                raise cause if isinstance(cause, PipelineError) else _StepLost(cause)
            left -= 1
            metadata = {"step": step.number, "reason": type(cause).__name__}
            telemetry.emit("tinkex.run.resent", {}, metadata, cause)
            self._run.at_step(step.number)
            await step.send(self._run.training, self._run.plan.pipeline, self._settings.execution)

    async def _finish(self, flight: "_Flight") -> None:
        step = flight.step
        evaluation: dict[str, float] = {}
        if self._evaluate is not None and self._is_evaluated(step.number):
            self._view.doing(f"evaluation after step {step.number}")
            evaluation = {name: float(value) for name, value in (await self._evaluate_after(step.number)).items()}
        record = self._record(step, evaluation, queued_before=flight.queued_before)
        await self._run.record(record)
        self._view.step(record)
        if record.step > self._logged:  # steps that are made again after going back have been told
            self._logged = record.step
            self._sinks.log(record.step, scalars(record))
        if self._is_saved(step.number):
            await self._save()

    async def _evaluate_after(self, number: int) -> Mapping[str, float]:
        assert self._evaluate is not None
        numbers = await self._evaluate(self._run.training, number)
        if not isinstance(numbers, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"evaluate must give a mapping of names to numbers, gave a {type(numbers).__name__}")
        return numbers

    async def _save(self) -> None:
        self._view.doing(f"saving a checkpoint after step {self._run.made}")
        try:
            await self._run.save()
        except TinkexError as error:
            if not is_worth_repeating(error):
                raise
            raise _StepLost(error) from error

    # What has to happen between two steps

    def _pauses_after(self, step: OptimizerStep) -> bool:
        """Whether the next step must wait until this one is finished."""
        return self._is_evaluated(step.number) or self._is_saved(step.number) or self._is_the_last(step)

    def _is_evaluated(self, number: int) -> bool:
        due = number % self._settings.evaluate_every == 0 or number == self._settings.steps
        return self._evaluate is not None and due

    def _is_saved(self, number: int) -> bool:
        every = self._settings.checkpoint_every
        return every is not None and number % every == 0

    def _is_the_last(self, step: OptimizerStep) -> bool:
        """Whether early stopping will end the run after this step; its losses are known."""
        rule = self._settings.early_stop
        if rule is None or rule.metric.startswith("evaluation/"):
            return False
        return self._run.patience.after(rule, scalars(self._record(step, {}))).is_over(rule)

    def _is_out_of_patience(self) -> bool:
        rule = self._settings.early_stop
        return rule is not None and self._run.patience.is_over(rule)

    def _record(
        self, step: OptimizerStep, evaluation: Mapping[str, float], *, queued_before: float = 0.0
    ) -> StepRecord:
        outputs = [part.output for part in step.parts if part.output is not None]
        return StepRecord(
            step=step.number,
            finished_at=time.time(),
            seconds=time.monotonic() - step.started_at,
            queue_seconds=self._clock.seconds - queued_before,
            datums=sum(len(part.batch) for part in step.parts),
            tokens=sum(datum.model_input.length for part in step.parts for datum in part.batch),
            learning_rate=step.params.learning_rate,
            # The service's own output repeats the logprobs.
            losses=tuple(output.model_copy(update={"service_output": None}) for output in outputs),
            metrics={} if step.response is None else dict(step.response.metrics or {}),
            evaluation=dict(evaluation),
        )

    # The end

    def _outcome(self) -> tuple[RunStatus, str | None]:
        steps, made = self._settings.steps, self._run.made
        if steps is not None and made >= steps:
            return "finished", None
        rule = self._settings.early_stop
        if rule is not None and self._is_out_of_patience():
            return "stopped", f"{rule.metric} did not get better in {rule.patience} measurements"
        if self._stop.is_set():
            return "stopped", "asked to stop"
        return "finished", None if steps is None else f"the batches ended after {made} of {steps} steps"

    async def _end(self, status: RunStatus, reason: str | None, *, at_once: bool = False) -> None:
        if self._is_shown:
            self._sinks.finish(status, at_once=at_once)
        if self._run.is_begun:
            await self._run.tell(status, reason)
        if self._is_shown:
            self._view.finish(self._run.info)

    def _tell_waiting(self, reason: str | None) -> None:
        if not self._is_shown:
            return
        self._view.doing(f"step {self._run.made + 1}" if reason is None else f"waiting: {reason}")


@dataclass(frozen=True)
class _Flight:
    """A step that was sent: the task that waits for it, and how long the run had been queued before."""

    step: OptimizerStep
    task: "asyncio.Task[None]"
    queued_before: float


_Start = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


@asynccontextmanager
async def _owned_tasks() -> AsyncGenerator[_Start]:
    """Gives a function that starts tasks; all of them have ended when the block is left."""
    tasks: list[asyncio.Task[None]] = []

    def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        tasks[:] = [task for task in tasks if not task.done()]
        tasks.append(asyncio.create_task(work, name="tinkex.step"))
        return tasks[-1]

    try:
        yield start
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if isinstance(error, RegularizerError):
        return f"{name} of {error.name!r}"
    # Messages of our own errors hold no data; those of others, terms among them, may.
    return f"{name}: {error}" if isinstance(error, TinkexError) else name
