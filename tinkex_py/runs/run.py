"""The life of a run: start or resume, optimizer steps, checkpoints, recovery, end."""

import asyncio
import time
from collections.abc import Mapping

from tinkex_py import telemetry
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.runs.accumulation import over_step
from tinkex_py.runs.arguments import created_model
from tinkex_py.runs.batches import BatchReader
from tinkex_py.runs.folder import RunFolder, read_steps
from tinkex_py.runs.plan import Plan, differences, versions
from tinkex_py.runs.progress import ProgressView
from tinkex_py.runs.queue_wait import QueueWait
from tinkex_py.runs.records import Change, RunInfo, RunState, RunStatus, SavedCheckpoint, StepRecord, scalars
from tinkex_py.runs.recovery import (
    ModelLost,
    complete,
    delete_old_checkpoints,
    is_untouched,
    reason_of,
    save_checkpoint,
)
from tinkex_py.runs.settings import Patience
from tinkex_py.runs.sinks import Sinks
from tinkex_py.runs.step import Flight, OptimizerStep, Start, owned_tasks
from tinkex_py.runs.step_loss import step_loss
from tinkex_py.threads import FileThread


class Run:
    """One run of `train`. The caller locks the folder.

    Attributes:
        training: client of the model.
        info: content of `run.json`.
        state: what the run resumes from; None before the first checkpoint.
        last: the last optimizer step; None before the first.
    """

    training: AsyncTrainingClient
    info: RunInfo

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        files: FileThread,
        reader: BatchReader,
        sinks: Sinks,
        view: ProgressView,
        stop: asyncio.Event,
    ) -> None:
        self.state: RunState | None = None
        self.last: StepRecord | None = None
        self._plan = plan
        self._settings = plan.settings
        self._folder = folder
        self._files = files
        self._reader = reader
        self._sinks = sinks
        self._view = view
        self._stop = stop
        self._queue = QueueWait(lambda: self.training.queue_state, self._show_waiting)
        self._patience = Patience()
        self._restarts_left = plan.settings.restarts
        self._logged = 0
        self._is_begun = False  # until then, the folder is unchanged and nothing was shown

    async def execute(self) -> None:
        """Trains to the end, and raises as `train` does."""
        try:
            await self._open()
            async with self._queue.watching():
                await self._train()
        except asyncio.CancelledError:
            await self._give_up("stopped", "cancelled", discard_waiting=True)
            raise
        except Exception as error:
            await self._give_up("failed", reason_of(error))
            raise
        await self._end(*self._outcome())

    @property
    def _made(self) -> int:
        return 0 if self.last is None else self.last.step

    # Start, resume, restart

    async def _open(self) -> None:
        described, fingerprints = self._plan.described(), await self._files.run(self._plan.fingerprints)
        before = await self._files.run(self._folder.read_run)
        state = await self._files.run(self._folder.read_state)
        changed = [] if before is None else differences(before, described, fingerprints)
        if changed and not self._plan.allow_changes:
            raise ConfigError(
                f"the run in {self._folder.path} was started with other settings or terms: {'; '.join(changed)}. "
                "Resume it with the same ones, allow the changes with allow_changes=True, or use another folder"
            )
        if before is None and state is not None:
            raise ConfigError(
                f"{self._folder.path} has a state.json, but no run.json: restore run.json, or use another folder"
            )
        await self._files.run(self._folder.reserve)
        self.training = await (self._new_model() if state is None else self._model_of(state))
        model, now, seed = await self.training.get_info(), time.time(), self._plan.config.get("seed")
        self.info = RunInfo(
            name=self._folder.path.resolve().name,
            started_at=now if before is None else before.started_at,
            updated_at=now,
            total_steps=self._settings.steps,
            model=model.model_data.model_name or model.model_name,
            config=described,
            versions=versions(),
            seed=seed if isinstance(seed, int) else None,
            fingerprints=fingerprints,
            objective=self._plan.objective(),
            changes=() if before is None else before.changes,
        )
        if state is not None:
            self._reader.fingerprints = await self._files.run(lambda: self._batches_before(before))
        await (self._reader.go_to(0) if state is None else self._resume(state))
        self._note_changes(changed)
        self._is_begun = True
        await self._files.run(lambda: self._folder.write_run(self.info))
        info = self.info
        self._sinks.send(lambda sink: sink.start(info))
        self._view.start(self.info, self._made)
        if state is None:
            await self._files.run(lambda: self._folder.keep_steps(0))

    def _note_changes(self, changed: list[str]) -> None:
        """Adds allowed changes to `info`, those of the data included."""
        new = [Change(step=self._made + 1, what=what) for what in changed]
        if self._reader.changed:
            what = f"batches {', '.join(map(str, self._reader.changed))} are not what they were"
            new.append(Change(step=self._made + 1, what=what, batches=self._reader.position))
            self._reader.changed = []
        self.info = self.info.model_copy(update={"changes": (*self.info.changes, *new)})

    def _batches_before(self, before: RunInfo | None) -> dict[int, str]:
        """Returns the fingerprints of the batches of earlier processes, by position."""
        steps = read_steps(self._folder.path)
        made = [fingerprint for step in steps for fingerprint in step.batches or [""] * len(step.losses)]
        ahead = {} if before is None else before.batches_ahead
        changes = () if before is None else before.changes
        first = max((change.batches or 0 for change in changes), default=0)
        known = ahead | dict(enumerate(made))
        return {position: known[position] for position in known if position >= first and known[position]}

    async def _new_model(self) -> AsyncTrainingClient:
        training = await created_model(self._plan.model, grace=self._plan.pipeline.cancel_grace)
        if training.accumulated:
            raise InvalidData(
                f"the training client holds {training.accumulated} backward passes that no optimizer step applied: "
                "call optim_step first, or give a new training client"
            )
        return training

    async def _model_of(self, state: RunState) -> AsyncTrainingClient:
        path = state.checkpoints[-1].path
        return await self._plan.service.create_training_client_from_state(path, with_optimizer=True)

    async def _resume(self, state: RunState) -> None:
        await self._reader.go_to(state.batches)
        known = self._reader.fingerprints
        ahead = {position: known[position] for position in known if position >= state.batches}
        self.info = self.info.model_copy(update={"batches_ahead": ahead})
        # Before the records of these batches are removed.
        await self._files.run(lambda: self._folder.write_run(self.info))
        self._plan.pipeline.load_state_dict(state.pipeline)
        self.training.step = state.client_step
        self._patience = Patience.model_validate(state.patience)
        kept = await self._files.run(lambda: self._folder.keep_steps(state.step))
        self.state, self.last = state, kept[-1] if kept else None

    async def _restart(self, cause: Exception) -> None:
        """Resumes from the last checkpoint with a new model; raises the cause if that is not possible."""
        state = self.state
        if state is None or self._restarts_left == 0:
            raise cause
        if not self._reader.can_begin_again:
            cause.add_note(
                "the run could not restart from its last checkpoint because batches is an iterator: give a list, or a "
                "function that is called with the number of batches to skip"
            )
            raise cause
        self._restarts_left -= 1
        self._view.doing(f"restarting from the checkpoint of step {state.step}")
        metadata = {"step": self._made + 1, "checkpoint_step": state.step, "reason": type(cause).__name__}
        telemetry.emit("tinkex.run.restarted", {}, metadata, cause)
        if self.training is not self._plan.model:
            await self.training.aclose()
        self.training = await self._model_of(state)
        await self._resume(state)

    # Steps

    async def _train(self) -> None:
        while True:
            try:
                if self.state is None:
                    await self._save()
                async with owned_tasks() as start:
                    await self._steps(start)
                if self.state is None or self._made > self.state.step:
                    await self._save()
            except ModelLost as lost:
                await self._restart(lost.cause)
            else:
                return

    async def _steps(self, start: Start) -> None:
        """Makes the steps; the next one is sent while an update is in flight, unless something comes between them."""
        flight = await self._begin(start, None)
        while flight is not None:
            step, following = flight.step, None
            await step.gradients_settled.wait()
            if step.has_gradients and not self._pauses_after(step):
                following = await self._begin(start, flight)
            await flight.task
            if not step.is_made:
                following = await self._repair(start, step, following)
            await self._finish(flight)
            flight = following or await self._begin(start, None)

    async def _begin(self, start: Start, before: Flight | None) -> Flight | None:
        """Sends the next step; None if there is none."""
        number = self._made + 1 if before is None else before.step.number + 1
        steps = self._settings.steps
        if self._stop.is_set() or self._is_out_of_patience() or (steps is not None and number > steps):
            return None
        batches = await self._reader.take_unless(self._stop, self._settings.accumulate)
        if not batches:
            return None
        self._note_changes([])
        self._view.doing(f"step {number}")
        pipeline = over_step(self._plan.pipeline, batches)
        params, fingerprints = self._plan.optimizer_params(number - 1), self._reader.last(len(batches))
        step = OptimizerStep(number, batches, params, pipeline, fingerprints)
        return self._send(start, step, before)

    def _send(self, start: Start, step: OptimizerStep, before: Flight | None) -> Flight:
        after = None if before is None else before.step
        sending = step.send(self.training, self._settings.execution, after=after)
        return Flight(step, start(sending), self._queue.seconds())

    async def _repair(self, start: Start, step: OptimizerStep, following: Flight | None) -> Flight | None:
        """Completes a step that failed in part, then sends the one behind it again."""
        if following is not None:
            await following.task
            if not is_untouched(following.step):
                raise ModelLost(step.failures[0])

        async def send() -> None:
            assert self.state is not None
            # Weight schedules must see the step's own number, whatever the client counted before.
            self.training.step = self.state.client_step + step.number - 1 - self.state.step
            await step.send(self.training, self._settings.execution)

        await complete(step, self.training, send, self._settings.resends)
        return None if following is None else self._send(start, following.step, None)

    async def _finish(self, flight: Flight) -> None:
        step = flight.step
        evaluated: Mapping[str, float | str] = {}
        if self._plan.evaluates_after(step.number):
            self._view.doing(f"evaluation after step {step.number}")
            evaluated = await self._evaluate(step.number)
        record = _record(step, self._plan, evaluated, self._queue.seconds() - flight.queued_before)
        await self._files.run(lambda: self._folder.append_step(record))
        self.last = record
        self._patience = self._patience_with(record)
        self._view.step(record)
        if record.step > self._logged:  # a step that is made again after a restart was logged before
            self._logged = record.step
            self._sinks.send(lambda sink: sink.log(record.step, scalars(record)))
        if self._plan.saves_after(step.number):
            await self._save()

    async def _evaluate(self, number: int) -> Mapping[str, float | str]:
        assert self._plan.evaluate is not None
        return await self._plan.evaluate(self.training, number)

    async def _save(self) -> None:
        """Saves a checkpoint and the state that belongs to it, and deletes old checkpoints."""
        self._view.doing(f"saving a checkpoint after step {self._made}")
        saved = await save_checkpoint(self.training, self._made, self._settings)
        before: tuple[SavedCheckpoint, ...] = () if self.state is None else self.state.checkpoints
        state = RunState(
            checkpoints=(*before, saved),
            batches=self._reader.position,
            client_step=self.training.step,
            pipeline=self._plan.pipeline.state_dict(),
            patience=self._patience.model_dump(),
        )
        await self._files.run(lambda: self._folder.write_state(state))
        rest = self._plan.service.create_rest_client()
        left = await delete_old_checkpoints(rest, state.checkpoints, self._settings.keep_checkpoints)
        self.state = state.model_copy(update={"checkpoints": left})
        self.info = self.info.model_copy(update={"batches_ahead": {}})
        await self._write_status("running", None)

    # What ends or interrupts the steps

    def _pauses_after(self, step: OptimizerStep) -> bool:
        """Whether the next step must wait until this one is finished."""
        number = step.number
        return self._plan.evaluates_after(number) or self._plan.saves_after(number) or self._ends_after(step)

    def _ends_after(self, step: OptimizerStep) -> bool:
        """Whether early stopping will end the run after this step, whose losses are known."""
        rule = self._settings.early_stop
        if rule is None or rule.metric.startswith("evaluation/"):
            return False
        return self._patience_with(_record(step, self._plan, {}, 0.0)).is_over(rule)

    def _patience_with(self, record: StepRecord) -> Patience:
        rule = self._settings.early_stop
        return self._patience if rule is None else self._patience.after(rule, scalars(record))

    def _is_out_of_patience(self) -> bool:
        rule = self._settings.early_stop
        return rule is not None and self._patience.is_over(rule)

    def _outcome(self) -> tuple[RunStatus, str | None]:
        steps, rule = self._settings.steps, self._settings.early_stop
        if steps is not None and self._made >= steps:
            return "finished", None
        if rule is not None and self._is_out_of_patience():
            return "stopped", f"{rule.metric} did not improve in {rule.patience} measurements"
        if self._stop.is_set():
            return "stopped", "stop was requested"
        if steps is None:
            return "finished", None if self._made else "batches is empty: no step was made"
        return "finished", f"the batches ended after {self._made} of {steps} steps"

    async def _end(self, status: RunStatus, reason: str | None, *, discard_waiting: bool = False) -> None:
        if not self._is_begun:
            return
        self._sinks.send(lambda sink: sink.finish(status), discard_waiting=discard_waiting)
        try:
            await self._write_status(status, reason)
        finally:
            self._view.finish(self.info)

    async def _give_up(self, status: RunStatus, reason: str, *, discard_waiting: bool = False) -> None:
        """Ends a run that an error ends, which a status that cannot be written does not hide."""
        try:
            await self._end(status, reason, discard_waiting=discard_waiting)
        except ConfigError as error:
            telemetry.emit(
                "tinkex.run.status_not_written", {}, {"status": status, "reason": type(error).__name__}, error
            )

    async def _write_status(self, status: RunStatus, reason: str | None) -> None:
        used = self.training.certificate
        digest = self.info.certificate if used is None else used.digest
        changed = {"status": status, "reason": reason, "updated_at": time.time(), "certificate": digest}
        self.info = self.info.model_copy(update=changed)
        await self._files.run(lambda: self._folder.write_run(self.info))

    def _show_waiting(self, reason: str | None) -> None:
        self._view.doing(f"step {self._made + 1}" if reason is None else f"waiting: {reason}")


def _record(step: OptimizerStep, plan: Plan, evaluated: Mapping[str, float | str], queue_seconds: float) -> StepRecord:
    outputs = [part.output for part in step.parts if part.output is not None]
    return StepRecord(
        step=step.number,
        finished_at=time.time(),
        seconds=time.monotonic() - step.started_at,
        queue_seconds=queue_seconds,
        datums=sum(len(part.batch) for part in step.parts),
        tokens=sum(datum.positions for part in step.parts for datum in part.batch),
        learning_rate=step.params.learning_rate,
        # The service's own output repeats the logprobs.
        losses=tuple(output.model_copy(update={"service_output": None}) for output in outputs),
        loss=step_loss(plan.pipeline, step.parts),
        metrics={} if step.response is None else dict(step.response.metrics or {}),
        evaluation={name: float(value) for name, value in evaluated.items() if not isinstance(value, str)},
        samples={name: value for name, value in evaluated.items() if isinstance(value, str)},
        batches=tuple(step.fingerprints),
    )
