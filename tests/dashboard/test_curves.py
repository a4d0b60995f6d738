"""Curves in bounded memory: points are means, whatever the length of the run."""

import math

import pytest
from hypothesis import given, strategies as st

from tinkex_py.dashboard.curves import Curves


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.sampled_from([2, 4, 10]))
def test_points_are_means_over_as_many_steps_as_it_takes(values: list[float], points: int):
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


def test_missing_values_are_ignored():
    curves = Curves(4)
    numbers = [{"a": 1.0}, {"b": 10.0}, {"a": math.nan, "b": 20.0}, {"a": math.inf}, {"a": 5.0}]
    for step, row in enumerate(numbers, start=1):
        curves.add(step, row)
    assert curves.names == ["a", "b"]
    assert curves.axes["step"] == [2, 4, 5]
    assert curves.values("a") == [1.0, None, 5.0]
    assert curves.values("b") == [10.0, 20.0, None]
    assert curves.values("c", 1) == [None, None]


def test_a_curve_that_begins_late_survives_a_join_of_points():
    curves = Curves(2)
    for step in range(1, 9):
        curves.add(step, {"late": float(step)} if step in (4, 8) else {})
    assert curves.values("late") == [4.0, 8.0]


def test_a_step_that_comes_again_is_ignored():
    curves = Curves()
    for step in (1, 2, 2, 1, 5):
        curves.add(step, {"a": float(step)})
    assert curves.axes["step"] == [1, 2, 5]
    assert curves.values("a") == [1.0, 2.0, 5.0]


def test_no_step_at_all():
    curves = Curves()
    assert (curves.points, curves.axes, curves.names, curves.values("a")) == (0, {"step": []}, [], [])


@pytest.mark.parametrize("points", [0, 1, 3])
def test_neighbours_need_pairs(points: int):
    with pytest.raises(ValueError, match=str(points)):
        Curves(points)
