"""The run folder of a recipe of the official SDK, which this package does not train but whose losses it composes."""

import concurrent.futures
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinkex_py import telemetry
from tinkex_py.errors import ConfigError
from tinkex_py.losses import Pipeline
from tinkex_py.losses.tinker_loss import TinkerLoss
from tinkex_py.runs.folder import RunFolder, read_steps
from tinkex_py.runs.plan import described_pipeline, versions
from tinkex_py.runs.records import RunInfo, RunStatus, StepRecord
from tinkex_py.runs.recovery import reason_of
from tinkex_py.runs.step import MicroBatch
from tinkex_py.runs.step_loss import step_loss

__all__ = ["EndedStep", "RecipeRecord", "recorded"]

_LAST_STEP_SECONDS = 10.0


@dataclass(frozen=True)
class EndedStep:
    """An optimizer step of the official client, which may still be in flight.

    Attributes:
        number: from 1.
        model: name of the base model.
        losses: pipeline and loss function of each gradient.
        started_at: monotonic time of its first gradient, in seconds.
        learning_rate: None if it was not given.
        update: future of the response to the update.
    """

    number: int
    model: str | None
    losses: Sequence[tuple[Pipeline, TinkerLoss]]
    started_at: float
    learning_rate: float | None
    update: "concurrent.futures.Future[Any]"

    @property
    def has_failed(self) -> bool:
        """Whether the service did not make the step."""
        return self.update.done() and (self.update.cancelled() or self.update.exception() is not None)


class RecipeRecord:
    """Writes the steps of one training client. Its methods may be called from any thread; made by `recorded`.

    A step is written once its update has its response. A folder that cannot be written does not interrupt the recipe:
    the rest is not recorded, and the end raises the error.
    """

    def __init__(self, folder: RunFolder, info: RunInfo) -> None:
        self._folder = folder
        self._info = info
        self._pending: list[EndedStep] = []
        self._finished_at = 0.0
        self._error: ConfigError | None = None
        self._lock = threading.Lock()

    def add(self, step: EndedStep) -> None:
        """Takes the next step, and writes it as soon as it is made."""
        with self._lock:
            self._pending.append(step)
        step.update.add_done_callback(lambda _: self._write_made())

    def wait(self) -> None:
        """Waits for the updates in flight; those that take too long are not recorded."""
        concurrent.futures.wait([step.update for step in self._pending], timeout=_LAST_STEP_SECONDS)

    def end(self, status: RunStatus, reason: str | None) -> None:
        """Writes what was made, and the status.

        Raises:
            ConfigError: the folder cannot be written, or could not be before.
        """
        self._write_made()
        with self._lock:
            self._pending.clear()
            incomplete = None if self._error is None else "not all steps could be recorded"
            self._write_info(status=status, reason=reason or incomplete)
            if self._error is not None:
                raise self._error

    def _write_made(self) -> None:
        with self._lock:
            while self._pending and self._pending[0].update.done():
                step = self._pending.pop(0)
                if step.has_failed or self._error is not None:
                    continue
                try:
                    self._write(step)
                except ConfigError as error:
                    self._error = error

    def _write(self, step: EndedStep) -> None:
        if not self._info.config and step.losses:
            pipeline, _ = step.losses[0]
            self._write_info(model=step.model, config={"pipeline": described_pipeline(pipeline)})
        now = time.monotonic()
        metrics: dict[str, float] = step.update.result().metrics or {}
        parts = [MicroBatch(loss.data, loss.output) for _, loss in step.losses]
        record = StepRecord(
            step=step.number,
            finished_at=time.time(),
            seconds=now - max(step.started_at, self._finished_at),  # requests of several steps overlap
            datums=sum(len(part.batch) for part in parts),
            tokens=sum(datum.positions for part in parts for datum in part.batch),
            learning_rate=step.learning_rate,
            losses=tuple(part.output for part in parts if part.output is not None),
            loss=step_loss(step.losses[0][0], parts) if step.losses else {},
            metrics={name: float(value) for name, value in metrics.items()},
        )
        self._folder.append_step(record)
        self._finished_at = now

    def _write_info(self, **changes: Any) -> None:
        self._info = self._info.model_copy(update={"updated_at": time.time(), **changes})
        self._folder.write_run(self._info)


@contextmanager
def recorded(path: Path | str, made: int) -> Generator[RecipeRecord]:
    """Opens the folder of a recipe, and writes how the block ended.

    Args:
        path: the folder.
        made: optimizer steps before this; a folder that holds them is continued behind them.

    Raises:
        ConfigError: the folder holds another run, or fewer steps; another process writes it, or it cannot be written.
    """
    with RunFolder(path) as folder:
        record = RecipeRecord(folder, _begun(folder, made))
        try:
            yield record
            record.wait()
        except Exception as error:
            _end_after_error(record, "failed", reason_of(error))
            raise
        except BaseException as error:  # a cancelled task, or Ctrl-C
            _end_after_error(record, "stopped", f"interrupted: {type(error).__name__}")
            raise
        record.end("finished", None)


def _begun(folder: RunFolder, made: int) -> RunInfo:
    before, now = folder.read_run(), time.time()
    if before is not None:
        _check_continues(folder, made)
    folder.reserve()
    info = RunInfo(
        name=folder.path.resolve().name,
        started_at=now if before is None else before.started_at,
        updated_at=now,
        versions=versions(),
    )
    folder.write_run(info)
    if before is not None:
        folder.keep_steps(made)
    return info


def _check_continues(folder: RunFolder, made: int) -> None:
    if folder.read_state() is not None:
        raise ConfigError(f"{folder.path} holds a run of train: record the recipe in another folder")
    steps = len(read_steps(folder.path))
    if made == 0 or steps < made:
        raise ConfigError(
            f"{folder.path} holds a run of {steps} steps, and the recipe was to be recorded behind step {made}: use "
            "another folder, or continue it with step=N, the number of optimizer steps that the recipe resumes from"
        )


def _end_after_error(record: RecipeRecord, status: RunStatus, reason: str) -> None:
    """Ends a run that an error ends, which a status that cannot be written does not hide."""
    try:
        record.end(status, reason)
    except ConfigError as error:
        telemetry.emit("tinkex.run.status_not_written", {}, {"status": status, "reason": type(error).__name__}, error)
