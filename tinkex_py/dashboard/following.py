"""Reads a growing `steps.jsonl` incrementally and in bounded memory."""

import os
from collections import deque
from io import BufferedReader
from pathlib import Path

from pydantic import ValidationError

from tinkex_py.dashboard.curves import Curves
from tinkex_py.runs.records import StepRecord, scalars

BLOCK = 1 << 18  # bytes per call, unless a line is longer
LONGEST_LINE = 64 << 20  # bytes; a longer line is not a step
MOST_SAMPLES = 30  # evaluations whose texts are kept
LONGEST_SAMPLE = 2000  # characters


class FollowedSteps:
    """The steps of one run so far.

    A file that was replaced or truncated, as by a resumed run, is read again from the start.

    Args:
        path: of `steps.jsonl`; it may not exist yet.

    Attributes:
        curves: the numbers.
        samples: step and texts of the last evaluations.
        restarts: how often the file was read from the start again.
        is_behind: whether there is more to read.
        problem: what is wrong with the file, whose other lines are read; None if nothing is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.restarts = 0
        self._begin()

    @property
    def version(self) -> tuple[int, int]:
        """Changes when earlier points change; else points are only added, and only the last one may change."""
        return self.restarts, self.curves.stride

    def read_more(self) -> bool:
        """Reads a block of what was added since the last call. Returns whether anything changed."""
        self.is_behind = False
        try:
            with self._path.open("rb") as file:
                return self._read_from(file)
        except FileNotFoundError:
            if self._identity is None:
                return False
            self._restart()
            return True
        except OSError as error:
            changed, self.problem = self.problem is None, f"{self._path.name} cannot be read: {error.strerror}"
            return changed

    def _begin(self) -> None:
        self.curves = Curves()
        self.samples: deque[tuple[int, dict[str, str]]] = deque(maxlen=MOST_SAMPLES)
        self.is_behind = False
        self.problem: str | None = None
        self._identity: tuple[int, int] | None = None
        self._offset = 0  # of the first line that was not read
        self._lines = 0
        self._last_line = b""
        self._tokens = 0
        self._started_at: float | None = None
        self._elapsed = 0.0

    def _restart(self) -> None:
        self._begin()
        self.restarts += 1

    def _read_from(self, file: BufferedReader) -> bool:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        restarted = self._identity is not None and (identity != self._identity or not self._continues(file))
        if restarted:
            self._restart()
        self._identity = identity
        return self._read_lines(file) or restarted

    def _continues(self, file: BufferedReader) -> bool:
        """Returns whether the file still contains the last line that was read."""
        file.seek(self._offset - len(self._last_line))
        return file.read(len(self._last_line)) == self._last_line

    def _read_lines(self, file: BufferedReader) -> bool:
        begin = self._offset
        file.seek(begin)
        rest = b""
        while block := file.read(BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._add(line + b"\n")
            if len(rest) > LONGEST_LINE:
                self.problem = f"{self._path.name}, line {self._lines + 1} is too long for a step"
                break
            if lines:
                self.is_behind = len(block) == BLOCK
                break
        return self._offset != begin

    def _add(self, line: bytes) -> None:
        self._lines += 1
        self._offset += len(line)
        self._last_line = line
        try:
            record = StepRecord.model_validate_json(line)
        except ValidationError:
            self.problem = f"{self._path.name}, line {self._lines} is not a step"
            return
        if self._started_at is None:
            self._started_at = record.finished_at - record.seconds
        self._tokens += record.tokens
        # The clock of another machine, on which a run was resumed, may be behind.
        self._elapsed = max(self._elapsed, record.finished_at - self._started_at)
        self.curves.add(record.step, scalars(record), tokens=self._tokens, seconds=self._elapsed)
        if record.samples:
            texts = {name[:LONGEST_SAMPLE]: text[:LONGEST_SAMPLE] for name, text in record.samples.items()}
            self.samples.append((record.step, texts))


def last_step(path: Path) -> StepRecord | None:
    """Reads the last complete line of `steps.jsonl`; None if there is none, or if it is not a step.

    Raises:
        OSError: the file cannot be read.
    """
    reach = 1 << 14
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            begin = max(0, size - reach)
            file.seek(begin)
            *lines, _ = file.read(size - begin).split(b"\n")
            if len(lines) > 1 or (lines and begin == 0):
                break
            if begin == 0 or reach > LONGEST_LINE:
                return None
            reach *= 4
    try:
        return StepRecord.model_validate_json(lines[-1])
    except ValidationError:
        return None
