"""The folder of one run: `run.json` about it, `steps.jsonl` with a line per step, `state.json` to go on from.

Files that are replaced are written whole under another name first, so that a process may be killed at any time.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import filelock
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from tinkex_py.errors import ConfigError
from tinkex_py.runs.records import Record, RunInfo, StepRecord
from tinkex_py.runs.state import RunState
from tinkex_py.unicode import with_whole_texts

RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
STATE_FILE = "state.json"
LOCK_FILE = "lock"

AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_run(folder: Path | str) -> RunInfo:
    """What `run.json` of a run's folder says. Reading needs no lock.

    Raises:
        ConfigError: naming the file, if there is none or it cannot be read.
    """
    path = Path(folder) / RUN_FILE
    return _parsed(RunInfo, _bytes_of(path), str(path))


def read_steps(folder: Path | str) -> list[StepRecord]:
    """The steps of a run so far, in order; none if it has made none. Reading needs no lock.

    A last line that is not finished, because it is being written or its process died, is left out.

    Raises:
        ConfigError: naming the file, if there is no run, or another line cannot be read.
    """
    path = Path(folder) / STEPS_FILE
    if not path.exists():
        read_run(folder)
        return []
    *lines, rest = _bytes_of(path).split(b"\n")
    steps = [_parsed(StepRecord, line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    try:
        return [*steps, StepRecord.model_validate_json(rest)]
    except ValidationError:
        return steps


class RunFolder:
    """A run's folder while one process writes to it. Use it with `with`; the methods may be called from any thread.

    Args:
        path: the folder; made with those above it.

    Raises:
        ConfigError: when entered: another process has the run, or the folder cannot be made.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock: filelock.BaseFileLock | None = None

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / LOCK_FILE, timeout=0, thread_local=False)
            lock.acquire()
        except filelock.Timeout as error:
            raise ConfigError(f"the run in {self.path} is being trained by another process, or by this one") from error
        except OSError as error:
            raise ConfigError(f"the run's folder {self.path} cannot be used: {error.strerror}") from error
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def read_run(self) -> RunInfo | None:
        """What `run.json` says; None if there is none yet.

        Raises:
            ConfigError: it cannot be read.
        """
        return read_run(self.path) if (self.path / RUN_FILE).exists() else None

    def write_run(self, run: RunInfo) -> None:
        """Replaces `run.json`."""
        self._replace(RUN_FILE, [_document(run)])

    def append_step(self, step: StepRecord) -> None:
        """Adds a line to `steps.jsonl`."""
        with (self.path / STEPS_FILE).open("ab") as file:
            file.write(_line(step))

    def keep_steps(self, last: int) -> list[StepRecord]:
        """Forgets the steps after step `last`, and a line that was not finished.

        Returns:
            The steps that are left.

        Raises:
            ConfigError: `steps.jsonl` cannot be read, or a step up to `last` is missing.
        """
        path = self.path / STEPS_FILE
        kept = [step for step in read_steps(self.path) if step.step <= last] if path.exists() else []
        if [step.step for step in kept] != list(range(1, last + 1)):
            raise ConfigError(f"{path} does not hold the steps 1 to {last}, which {STATE_FILE} says were made")
        self._replace(STEPS_FILE, map(_line, kept))
        return kept

    def read_state(self) -> RunState | None:
        """Where the run can go on; None if it made no checkpoint yet.

        Raises:
            ConfigError: the file cannot be read.
        """
        path = self.path / STATE_FILE
        return _parsed(RunState, _bytes_of(path), str(path)) if path.exists() else None

    def write_state(self, state: RunState) -> None:
        """Replaces `state.json`, after all steps before it have reached the disk."""
        steps = self.path / STEPS_FILE
        if steps.exists():
            _flush(steps)
        self._replace(STATE_FILE, [_document(state)])

    def _replace(self, name: str, lines: Iterable[bytes]) -> None:
        draft = self.path / f".{name}.draft"
        with draft.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path / name)
        if os.name == "posix":
            _flush(self.path)


def _line(record: Record) -> bytes:
    return _json(record, None) + b"\n"


def _document(record: Record) -> bytes:
    return _json(record, 2) + b"\n"


def _json(record: Record, indent: int | None) -> bytes:
    try:
        return record.model_dump_json(indent=indent).encode()
    except PydanticSerializationError:  # half a character, in a name or a setting
        whole = with_whole_texts(record.model_dump())
    return type(record).model_validate(whole).model_dump_json(indent=indent).encode()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(model: type[AnyRecord], content: bytes, where: str) -> AnyRecord:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"])) or "the whole"
    # Raised out here, because pydantic's own error holds what the file says.
    raise ConfigError(f"{where} is no {model.__name__}: {place}: {first['msg']}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
