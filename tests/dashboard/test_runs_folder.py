"""The list of runs, and that it never leads out of its folder."""

import math
import os
from pathlib import Path

import pytest

from tests.runs.made_up_runs import base_loss, contribution, made_up_run, made_up_step, write_run
from tests.runs.support import run_info, step_record
from tinkex_py.dashboard import following, runs_folder
from tinkex_py.dashboard.runs_folder import RunsFolder
from tinkex_py.errors import ConfigError


def test_a_line_about_each_run(tmp_path: Path):
    made_up_run(tmp_path / "a", 3)
    write_run(tmp_path / "b", [], run_info(status="failed", reason="it broke"))
    (tmp_path / "no run").mkdir()
    (tmp_path / "a file").touch()
    write_run(tmp_path / os.fsdecode(b"\xff"), [])  # JSON cannot contain the name
    folder = RunsFolder(tmp_path)
    assert folder.lines == {}
    assert folder.refresh()
    assert list(folder.lines) == ["a", "b"]
    a, b = folder.lines.values()
    assert (a.status, a.steps, a.total_steps, a.model, a.last_step_at) == ("finished", 3, 3, "tiny", 1_006.0)
    assert a.loss_total == pytest.approx(base_loss(3) + sum(contribution(place, 3) for place in range(3)))
    assert (b.status, b.reason, b.steps, b.loss_total, b.last_step_at) == ("failed", "it broke", 0, None, None)


def test_only_what_changed_is_a_new_line(tmp_path: Path):
    run = made_up_run(tmp_path / "a", 3)
    made_up_run(tmp_path / "b", 3)
    folder = RunsFolder(tmp_path)
    folder.refresh()
    before = folder.lines
    assert not folder.refresh()
    with (run / "steps.jsonl").open("a") as file:
        file.write(made_up_step(4).model_dump_json() + "\n")
    assert folder.refresh()
    assert folder.lines["b"] is before["b"]
    assert folder.lines["a"].steps == 4
    (run / "run.json").unlink()
    assert folder.refresh()
    assert list(folder.lines) == ["b"]


def test_curves_of_the_wanted_runs_and_of_some_idle_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs_folder, "MOST_IDLE_RUNS", 2)
    for number in range(5):
        made_up_run(tmp_path / f"{number:02}", number + 1, ["l2"])
    folder = RunsFolder(tmp_path)
    folder.refresh(["00", "nowhere"])
    assert folder.followed("nowhere") is None
    steps = folder.followed("00")
    assert steps is not None
    assert steps.curves.values("loss/base") == [base_loss(1)]
    for name in list(folder.lines):
        folder.refresh([name])
    kept = [name for name in folder.lines if folder.followed(name)]
    assert kept == list(folder.lines)[-3:]
    folder.refresh(kept[:1])
    assert folder.followed(kept[0]) is not None


def test_a_long_file_is_behind_only_while_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(following, "BLOCK", 4_000)
    made_up_run(tmp_path / "long", 8)
    made_up_run(tmp_path / "short", 1)
    folder = RunsFolder(tmp_path)
    folder.refresh(["long"])
    assert folder.is_behind
    folder.refresh(["short"])
    assert not folder.is_behind
    while folder.refresh(["long"]):
        continue
    assert not folder.is_behind
    steps = folder.followed("long")
    assert steps is not None
    assert steps.curves.steps_made == 8


def test_links_are_not_followed(tmp_path: Path):
    outside = made_up_run(tmp_path / "outside" / "secret", 1)
    runs = tmp_path / "runs"
    made_up_run(runs / "own", 1)
    (runs / "linked folder").symlink_to(outside)
    for name, linked in (("linked run file", "run.json"), ("linked steps", "steps.jsonl")):
        (runs / name).mkdir()
        for file in ("run.json", "steps.jsonl"):
            if file == linked:
                (runs / name / file).symlink_to(outside / file)
            else:
                (runs / name / file).write_bytes((outside / file).read_bytes())
    folder = RunsFolder(runs)
    odd = ["..", "../outside/secret", str(outside), "linked folder", "linked run file", "linked steps", ""]
    folder.refresh(odd)
    assert list(folder.lines) == ["linked steps", "own"]
    assert folder.lines["linked steps"].steps == 0
    for name in odd:
        steps = folder.followed(name)
        assert steps is None or (name == "linked steps" and steps.curves.points == 0)
        if name != "linked steps":
            assert folder.info(name) is None
    # A folder that becomes a link after it was listed is no run any more.
    (runs / "own").rename(runs / "moved")
    (runs / "own").symlink_to(outside)
    folder.refresh(["own"])
    assert folder.followed("own") is None


def test_a_pipe_is_never_opened(tmp_path: Path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "run.json")
    run = write_run(tmp_path / "b", [])
    (run / "steps.jsonl").unlink()
    os.mkfifo(run / "steps.jsonl")
    folder = RunsFolder(tmp_path)
    folder.refresh(["a", "b"])
    assert list(folder.lines) == ["b"]


def test_problems_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, content in (("broken", "{"), ("large", " " * 5_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    infinite = step_record(1, math.inf)
    write_run(tmp_path / "infinite", [infinite])
    monkeypatch.setattr(runs_folder, "LARGEST_RUN_FILE", 4_000)
    folder = RunsFolder(tmp_path)
    folder.refresh()
    assert "run.json is not a valid RunInfo" in (folder.lines["broken"].problem or "")
    assert folder.lines["large"].problem == "run.json is larger than 4000 bytes"
    assert (folder.lines["infinite"].loss_total, folder.lines["infinite"].problem) == (None, None)
    with pytest.raises(ConfigError, match="broken"):
        folder.info("broken")


def test_a_folder_that_is_none_or_goes_away(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere"):
        RunsFolder(tmp_path / "nowhere")
    made_up_run(tmp_path / "runs" / "a", 1)
    folder = RunsFolder(tmp_path / "runs")
    folder.refresh(["a"])
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert folder.refresh(["a"])
    assert folder.lines == {}
    assert folder.followed("a") is None
