"""The options of a pipeline: one declaration, checked wherever they are given."""

import inspect
import math
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

from tests.losses.support import guide_logprobs, l1, nll, spec
from tinkex_py import Executor, Pipeline, PipelineError
from tinkex_py.losses import PipelineOptions
from tinkex_py.losses.options import DEFAULTS

GIVEN: dict[str, Any] = {
    "track_grad_norms": True,
    "parallel": False,
    "timeout": 2.5,
    "cancel_grace": 0.5,
    "max_concurrency": 3,
    "max_threads": 4,
    "combine": "pcgrad",
    "base_runs_in": "thread",
}
FLAGS, COUNTS = ["no", 0, 1, None], [0, -1, True, 1.5, "2"]
BAD: dict[str, list[Any]] = {
    "track_grad_norms": FLAGS,
    "parallel": FLAGS,
    "timeout": [0, -1.0, math.nan, True, "5"],
    "cancel_grace": [-1.0, math.nan, math.inf, True, "5", None],
    "max_concurrency": [*COUNTS, None],
    "max_threads": COUNTS,
    "combine": ["mean", "SUM", ["sum"], None, 3],
    "base_runs_in": ["here", "", 3, True],
}


def test_every_option_is_declared_described_and_has_a_default():
    assert list(get_type_hints(PipelineOptions)) == list(DEFAULTS) == list(GIVEN)
    described = inspect.getdoc(PipelineOptions) or ""
    for name in DEFAULTS:
        assert f"    {name}: " in described
    assert described.count("Default ") == len(DEFAULTS)


@pytest.mark.parametrize(
    ("function", "missing"),
    [(Pipeline, set[str]()), (Pipeline.__init__, set[str]()), (Executor.execute_all, {"combine", "base_runs_in"})],
)
def test_signatures_show_the_options(function: Callable[..., Any], missing: set[str]):
    parameters = inspect.signature(function).parameters
    shown = {name: parameters[name] for name in parameters if name in DEFAULTS}
    assert {name: parameter.default for name, parameter in shown.items()} == {
        name: default for name, default in DEFAULTS.items() if name not in missing
    }
    assert {parameter.kind for parameter in shown.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert shown["max_concurrency"].annotation is int
    assert "options" not in parameters


def test_what_is_given_is_kept_and_the_rest_is_the_default():
    assert Pipeline(nll).options == {
        "track_grad_norms": False,
        "parallel": True,
        "timeout": 30.0,
        "cancel_grace": 5.0,
        "max_concurrency": 32,
        "max_threads": None,
        "combine": "sum",
        "base_runs_in": None,
    }
    assert Pipeline(nll, **GIVEN).options == GIVEN
    for name, value in GIVEN.items():
        assert Pipeline(nll, **{name: value}).options == {**DEFAULTS, name: value}
        assert getattr(Pipeline(nll, **{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in BAD.items() for value in bad])
def test_a_bad_value_is_named(name: str, value: Any):
    with pytest.raises(PipelineError, match=f"option {name} must be") as caught:
        Pipeline(nll, **{name: value})
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.asyncio
async def test_an_unknown_option_is_refused_as_python_does():
    with pytest.raises(TypeError, match=r"Pipeline.__init__\(\) got an unexpected keyword argument 'paralel'"):
        Pipeline(nll, paralel=True)  # type: ignore[call-arg]
    for name in ("paralel", "combine"):
        with pytest.raises(TypeError, match=rf"execute_all\(\) got an unexpected keyword argument '{name}'"):
            await Executor.execute_all([spec(l1, "l1")], [], guide_logprobs(), **{name: "sum"})  # type: ignore[arg-type]
