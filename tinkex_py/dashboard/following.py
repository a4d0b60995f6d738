"""Reads a `steps.jsonl` that grows: only what is new, in bounded memory."""

import os
from io import BufferedReader
from pathlib import Path

from pydantic import ValidationError

from tinkex_py.dashboard.curves import Curves
from tinkex_py.runs.records import StepRecord, scalars

BLOCK = 1 << 20  # bytes read at once
LONGEST_LINE = 64 << 20  # bytes; more than that is no step


class FollowedSteps:
    """The steps of one run so far.

    A file that was replaced or cut, as a resumed run does it, is read anew.

    Args:
        path: of `steps.jsonl`; it need not be there yet.

    Attributes:
        curves: what was read.
        restarts: how often it was read anew.
        problem: what is wrong with the file; None if nothing is. The other lines are read all the same.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.restarts = 0
        self._begin()

    @property
    def version(self) -> tuple[int, int]:
        """While it stays the same, points are only added, and only the last one may change."""
        return self.restarts, self.curves.stride

    def read_more(self) -> bool:
        """Reads what was added since the last call. Returns whether anything did."""
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
        self.problem: str | None = None
        self._identity: tuple[int, int] | None = None
        self._offset = 0  # where the first line begins that was not read
        self._lines = 0
        self._last_line = b""

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
        """Whether the line that was read last is still where it was."""
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
                self.problem = f"{self._path.name}, line {self._lines + 1} is longer than any step"
                break
        return self._offset != begin

    def _add(self, line: bytes) -> None:
        self._lines += 1
        self._offset += len(line)
        self._last_line = line
        try:
            record = StepRecord.model_validate_json(line)
        except ValidationError:
            self.problem = f"{self._path.name}, line {self._lines} is no step"
            return
        self.curves.add(record.step, scalars(record))


def last_step(path: Path) -> StepRecord | None:
    """The last whole line of `steps.jsonl`; None if there is none, or if it is no step.

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
