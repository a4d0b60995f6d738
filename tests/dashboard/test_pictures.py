"""What is drawn where, and in which colours."""

import pytest

from tests.runs.made_up_runs import TERMS, made_up_step
from tinkex_py.dashboard.pictures import BLACK, GREY, MOST_COLOURS, PICTURES, Drawing, drawings
from tinkex_py.runs.records import scalars

NAMES = list(scalars(made_up_step(5)))  # it is evaluated too


def by_key(runs: dict[str, list[str]], colours: dict[str, int] | None = None) -> dict[str, Drawing]:
    return {drawing.picture.key: drawing for drawing in drawings(runs, colours)}


def names_of(terms: list[str]) -> list[str]:
    return list(scalars(made_up_step(1, terms)))


def test_one_run_has_a_colour_per_term_which_is_the_same_everywhere():
    drawn = by_key({"a": NAMES})
    assert list(drawn) == [picture.key for picture in PICTURES]
    assert [len(drawing.charts) for drawing in drawn.values()] == [1, 1, 1, 1, 3, 1, 1]
    looks = {
        (line.label, line.colour, line.dashed)
        for key in ("contributions", "gradient_norms", "shares_and_cosines", "weights")
        for chart in drawn[key].charts
        for line in chart.lines
    }
    assert looks == {
        ("total", BLACK, False),
        ("base loss", GREY, True),
        *((term, place, False) for place, term in enumerate(TERMS)),
    }


def test_several_runs_have_a_colour_each_and_terms_have_axes_of_their_own():
    drawn = by_key({"a": NAMES, "b": names_of(["l2", "other"])})
    norms = drawn["gradient_norms"]
    assert [chart.title for chart in norms.charts] == ["total", "base loss", *TERMS, "other"]
    assert [[line.run for line in chart.lines] for chart in norms.charts] == [
        *[["a", "b"]] * 3,
        ["a"],
        ["a"],
        ["b"],
    ]
    for key in ("losses", "gradient_norms", "shares_and_cosines", "weights", "times"):
        colours = {(line.run, line.colour) for chart in drawn[key].charts for line in chart.lines}
        assert colours == {("a", 0), ("b", 1)}
    stacks = drawn["contributions"].charts
    assert [chart.title for chart in stacks] == ["a", "b"]
    assert [[(line.label, line.colour) for line in chart.lines] for chart in stacks] == [
        [("l2", 0), ("kl_to_base", 1), ("rarity", 2)],
        [("l2", 0), ("other", 3)],
    ]


def test_each_row_of_shares_and_cosines_is_one_term():
    drawing = by_key({"a": NAMES, "b": NAMES})["shares_and_cosines"]
    assert drawing.columns == 3
    rows = [drawing.charts[start : start + 3] for start in range(0, len(drawing.charts), 3)]
    assert [{chart.title.rpartition(": ")[2] for chart in row} for row in rows] == [
        {"base loss"},
        *({term} for term in TERMS),
    ]
    assert len(drawing.charts) == 3 * len(rows)


def test_given_colours_are_kept():
    drawn = by_key({"a": NAMES, "b": NAMES}, {"a": 4, "b": 2})
    assert {(line.run, line.colour) for line in drawn["losses"].charts[0].lines} == {("a", 4), ("b", 2)}


def test_what_was_evaluated_has_axes_of_its_own_and_takes_no_colour_of_a_term():
    evaluated = ["evaluation/nll", "evaluation/accuracy"]
    drawn = by_key({"a": [*evaluated, *NAMES]})
    titles = ["nll", "accuracy", "held_out_nll"]
    assert [chart.title for chart in drawn["evaluation"].charts] == titles
    assert [line.label for line in drawn["weights"].charts[0].lines] == list(TERMS)
    assert [line.colour for line in drawn["weights"].charts[0].lines] == [0, 1, 2]
    both = by_key({"a": [*evaluated, *NAMES], "b": NAMES})["evaluation"].charts
    assert [(chart.title, [line.run for line in chart.lines]) for chart in both] == [
        ("nll", ["a"]),
        ("accuracy", ["a"]),
        ("held_out_nll", ["a", "b"]),
    ]


def test_more_terms_than_colours_are_told_apart_by_dashes():
    terms = [f"term {number}" for number in range(10)]
    lines = by_key({"a": names_of(terms)})["weights"].charts[0].lines
    assert len({(line.colour, line.dashed) for line in lines}) == 10
    assert all(0 <= line.colour < MOST_COLOURS for line in lines)


def test_what_was_not_measured_is_not_drawn():
    names = list(scalars(made_up_step(1, norms=False)))
    drawn = by_key({"a": names})
    absent = [key for key, drawing in drawn.items() if not drawing.charts]
    assert absent == ["evaluation", "gradient_norms", "shares_and_cosines"]
    assert not any(drawing.charts for drawing in drawings({"a": []}))
    assert not any(drawing.charts for drawing in drawings({"a": [], "b": []}))
    assert [len(drawing.charts) for drawing in drawings({"a": [], "b": NAMES})] == [1, 1, 1, 5, 12, 3, 1]


@pytest.mark.parametrize("runs", [1, 2])
def test_names_of_terms_may_hold_anything(runs: int):
    odd = ["a/value", "weight", "*", "total", "x/weight", "base loss"]
    names = names_of(odd)
    drawn = by_key({f"run {number}": names for number in range(runs)})
    lines = [line.name for chart in drawn["weights"].charts for line in chart.lines]
    assert sorted(lines) == sorted([f"term/{name}/weight" for name in odd] * runs)
    norms = [line.name for chart in drawn["gradient_norms"].charts for line in chart.lines]
    assert len(norms) == (2 + len(odd)) * runs
