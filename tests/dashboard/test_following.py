"""Reading a file of steps that grows, is replaced, or is broken; curves in bounded memory."""

import math
import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from tests.runs.made_up_runs import base_loss, made_up_step
from tests.runs.support import step_record
from tinkex_py.dashboard import following
from tinkex_py.dashboard.curves import Curves
from tinkex_py.dashboard.following import FollowedSteps, last_step


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.sampled_from([2, 4, 10]))
def test_points_are_means_over_as_many_steps_as_necessary(values: list[float], points: int):
    curves = Curves(points)
    for step, value in enumerate(values, start=1):
        curves.add(step, {"loss/total": value}, tokens=10 * step)
    stride = 1
    while math.ceil(len(values) / stride) > points:
        stride *= 2
    groups = [values[start : start + stride] for start in range(0, len(values), stride)]
    assert (curves.stride, curves.steps_made, curves.points) == (stride, len(values), len(groups))
    means = [math.fsum(group) / len(group) for group in groups]
    assert curves.values("loss/total") == pytest.approx(means, abs=1e-3, rel=1e-9)
    ends = [min(end, len(values)) for end in range(stride, len(values) + stride, stride)]
    assert curves.axes == {"step": ends, "tokens": [10 * end for end in ends]}
    start = len(groups) // 2
    assert curves.values("loss/total", start) == curves.values("loss/total")[start:]


def test_missing_values_and_repeated_steps_are_ignored():
    curves = Curves(4)
    numbers = [
        (1, {"a": 1.0}),
        (2, {"b": 10.0}),
        (3, {"a": math.nan, "b": 20.0}),
        (4, {"a": math.inf}),
        (5, {"a": 5.0}),
    ]
    for step, row in [*numbers, (5, {"a": 9.0}), (2, {"a": 9.0})]:
        curves.add(step, row)
    assert curves.names == ["a", "b"]
    assert curves.axes["step"] == [2, 4, 5]
    assert curves.values("a") == [1.0, None, 5.0]
    assert curves.values("b") == [10.0, 20.0, None]
    assert curves.values("c", 1) == [None, None]


def lines(first: int, last: int, loss: float = 1.5) -> bytes:
    return b"".join(step_record(step, loss).model_dump_json().encode() + b"\n" for step in range(first, last + 1))


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def read_all(followed: FollowedSteps) -> None:
    while followed.read_more() or followed.is_behind:
        continue


@given(cuts=st.lists(st.integers(0, 3_000), max_size=8))
def test_the_file_may_be_read_at_any_length(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]):
    path = tmp_path_factory.mktemp("run") / "steps.jsonl"
    content = lines(1, 6)
    followed = FollowedSteps(path)
    assert not followed.read_more()
    places = sorted({min(cut, len(content)) for cut in cuts} | {len(content)})
    for begin, end in zip([0, *places], places, strict=False):
        append(path, content[begin:end])
        before = followed.curves.steps_made
        assert followed.read_more() == (followed.curves.steps_made > before)
        assert followed.curves.steps_made == content[:end].count(b"\n")
    assert followed.curves.axes["step"] == [1, 2, 3, 4, 5, 6]
    assert followed.curves.values("loss/base") == [1.5] * 6
    assert (followed.restarts, followed.problem) == (0, None)


def test_a_long_file_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines(1, 6) + b'{"step": 7')
    monkeypatch.setattr(following, "BLOCK", len(lines(1, 2)) + 10)
    followed = FollowedSteps(path)
    seen = []
    while followed.read_more():
        seen.append((followed.curves.axes["step"][-1], followed.is_behind))
    assert seen == [(2, True), (4, True), (6, False)]
    monkeypatch.setattr(following, "BLOCK", 7)  # smaller than a line
    append(path, lines(7, 8)[len(b'{"step": 7') :])
    read_all(followed)
    assert followed.curves.axes["step"] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("way", ["replaced", "truncated", "removed"])
def test_the_file_of_a_resumed_run_is_read_from_the_start(tmp_path: Path, way: str):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines(1, 5))
    followed = FollowedSteps(path)
    followed.read_more()
    version = followed.version
    resumed = lines(1, 2) + lines(3, 7, loss=9.0)
    if way == "replaced":
        (tmp_path / "draft").write_bytes(resumed)
        (tmp_path / "draft").replace(path)
    elif way == "truncated":
        os.truncate(path, len(lines(1, 2)))
        append(path, resumed[len(lines(1, 2)) :])
    else:
        path.unlink()
        assert followed.read_more()
        assert followed.curves.points == 0
        path.write_bytes(resumed)
    assert followed.read_more()
    assert followed.version != version
    assert followed.curves.values("loss/base") == [1.5, 1.5, *[9.0] * 5]
    assert not followed.read_more()


@pytest.mark.parametrize(
    ("second", "steps", "problem"),
    [
        (b'{"step": "two"}\n', [1, 3], "steps.jsonl, line 2 is not a step"),
        (b"x" * 5_000, [1], "steps.jsonl, line 2 is too long for a step"),
    ],
)
def test_a_broken_line_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bytes, steps: list[int], problem: str
):
    monkeypatch.setattr(following, "LONGEST_LINE", 2_000)
    monkeypatch.setattr(following, "BLOCK", 500)
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines(1, 1) + second + lines(3, 3))
    followed = FollowedSteps(path)
    read_all(followed)
    assert followed.curves.axes["step"] == steps
    assert followed.problem == problem


def test_an_unreadable_file_is_reported_once(tmp_path: Path):
    (tmp_path / "steps.jsonl").mkdir()
    followed = FollowedSteps(tmp_path / "steps.jsonl")
    assert followed.read_more()
    assert not followed.read_more()
    assert str(followed.problem).startswith("steps.jsonl cannot be read: ")


def test_further_axes_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(following, "MOST_SAMPLES", 2)
    path = tmp_path / "steps.jsonl"
    for step in range(1, 5):
        # On the third step the run was resumed on a machine whose clock is behind.
        finished = 100.0 + step - (50 if step >= 3 else 0)
        samples = {"q": "x" * 9_000} if step > 1 else {}
        record = step_record(step, finished_at=finished, seconds=1.0, tokens=7, samples=samples)
        append(path, record.model_dump_json().encode() + b"\n")
    followed = FollowedSteps(path)
    read_all(followed)
    assert followed.curves.axes == {"step": [1, 2, 3, 4], "tokens": [7, 14, 21, 28], "seconds": [1.0, 2.0, 2.0, 2.0]}
    assert list(followed.samples) == [(step, {"q": "x" * following.LONGEST_SAMPLE}) for step in (3, 4)]


def test_the_last_step(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    for content in (b"", b"no step", b"no step\n", b"x" * 100_000):
        path.write_bytes(content)
        assert last_step(path) is None
    for end in (b"", b'{"step": 4'):
        path.write_bytes(lines(1, 3) + end)
        assert getattr(last_step(path), "step", None) == 3
    many = made_up_step(2, [f"term {number}" for number in range(200)])
    path.write_bytes(lines(1, 1) + many.model_dump_json().encode() + b"\n")
    assert path.stat().st_size > 4 * (1 << 14)  # longer than the first block that is read
    step = last_step(path)
    assert step is not None
    assert step.losses[0].base_loss.value == base_loss(2)
