"""TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinkex_py.integrations.extras import imported
from tinkex_py.integrations.trackers.identity import run_key, started
from tinkex_py.runs.records import RunInfo, RunStatus


class TensorBoardSink:
    """Writes event files with PyTorch's own writer, for `tensorboard --logdir FOLDER`.

    TensorBoard stores values as float32, NaN and infinities too, and replaces characters other than letters, digits,
    `_`, `-`, `.` and `/` in names by `_`. A run that goes on from an earlier step writes to the same folder and
    declares what it had written from that step on void, so that TensorBoard shows one curve.

    Args:
        folder: of all runs; a run has a folder in it, called by its name and a few characters of its start.

    Raises:
        MissingExtra: `tensorboard` is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        imported("tensorboard", "tensorboard")
        self._make_writer: Any = imported("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.folder = Path(folder)
        self._run: RunInfo | None = None
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        """The run's folder is made when its first step is there."""
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the values and flushes them, so that an open TensorBoard shows them."""
        if self._writer is None:
            self._writer = self._open(started(self._run, self), step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, status: RunStatus) -> None:  # noqa: ARG002  (TensorBoard knows no status)
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._run = None

    def _open(self, run: RunInfo, step: int) -> Any:
        folder = self.folder / run_key(run)
        goes_on = any(folder.glob("events.out.tfevents.*"))
        writer = self._make_writer(str(folder), purge_step=step if goes_on else None)
        if not goes_on:
            writer.add_text("run", f"```\n{run.model_dump_json(indent=2)}\n```", 0)
        return writer
