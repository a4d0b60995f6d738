"""A disk that is full before or during a run: a typed error, a true status, no drafts, and the run resumes."""

import asyncio
import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.runs.support import Calls, calm, losses, run_to
from tinkex_py import ConfigError, telemetry
from tinkex_py.runs import StepRecord, read_run
from tinkex_py.runs.folder import LOCK_FILE, RUN_FILE, STATE_FILE, STEPS_FILE, RunFolder
from tinkex_py.runs.progress import NoProgress

pytestmark = pytest.mark.asyncio


class Disk:
    """Flushing a file of a folder fails while the files there are larger than the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fsync = os.fsync
        self.size: float = math.inf

    def used(self) -> int:
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def fsync(self, descriptor: int) -> None:
        here = {path.stat().st_ino for path in self._folder.iterdir()} if self._folder.exists() else set()
        if os.fstat(descriptor).st_ino in here and self.used() > self.size:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._fsync(descriptor)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", made.fsync)
    return made


class After(NoProgress):
    """Calls a function after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self._step = step
        self._action = action

    def step(self, record: StepRecord) -> None:
        if record.step == self._step:
            self._action()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_a_disk_that_is_full_before_the_run(bench: Any, tmp_path: Path, disk: Disk) -> None:
    disk.size, calls = 0, Calls(bench.service)
    with pytest.raises(ConfigError, match=r"run cannot be written: No space left on device; make room"):
        await run_to(bench.service, tmp_path / "run", model=calls)
    assert names(tmp_path / "run") <= {LOCK_FILE}
    assert calls.made == []
    disk.size = math.inf
    run = await run_to(bench.service, tmp_path / "run", model=calls)
    assert run.info.status == "finished"


async def test_a_disk_that_fills_up_during_the_run(bench: Any, tmp_path: Path, disk: Disk) -> None:
    def fill() -> None:
        disk.size = disk.used()

    with pytest.raises(ConfigError, match=r"No space left on device; make room, .* resumes from its last checkpoint"):
        await run_to(bench.service, tmp_path / "run", progress=After(3, fill))
    told = read_run(tmp_path / "run")
    assert told.status == "failed"
    assert "No space left on device" in str(told.reason)
    assert names(tmp_path / "run") - {LOCK_FILE} == {RUN_FILE, STATE_FILE, STEPS_FILE}
    state = RunFolder(tmp_path / "run").read_state()
    assert state is not None
    assert state.step == 2  # checkpoint 4 did not fit
    disk.size = math.inf
    run = await run_to(bench.service, tmp_path / "run")
    assert run.info.status == "finished"
    assert losses(tmp_path / "run") == await calm(bench.service, 6)


async def test_a_status_that_cannot_be_written_hides_no_cancellation(bench: Any, tmp_path: Path, disk: Disk) -> None:
    def end() -> None:
        disk.size = 0
        task.cancel()

    seen: list[dict[str, Any]] = []
    telemetry.attach(lambda event: seen.append(dict(event.metadata)), events=["tinkex.run.status_not_written"])
    task = asyncio.create_task(run_to(bench.service, tmp_path / "run", progress=After(1, end)))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == [{"status": "stopped", "reason": "ConfigError"}]
    assert names(tmp_path / "run") - {LOCK_FILE} == {RUN_FILE, STATE_FILE, STEPS_FILE}
    disk.size = math.inf
    await run_to(bench.service, tmp_path / "run")
    assert losses(tmp_path / "run") == await calm(bench.service, 6)
