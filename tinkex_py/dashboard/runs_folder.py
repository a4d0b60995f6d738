"""The runs in one folder: a summary of each, and the curves of the selected ones. Not thread-safe."""

import math
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tinkex_py.arguments import check_path
from tinkex_py.dashboard.following import FollowedSteps, last_step
from tinkex_py.errors import ConfigError
from tinkex_py.runs.folder import RUN_FILE, STEPS_FILE, read_run
from tinkex_py.runs.records import RunInfo, RunStatus, scalars

# Curves of so many runs are kept after their selection ends.
MOST_IDLE_RUNS = 28
LARGEST_RUN_FILE = 16 << 20  # bytes

Stamp = tuple[int, int, int] | None


class RunLine(BaseModel):
    """One run in the list.

    Attributes:
        name: of its folder.
        status: of `run.json`; a process that was killed leaves "running".
        reason: why it stopped, failed or ended early; None otherwise.
        model: name of the base model; None if unknown.
        steps: number of the last step; 0 before any.
        total_steps: planned steps; None if the run ends with its data.
        started_at: in seconds since the epoch; 0 if `run.json` cannot be read.
        last_step_at: end of the last step, in seconds since the epoch; None if no step was made.
        loss_total: of the last step; None if there is none, or if it is not finite.
        problem: what is wrong with its files; None if nothing is.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    status: RunStatus | None = None
    reason: str | None = None
    model: str | None = None
    steps: int = 0
    total_steps: int | None = None
    started_at: float = 0.0
    last_step_at: float | None = None
    loss_total: float | None = None
    problem: str | None = None


class RunsFolder:
    """A folder of runs. A run is a folder in it, not a link to another one, that contains a `run.json`.

    Attributes:
        lines: the runs by name, as of the last `refresh`; a line that did not change is the same object.
        is_behind: whether the files of wanted runs hold more than the last `refresh` has read.

    Raises:
        ConfigError: it is not a folder.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = check_path("the folder of runs", path, error=ConfigError).resolve()
        if not self._path.is_dir():
            raise ConfigError(f"{path} is not a folder: name the folder that contains the folders of the runs")
        self.lines: dict[str, RunLine] = {}
        self.is_behind = False
        self._stamps: dict[str, tuple[Stamp, Stamp]] = {}
        self._followed: dict[str, FollowedSteps] = {}

    def refresh(self, wanted: Collection[str] = ()) -> bool:
        """Reads what is new in the files, and the curves of the `wanted` runs. Returns whether anything changed."""
        stamps = dict(self._look())
        changed = stamps.keys() != self.lines.keys()
        lines: dict[str, RunLine] = {}
        for name, stamp in stamps.items():
            if self._stamps.get(name) == stamp:
                lines[name] = self.lines[name]
            else:
                lines[name], changed = self._line(name, has_steps=stamp[1] is not None), True
        self.lines, self._stamps = lines, stamps
        changed = any([changed, *self._follow(wanted)])
        self.is_behind = any(steps.is_behind for name, steps in self._followed.items() if name in wanted)
        return changed

    def followed(self, name: str) -> FollowedSteps | None:
        """Returns the steps of a wanted run; None if there is no such run."""
        return self._followed.get(name)

    def info(self, name: str) -> RunInfo | None:
        """Reads `run.json` of a run; None if there is no such run.

        Raises:
            ConfigError: it cannot be read.
        """
        return read_run(self._path / name) if name in self.lines else None

    def _look(self) -> Iterator[tuple[str, tuple[Stamp, Stamp]]]:
        try:
            with os.scandir(self._path) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError:  # the folder was removed, and may be created again
            return
        for name in filter(_is_text, names):
            run = _stamp(self._path / name / RUN_FILE)
            if run is not None:
                yield name, (run, _stamp(self._path / name / STEPS_FILE))

    def _line(self, name: str, *, has_steps: bool) -> RunLine:
        folder = self._path / name
        try:
            if (folder / RUN_FILE).stat().st_size > LARGEST_RUN_FILE:
                return RunLine(name=name, problem=f"{RUN_FILE} is larger than {LARGEST_RUN_FILE} bytes")
            info = read_run(folder)
            step = last_step(folder / STEPS_FILE) if has_steps else None
        except OSError as error:
            return RunLine(name=name, problem=f"cannot be read: {error.strerror}")
        except ConfigError as error:
            return RunLine(name=name, problem=str(error))
        return RunLine(
            name=name,
            status=info.status,
            reason=info.reason,
            model=info.model,
            steps=0 if step is None else step.step,
            total_steps=info.total_steps,
            started_at=info.started_at,
            last_step_at=None if step is None else step.finished_at,
            loss_total=None if step is None else _finite(scalars(step).get("loss/total")),
        )

    def _follow(self, wanted: Collection[str]) -> Iterator[bool]:
        for name in [name for name in self._followed if name not in self.lines]:
            del self._followed[name]
        for name in wanted:
            if name in self.lines:
                steps = self._followed.pop(name, None) or FollowedSteps(self._path / name / STEPS_FILE)
                self._followed[name] = steps  # last in the order, so that the run that was idle longest is first
                yield self._stamps[name][1] is not None and steps.read_more()
        idle = [name for name in self._followed if name not in wanted]
        for name in idle[: max(0, len(idle) - MOST_IDLE_RUNS)]:
            del self._followed[name]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # not UTF-8, so not possible in JSON
        return False
    return True


def _stamp(path: Path) -> Stamp:
    """Changes with a regular file; None for anything else, such as links, which may lead out of the folder."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
