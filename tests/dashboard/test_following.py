"""Reading a file of steps that grows, is replaced, or is broken."""

import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from tests.runs.made_up_runs import base_loss, made_up_step
from tests.runs.support import step_record
from tinkex_py.dashboard import following
from tinkex_py.dashboard.following import FollowedSteps, last_step


def lines(first: int, last: int, loss: float = 1.5) -> bytes:
    return b"".join(step_record(step, loss).model_dump_json().encode() + b"\n" for step in range(first, last + 1))


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def read_all(followed: FollowedSteps) -> None:
    while followed.read_more() or followed.is_behind:
        continue


@given(cuts=st.lists(st.integers(0, 3_000), max_size=8))
def test_it_does_not_matter_where_a_look_cuts_the_file(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]):
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


def test_blocks_smaller_than_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(following, "BLOCK", 7)
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines(1, 5) + b'{"step": 6')
    followed = FollowedSteps(path)
    read_all(followed)
    assert followed.curves.axes["step"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("way", ["replaced", "cut and written on", "removed and written on"])
def test_a_resumed_run_is_read_anew(tmp_path: Path, way: str):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines(1, 5))
    followed = FollowedSteps(path)
    followed.read_more()
    version = followed.version
    resumed = lines(1, 2) + lines(3, 7, loss=9.0)
    if way == "replaced":
        (tmp_path / "draft").write_bytes(resumed)
        (tmp_path / "draft").replace(path)
    elif way == "cut and written on":
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


def test_a_line_that_is_no_step_is_told_and_passed_over(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines(1, 1) + b'{"step": "two"}\n' + lines(3, 3))
    followed = FollowedSteps(path)
    assert followed.read_more()
    assert followed.curves.axes["step"] == [1, 3]
    assert followed.problem == "steps.jsonl, line 2 is not a step"


def test_a_line_without_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(following, "LONGEST_LINE", 2_000)
    monkeypatch.setattr(following, "BLOCK", 500)
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines(1, 1) + b"x" * 5_000)
    followed = FollowedSteps(path)
    read_all(followed)
    assert followed.curves.axes["step"] == [1]
    assert followed.problem == "steps.jsonl, line 2 is too long for a step"


def test_what_cannot_be_read_is_told_once(tmp_path: Path):
    (tmp_path / "steps.jsonl").mkdir()
    followed = FollowedSteps(tmp_path / "steps.jsonl")
    assert followed.read_more()
    assert not followed.read_more()
    assert followed.problem is not None
    assert followed.problem.startswith("steps.jsonl cannot be read: ")


def test_a_long_file_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines(1, 6))
    monkeypatch.setattr(following, "BLOCK", len(lines(1, 2)) + 10)
    followed = FollowedSteps(path)
    seen = []
    while followed.read_more():
        seen.append((followed.curves.axes["step"][-1], followed.is_behind))
    assert seen == [(2, True), (4, True), (6, False)]


def test_further_axes_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(following, "MOST_SAMPLES", 2)
    path = tmp_path / "steps.jsonl"
    for step in range(1, 5):
        # On the third step the run was resumed on a machine whose clock is behind.
        finished = 100.0 + step - (50 if step >= 3 else 0)
        record = step_record(
            step, finished_at=finished, seconds=1.0, tokens=7, samples={"q": "x" * 9_000} if step > 1 else {}
        )
        append(path, record.model_dump_json().encode() + b"\n")
    followed = FollowedSteps(path)
    read_all(followed)
    assert followed.curves.axes == {"step": [1, 2, 3, 4], "tokens": [7, 14, 21, 28], "seconds": [1.0, 2.0, 2.0, 2.0]}
    assert list(followed.samples) == [(step, {"q": "x" * following.LONGEST_SAMPLE}) for step in (3, 4)]


@pytest.mark.parametrize("end", [b"", b'{"step": 4'])
def test_the_last_step(tmp_path: Path, end: bytes):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines(1, 3) + end)
    step = last_step(path)
    assert step is not None
    assert step.step == 3


def test_the_last_step_of_a_file_without_one(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    for content in (b"", b"no step", b"no step\n", b"x" * 100_000):
        path.write_bytes(content)
        assert last_step(path) is None


def test_a_last_step_longer_than_the_first_reach(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    terms = [f"term {number}" for number in range(200)]
    path.write_bytes(lines(1, 1) + made_up_step(2, terms).model_dump_json().encode() + b"\n")
    assert path.stat().st_size > 4 * (1 << 14)
    step = last_step(path)
    assert step is not None
    assert step.losses[0].base_loss.value == base_loss(2)
