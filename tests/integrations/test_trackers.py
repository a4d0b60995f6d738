"""The readers of the trackers return what was logged; a resumed run stays one run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.tracker_program import RUN, log_twice
from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.integrations.trackers import (
    JsonlSink,
    MlflowSink,
    TensorBoardSink,
    TrackioSink,
    WandbSink,
    mlflow_key,
    run_key,
)
from tinkex_py.runs.records import RunInfo
from tinkex_py.runs.sinks import MetricSink

SWITCHED_OFF = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_OFFLINE": "1",
    "OTEL_SDK_DISABLED": "true",
}


def points_of(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("run", "step"):
                points.setdefault(name, []).append((row["step"], float(value)))
    return points


def rows_of(path: Path) -> list[dict[str, Any]]:
    def refuse(token: str) -> float:
        raise AssertionError(f"{token} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def same(given: float) -> Any:
    return pytest.approx(given, rel=1e-6, abs=0, nan_ok=True)


def assert_one_curve(points: dict[str, list[tuple[int, float]]]) -> None:
    assert {name: [step for step, _ in curve] for name, curve in points.items()} == {
        "loss/total": [1, 2, 3],
        "term/l1/value": [1, 2, 3],
    }
    assert [value for _, value in points["loss/total"]] == [same(0.1), same(0.3), same(-1e-12)]
    assert [value for _, value in points["term/l1/value"]] == [same(4.9), -math.inf, same(7.0)]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "new" / "numbers.jsonl"
    log_twice(lambda: JsonlSink(path))
    rows = rows_of(path)
    assert_one_curve(points_of(rows))
    assert {row["run"] for row in rows} == {run_key(RUN)}
    assert list(path.parent.iterdir()) == [path]


def test_jsonl_keeps_nan_and_other_runs_and_removes_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    other = RUN.model_copy(update={"started_at": 1.0})
    for run, rows in ((other, {5: 1.0}), (RUN, {1: math.nan, 2: 2.0, 3: 3.0})):
        sink = JsonlSink(path)
        sink.start(run)
        for step, value in rows.items():
            sink.log(step, {"loss/total": value})
    with path.open("a") as file:
        file.write('{"run": "half a li')
    sink = JsonlSink(path)
    sink.start(RUN)
    sink.log(2, {"loss/total": 4.0})
    sink.log(3, {"loss/total": 5.0})
    assert [(row["run"], row["step"], row["loss/total"]) for row in rows_of(path)] == [
        (run_key(other), 5, 1.0),
        (run_key(RUN), 1, "NaN"),
        (run_key(RUN), 2, 4.0),
        (run_key(RUN), 3, 5.0),
    ]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_twice(lambda: TensorBoardSink(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [run_key(RUN)]
    reader = EventAccumulator(str(tmp_path / run_key(RUN)))
    reader.Reload()
    assert_one_curve(
        {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    )
    (text,) = reader.Tensors("run/text_summary")
    assert b'"learning_rate": 0.0001' in text.tensor_proto.string_val[0]


def logged_with(tracker: str, folder: Path) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.integrations.tracker_program", tracker, str(folder)],
        env={**kept, **SWITCHED_OFF, "TRACKIO_DIR": str(folder), "HOME": str(folder)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def assert_both_histories(found: dict[str, Any], infinity: float = math.inf) -> None:
    points = {name: [(step, value) for step, value in curve] for name, curve in found["points"].items()}
    assert points == {
        "loss/total": [(1, 0.1), (2, same(math.nan)), (2, 0.3), (3, -1e-12)],
        "term/l1/value": [(1, 4.9), (2, infinity), (2, -infinity), (3, 7.0)],
    }


def test_wandb(tmp_path: Path) -> None:
    found = logged_with("wandb", tmp_path)
    assert_both_histories(found)
    assert found["ids"] == [found["key"]]
    assert found["names"] == [RUN.name]
    assert found["config"]["terms"] == ["l1", "kl"]
    assert found["config"]["seed"] == 7
    assert found["still_open"]


def test_mlflow(tmp_path: Path) -> None:
    found = logged_with("mlflow", tmp_path)
    for curve in found["points"].values():
        curve[1:3] = sorted(curve[1:3], key=lambda point: point[1] < 1)  # the order within one step is not kept
    assert_both_histories(found, infinity=sys.float_info.max)
    assert found["names"] == [RUN.name]
    assert found["status"] == "FINISHED"
    assert found["config"] == {
        "model": "tiny",
        "seed": "7",
        "learning_rate": "0.0001",
        "terms": '["l1", "kl"]',
        "note": "plain",
    }


def test_trackio(tmp_path: Path) -> None:
    found = logged_with("trackio", tmp_path)
    assert_both_histories(found)
    assert found["names"] == [found["key"]]
    assert found["config"]["terms"] == ["l1", "kl"]
    assert found["still_open"]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboard", lambda: TensorBoardSink("folder")),
        ("wandb", lambda: WandbSink("project")),
        ("mlflow", lambda: MlflowSink("experiment")),
        ("trackio", lambda: TrackioSink("project")),
    ],
)
def test_a_missing_extra_raises_at_once(package: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra) as caught:
        make()
    assert str(caught.value) == f"{package} is not installed. Run: pip install 'tinkex-py[{package}]'"


def test_all_are_sinks_and_importing_them_loads_no_tracker(tmp_path: Path) -> None:
    assert isinstance(JsonlSink(tmp_path / "x"), MetricSink)
    for sink in (TensorBoardSink, WandbSink, MlflowSink, TrackioSink):
        assert all(callable(getattr(sink, name)) for name in ("start", "log", "finish"))
    program = (
        "import sys, tinkex_py.integrations.trackers\n"
        "print([name for name in ('torch', 'tensorboard', 'wandb', 'mlflow', 'trackio') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_sinks_raise_without_a_run_and_without_a_folder(tmp_path: Path) -> None:
    for sink in (JsonlSink(tmp_path / "x"), TensorBoardSink(tmp_path)):
        with pytest.raises(ConfigError, match=rf"{type(sink).__name__} has no run: call start\(run\)"):
            sink.log(1, {"loss/total": 1.0})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"numbers.jsonl cannot be written \(.*\): pass another path"):
        JsonlSink(tmp_path / "file" / "numbers.jsonl").start(RUN)


def test_run_keys_are_the_same_for_the_same_run_only() -> None:
    again = RunInfo.model_validate_json(
        RUN.model_copy(update={"updated_at": 2e9, "status": "failed"}).model_dump_json()
    )
    assert run_key(again) == run_key(RUN)
    assert run_key(RUN).startswith("sft-kl-1-")
    assert run_key(RUN.model_copy(update={"started_at": 1.0})) != run_key(RUN)
    assert run_key(RUN.model_copy(update={"name": "sft kl-1"})) != run_key(RUN)
    for name in ("", "../..", "Größe", "x" * 300):
        key = run_key(RUN.model_copy(update={"name": name}))
        assert len(key) <= 64
        assert not set(key) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("term/l1/value", "term/l1/value"),
        ("term/kl (ref)/value", "term/kl _ref_/value"),
        ("term/../../x/value", "term/x/value"),
        ("term//value", "term/value"),
        ("..", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_in_mlflow(name: str, key: str) -> None:
    assert mlflow_key(name) == key
