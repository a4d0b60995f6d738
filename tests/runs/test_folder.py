"""The folder of a run: written files can be read, also after the process was killed at any time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies

from tests.runs.support import run_info, step_record
from tinkex_py import ConfigError
from tinkex_py.runs.folder import RUN_FILE, STATE_FILE, STEPS_FILE, RunFolder, read_run, read_steps
from tinkex_py.runs.records import RunState, SavedCheckpoint


def state_at(step: int) -> RunState:
    checkpoint = SavedCheckpoint(step=step, path=f"tinker://a/weights/step-{step}")
    return RunState(checkpoints=(checkpoint,), batches=2 * step, client_step=step, pipeline={"controllers": {}})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run, steps = run_info(config={"rank": 4}, total_steps=3), [step_record(1), step_record(2, loss=0.25)]
    with RunFolder(tmp_path / "deep" / "run") as folder:
        assert folder.read_run() is None
        assert folder.read_state() is None
        folder.write_run(run)
        assert read_steps(folder.path) == []
        for step in steps:
            folder.append_step(step)
        folder.write_state(state_at(2))
        folder.write_state(state_at(3))
        assert folder.read_state() == state_at(3)
        assert folder.read_run() == run
    assert read_run(tmp_path / "deep" / "run") == run
    assert read_steps(str(tmp_path / "deep" / "run")) == steps
    assert {path.name for path in (tmp_path / "deep" / "run").iterdir()} <= {RUN_FILE, STEPS_FILE, STATE_FILE, "lock"}


@given(cut=strategies.integers(min_value=0))
def test_an_incomplete_last_line_is_ignored(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for number in (1, 2):
        folder.append_step(step_record(number))
    path = folder.path / STEPS_FILE
    whole = path.read_bytes()
    last = whole.index(b"\n") + 1
    kept = last + cut % (len(whole) - last)
    path.write_bytes(whole[:kept])
    # Only the line break may be missing for the line to count.
    expected = 2 if kept == len(whole) - 1 else 1
    assert read_steps(folder.path) == [step_record(number) for number in range(1, expected + 1)]
    assert folder.keep_steps(1) == [step_record(1)]
    folder.append_step(step_record(2, loss=9.0))
    assert read_steps(folder.path) == [step_record(1), step_record(2, loss=9.0)]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for read in (read_run, read_steps):
        with pytest.raises(ConfigError, match=r"nothing.run\.json' cannot be read: No such file"):
            read(tmp_path / "nothing")
    folder = RunFolder(tmp_path)
    folder.append_step(step_record(1))
    with (tmp_path / STEPS_FILE).open("ab") as file:
        file.write(b'{"step": 2}\n')
    folder.append_step(step_record(3))
    with pytest.raises(
        ConfigError, match=r"steps\.jsonl, line 2 is not a valid StepRecord: finished_at: Field required"
    ):
        read_steps(tmp_path)
    for content in (b"", b"{", b'{"name": "a"}', b"\xff"):
        for name in (RUN_FILE, STATE_FILE):
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=r"run\.json is not a valid RunInfo"):
            read_run(tmp_path)
        with pytest.raises(ConfigError, match=r"state\.json is not a valid RunState"):
            folder.read_state()


def test_steps_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in (1, 2, 3):
        folder.append_step(step_record(number))
    assert folder.keep_steps(2) == [step_record(1), step_record(2)]
    assert read_steps(tmp_path) == [step_record(1), step_record(2)]
    with pytest.raises(ConfigError, match=r"does not contain the steps 1 to 5"):
        folder.keep_steps(5)
    assert folder.keep_steps(0) == []
    assert (tmp_path / STEPS_FILE).read_bytes() == b""


def test_a_second_process_and_an_impossible_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file"), RunFolder(tmp_path / "file" / "run"):
        pytest.fail("entered")
    program = "import sys; from tinkex_py.runs.folder import RunFolder\nwith RunFolder(sys.argv[1]): pass"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with RunFolder(tmp_path), pytest.raises(ConfigError, match="another process, or by this one"), RunFolder(tmp_path):
        pytest.fail("entered twice")
    with RunFolder(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "is being trained by another process" in refused.stderr
    assert subprocess.run(command, check=False).returncode == 0


def test_a_line_that_does_not_fit_is_not_written_in_part(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = RunFolder(tmp_path)
    folder.append_step(step_record(1))
    before = (tmp_path / STEPS_FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot be written: File too large; make room"):
            folder.append_step(step_record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / STEPS_FILE).read_bytes() == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_state(state_at(1))

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot be written: no space left .* make room"):
        folder.write_state(state_at(2))
    assert folder.read_state() == state_at(1)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
