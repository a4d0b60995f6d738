"""One JSON object per step, in a file."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinkex_py.errors import ConfigError
from tinkex_py.integrations.trackers.identity import run_key, started
from tinkex_py.runs.records import RunInfo, RunStatus


class JsonlSink:
    """Appends a line per step: `{"run": ..., "step": 3, "loss/total": 0.25, ...}`.

    The lines are plain JSON, so NaN and infinities are the texts "NaN", "Infinity" and "-Infinity"; `float(value)`
    reads them. A run that goes on from an earlier step replaces its own lines from that step on.

    Args:
        path: the file; several runs may share it one after another. Its folder is made when a run starts.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._key: str | None = None
        self._goes_on = False

    def start(self, run: RunInfo) -> None:
        """Makes the file's folder.

        Raises:
            ConfigError: it cannot be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error
        self._key = run_key(run)
        self._goes_on = self.path.exists()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line."""
        key = started(self._key, self)
        if self._goes_on:
            self._forget(key, step)
            self._goes_on = False
        row = {"run": key, "step": step, **{name: _plain(value) for name, value in metrics.items()}}
        with self.path.open("ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def finish(self, status: RunStatus) -> None:  # noqa: ARG002  (part of the protocol)
        """Every line is in the file already."""
        self._key = None

    def _forget(self, key: str, first: int) -> None:
        """Takes out this run's lines from step `first` on, and a last line that was never finished."""
        *lines, rest = self.path.read_bytes().split(b"\n")
        kept = [line for line in lines if not _is_from(json.loads(line), key, first)]
        if kept != lines or rest:
            draft = self.path.with_name(f".{self.path.name}.draft")
            draft.write_bytes(b"".join(line + b"\n" for line in kept))
            draft.replace(self.path)


def _plain(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _is_from(row: Mapping[str, Any], key: str, first: int) -> bool:
    return row["run"] == key and row["step"] >= first
