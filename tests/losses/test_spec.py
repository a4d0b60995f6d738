"""Rows 13-22 and 121-122 of the guide: what a spec and a pipeline accept."""

import dataclasses
import functools
import math
import pickle
import types
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from tests.losses.support import async_l2, l1, nll, spec
from tinkex_py import (
    DuplicateRegularizerNames,
    InvalidBaseLoss,
    InvalidSpec,
    Pipeline,
    PipelineError,
    RegularizerSpec,
    TinkexError,
    per_datum,
)


class WithCompute:
    def compute(self, data: Any, logprobs: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return logprobs.sum() * scale


class Callable_:
    def __call__(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.sum()


def test_row_13_fields_and_defaults():
    made = RegularizerSpec(fn=l1, weight=0.01, name="l1")
    assert [field.name for field in dataclasses.fields(made)] == [
        "fn",
        "weight",
        "name",
        "timeout",
        "options",
        "on_error",
        "enabled",
        "is_async",
        "retry",
        "max_grad_norm",
        "runs_in",
        "at_most",
        "at_least",
    ]
    assert (made.timeout, made.options, made.on_error, made.enabled, made.is_async) == (None, {}, "raise", True, None)


def test_row_13_frozen():
    made = spec(l1, "l1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.weight = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("fields", [{"weight": 1.0, "name": "n"}, {"name": "n"}])
def test_row_13_missing_fn_or_weight(fields: dict[str, Any]):
    with pytest.raises(TypeError):
        RegularizerSpec(**fields)
    with pytest.raises(InvalidSpec, match="'n': weight=None, and there is no bound"):
        RegularizerSpec(fn=l1, name="n")


def test_rows_19_and_20_a_mapping_and_unknown_fields():
    fields = {"fn": l1, "weight": 0.5, "name": "l1"}
    assert RegularizerSpec(**fields).weight == 0.5
    with pytest.raises(TypeError, match="colour"):
        RegularizerSpec(**fields, colour="red")


@pytest.mark.parametrize(
    "fn",
    [
        l1,
        async_l2,
        functools.partial(l1),
        lambda data, logprobs: logprobs.sum(),
        Callable_(),
        WithCompute(),
        WithCompute().compute,
        per_datum(l1),
    ],
)
def test_row_14_what_fn_may_be(fn: Any):
    assert spec(fn, "n").fn is fn


def test_row_14_a_module_needs_compute():
    module = types.ModuleType("empty")
    with pytest.raises(InvalidSpec, match="module"):
        spec(module, "n")


@pytest.mark.parametrize("fn", [WithCompute, Callable_])
def test_row_14_a_class_is_no_term(fn: type):
    with pytest.raises(InvalidSpec, match="pass an instance"):
        spec(fn, "n")
    with pytest.raises(InvalidSpec, match="pass an instance"):
        spec(per_datum(fn), "n")


@pytest.mark.parametrize("fn", [None, 3, "not a function", [l1], torch.zeros(2)])
def test_row_14_what_fn_may_not_be(fn: Any):
    with pytest.raises(InvalidSpec, match=type(fn).__name__):
        spec(fn, "n")


@pytest.mark.parametrize(
    "fn", [lambda: 0, lambda data: 0, lambda data, logprobs, third: 0, lambda *, data, logprobs: 0]
)
def test_row_14_the_wrong_number_of_arguments(fn: Any):
    with pytest.raises(InvalidSpec, match="'n'"):
        spec(fn, "n")


@pytest.mark.parametrize("weight", [0, 1, 0.0, 0.01, np.float32(0.5), np.int64(2), 1e300])
def test_row_15_weights_that_are_fine(weight: Any):
    made = spec(l1, "n", weight)
    assert made.weight == float(weight)
    assert type(made.weight) is float


@pytest.mark.parametrize(
    "weight",
    [
        -1.0,
        -1e-30,
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        np.True_,
        None,
        "0.1",
        1j,
        [0.1],
        pytest.param(10**400, id="huge"),
    ],
)
def test_row_15_weights_that_are_not(weight: Any):
    with pytest.raises(InvalidSpec, match="'heavy'") as caught:
        spec(l1, "heavy", weight)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, PipelineError)
    assert repr(weight) in str(caught.value) or weight == 10**400


BAD_FIELDS = {
    "name": ["", 3, b"bytes", ["n"], True],
    "timeout": [0, 0.0, -1.0, math.nan, -math.inf, True, "5", [1.0]],
    "options": [None, 5, "text", {1: 2}],
    "on_error": ["ignore", None, True, ""],
    "enabled": ["no", 1, None],
    "is_async": ["no", 0],
    "max_grad_norm": [0.0, -1.0, math.nan, math.inf, "1", True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, bad in BAD_FIELDS.items() for value in bad])
def test_rows_16_21_and_22_bad_fields_are_named(field: str, value: Any):
    with pytest.raises(InvalidSpec, match=field) as caught:
        RegularizerSpec(**{"fn": l1, "weight": 1.0, "name": "slow", field: value})
    assert "'slow'" in str(caught.value) or field == "name"
    assert repr(value) in str(caught.value) or isinstance(value, dict)
    assert not isinstance(caught.value, pydantic.ValidationError)


def test_row_16_base_loss_is_reserved():
    with pytest.raises(InvalidSpec, match="base_loss"):
        RegularizerSpec(fn=l1, weight=1.0, name="base_loss")


@pytest.mark.parametrize("timeout", [None, 0.001, 5, 30.0, math.inf])
def test_row_21_timeouts_that_are_fine(timeout: Any):
    assert spec(l1, "n", timeout=timeout).timeout == timeout


def test_row_22_options_are_checked_by_signature():
    assert spec(WithCompute(), "n", options={"scale": 2.0}).options == {"scale": 2.0}
    with pytest.raises(InvalidSpec, match="scales"):
        spec(WithCompute(), "n", options={"scales": 2.0})
    with pytest.raises(InvalidSpec, match="threshold"):
        spec(l1, "n", options={"threshold": 1.0})


def test_row_22_options_are_a_copy():
    given = {"scale": 2.0}
    made = spec(WithCompute(), "n", options=given)
    given["scale"] = 3.0
    assert made.options == {"scale": 2.0}


def test_specs_with_module_level_functions_pickle():
    made = RegularizerSpec(fn=l1, weight=0.25, name="l1", timeout=2.0, on_error="skip", enabled=False, is_async=False)
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    listed = pickle.loads(pickle.dumps(spec(per_datum(l1), "l1")))
    assert listed == spec(per_datum(l1), "l1")


def test_specs_are_hashable():
    assert len({spec(l1, "a"), spec(l1, "a"), spec(l1, "b")}) == 2


def test_replace_keeps_the_name():
    assert dataclasses.replace(spec(l1, "kept"), weight=0.0).name == "kept"


def test_row_54_an_element_that_is_no_spec():
    with pytest.raises(InvalidSpec, match=r"regularizers\[1\].*function"):
        Pipeline(nll, [spec(l1, "a"), l1])  # type: ignore[list-item]


@pytest.mark.parametrize("enabled", [True, False])
def test_row_121_duplicate_names(enabled: bool):
    with pytest.raises(DuplicateRegularizerNames) as caught:
        Pipeline(nll, [spec(l1, "dup"), spec(l1, "other"), spec(async_l2, "dup", enabled=enabled)])
    assert caught.value.names == ("dup",)
    assert str(caught.value).startswith("Duplicate regularizer names: ['dup']")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, PipelineError)
    assert isinstance(caught.value, TinkexError)


def test_row_121_every_duplicate_is_named_once():
    specs = [spec(l1, name) for name in ("b", "a", "b", "a", "b", "c")]
    with pytest.raises(DuplicateRegularizerNames) as caught:
        Pipeline(nll, specs)
    assert caught.value.names == ("b", "a")


@pytest.mark.parametrize("base_loss", ["not a function", None, 3, WithCompute, lambda: 0, per_datum("nothing")])
def test_row_122_base_losses_that_are_none(base_loss: Any):
    with pytest.raises(InvalidBaseLoss, match="base_loss: ") as caught:
        Pipeline(base_loss)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, PipelineError)


def test_row_46_options_are_keyword_only():
    with pytest.raises(TypeError):
        Pipeline(nll, [], True)  # type: ignore[misc]
