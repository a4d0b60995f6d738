"""The folder of one run. Files are replaced atomically, so that a process may be killed at any time."""

import contextlib
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import filelock
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from tinkex_py.arguments import check_count, check_kind, check_path, shown
from tinkex_py.errors import ConfigError
from tinkex_py.runs.records import Record, RunInfo, RunState, SampledBatch, StepRecord
from tinkex_py.unicode import plain_json, with_whole_texts
from tinkex_py.values import reason_of

RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
STATE_FILE = "state.json"
LOCK_FILE = "lock"
SAMPLED_FOLDER = "rollouts"

_RESERVED_FILE = ".reserved"
_RESERVED_BYTES = 1 << 16

AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_run(folder: Path | str) -> RunInfo:
    """Reads `run.json` of a run's folder. Reading needs no lock.

    Raises:
        ConfigError: naming the file, if it does not exist or cannot be read.
    """
    path = check_path("folder", folder, error=ConfigError) / RUN_FILE
    return _parsed(RunInfo, _bytes_of(path), str(path))


def read_steps(folder: Path | str) -> list[StepRecord]:
    """Reads the steps of a run so far, in order. Reading needs no lock.

    An incomplete last line, which is being written or whose process died, is ignored.

    Raises:
        ConfigError: naming the file, if there is no run, or another line cannot be read.
    """
    path = check_path("folder", folder, error=ConfigError) / STEPS_FILE
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
        path: the folder; created with its parents.

    Raises:
        ConfigError: `path` is no path. When entered: another process trains the run, or the folder cannot be created.
            By every method that writes: the disk is full, or the folder cannot be written; no draft is left.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = check_path("folder", path, error=ConfigError)
        self._lock: filelock.BaseFileLock | None = None

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / LOCK_FILE, timeout=0, thread_local=False)
            lock.acquire()
        except filelock.Timeout as error:
            raise ConfigError(
                f"the run in {self.path} is being trained by another process, or by this one: wait until it ends, or "
                "use another folder"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"the run's folder {self.path} cannot be used: {error.strerror}; use another folder"
            ) from error
        self._lock = lock
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._lock is not None:
            self._free()
            self._lock.release()
            self._lock = None

    def read_run(self) -> RunInfo | None:
        """Reads `run.json`; None if it does not exist yet.

        Raises:
            ConfigError: it cannot be read.
        """
        return read_run(self.path) if (self.path / RUN_FILE).exists() else None

    def reserve(self) -> None:
        """Takes the room on the disk that the last status of the run needs; freed with it, or when the folder is left.

        Raises:
            ConfigError: the disk is full, or the folder cannot be written.
        """
        self._free()
        # Random bytes, because some file systems store zeros without room.
        self._replace(_RESERVED_FILE, [os.urandom(_RESERVED_BYTES)])

    def write_run(self, run: RunInfo) -> None:
        """Replaces `run.json`; if the run has ended, with the reserved room."""
        line = _line(check_kind("run", run, RunInfo), indent=2)
        if run.status != "running":
            self._free()
        self._replace(RUN_FILE, [line])

    def append_step(self, step: StepRecord) -> None:
        """Adds a line to `steps.jsonl`, or nothing of it."""
        path, line = self.path / STEPS_FILE, _line(check_kind("step", step, StepRecord))
        with self._writing():
            size = path.stat().st_size if path.exists() else 0
            try:
                with path.open("ab") as file:
                    file.write(line)
            except OSError:
                os.truncate(path, size)
                raise

    def keep_steps(self, last: int) -> list[StepRecord]:
        """Removes the steps after step `last`, and an incomplete line. Returns the remaining steps.

        Raises:
            ConfigError: `steps.jsonl` cannot be read, or a step up to `last` is missing.
        """
        last = check_count("last", last, least=0)
        path = self.path / STEPS_FILE
        kept = [step for step in read_steps(self.path) if step.step <= last] if path.exists() else []
        if [step.step for step in kept] != list(range(1, last + 1)):
            raise ConfigError(
                f"{path} does not contain the steps 1 to {last}, which {STATE_FILE} counts: restore the file, or use "
                "another folder"
            )
        self._replace(STEPS_FILE, map(_line, kept))
        return kept

    def read_state(self) -> RunState | None:
        """Reads the state that the run resumes from; None before the first checkpoint.

        Raises:
            ConfigError: the file cannot be read.
        """
        path = self.path / STATE_FILE
        return _parsed(RunState, _bytes_of(path), str(path)) if path.exists() else None

    def write_state(self, state: RunState) -> None:
        """Replaces `state.json`, after all steps before it have reached the disk."""
        line = _line(check_kind("state", state, RunState), indent=2)
        steps = self.path / STEPS_FILE
        with self._writing():
            if steps.exists():
                _flush(steps)
        self._replace(STATE_FILE, [line])

    def write_sampled(self, number: int, batch: SampledBatch) -> None:
        """Writes the batch with a number, from 0, that the model sampled."""
        name, line = _sampled_name(number), _line(check_kind("batch", batch, SampledBatch))
        with self._writing():
            (self.path / SAMPLED_FOLDER).mkdir(exist_ok=True)
        self._replace(name, [line])

    def read_sampled(self, number: int) -> SampledBatch:
        """Reads a batch that the model sampled.

        Raises:
            ConfigError: it does not exist or cannot be read.
        """
        path = self.path / _sampled_name(number)
        if not path.exists():
            raise ConfigError(f"{self.path} has no sampled batch with the number {number}")
        return _parsed(SampledBatch, _bytes_of(path), str(path))

    def sampled_batches(self) -> set[int]:
        """Returns the numbers of the sampled batches that are kept."""
        return {int(path.stem) for path in (self.path / SAMPLED_FOLDER).glob("[0-9]*.json") if path.stem.isdecimal()}

    def keep_sampled(self, first: int, last: int | None) -> None:
        """Deletes the sampled batches before `first`, and from `last` on if it is given."""
        first = check_count("first", first, least=0)
        last = None if last is None else check_count("last", last, least=0)
        with self._writing():
            for number in self.sampled_batches():
                if number < first or (last is not None and number >= last):
                    (self.path / _sampled_name(number)).unlink()

    def _replace(self, name: str, lines: Iterable[bytes]) -> None:
        target = self.path / name
        draft = target.with_name(f".{target.name}.draft")
        with self._writing():
            try:
                with draft.open("wb") as file:
                    file.writelines(lines)
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(target)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
            if os.name == "posix":
                _flush(target.parent)

    def _free(self) -> None:
        with contextlib.suppress(OSError):
            (self.path / _RESERVED_FILE).unlink()

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"the run's folder {self.path} cannot be written: {error.strerror or error}; make room, or allow "
                "writing, and call train again with the same folder: the run resumes from its last checkpoint"
            ) from error


def _sampled_name(number: int) -> str:
    return f"{SAMPLED_FOLDER}/{check_count('number', number, least=0):06d}.json"


def _line(record: Record, indent: int | None = None) -> bytes:
    try:
        text = record.model_dump_json(indent=indent)
    except PydanticSerializationError:  # a lone surrogate, in a name or a setting
        whole = with_whole_texts(record.model_dump())
        text = type(record).model_validate(whole).model_dump_json(indent=indent)
    return plain_json(text).encode() + b"\n"


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{shown(str(path))} cannot be read: {error.strerror}") from error


def _parsed(model: type[AnyRecord], content: bytes, where: str) -> AnyRecord:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "content"
    # Raised outside of the except block, because pydantic's error contains the content of the file.
    raise ConfigError(f"{where} is not a valid {model.__name__}: {place}: {reason_of(first)}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
