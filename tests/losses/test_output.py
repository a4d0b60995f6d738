"""Rows 106-114 of the guide: what comes out, and its way to JSON and back."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given, strategies as st

from tests.losses.support import guide_logprobs, guide_specs, nll, spec
from tinkex_py import BaseLossOutput, CustomLossOutput, ForwardBackwardOutput, Pipeline, RegularizerOutput

numbers = st.floats(allow_nan=False, allow_infinity=False)
metrics = st.dictionaries(st.text(max_size=8), st.booleans() | st.integers(-(2**53), 2**53) | numbers, max_size=4)
norms = st.none() | st.floats(0, 1e30)
regularizers = st.builds(
    RegularizerOutput,
    name=st.text(min_size=1, max_size=8),
    value=numbers,
    weight=st.floats(0, 1e6),
    contribution=numbers,
    custom_metrics=metrics,
    grad_norm=norms,
    grad_norm_weighted=norms,
    differentiable=st.booleans(),
)
outputs = st.builds(
    CustomLossOutput,
    loss_total=numbers,
    base_loss=st.builds(BaseLossOutput, value=numbers, metrics=metrics, grad_norm=norms),
    regularizers=st.lists(regularizers, max_size=3).map(lambda found: {each.name: each for each in found}),
    regularizer_total=numbers,
    total_grad_norm=norms,
    skipped=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2),
    abandoned_threads=st.integers(0, 100),
)


def types_of(values: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in values.items()}


@given(outputs)
def test_row_114_full_round_trip(output: CustomLossOutput):
    again = CustomLossOutput.model_validate_json(output.model_dump_json())
    assert again == output
    assert types_of(again.base_loss.metrics) == types_of(output.base_loss.metrics)
    assert list(again.regularizers) == list(output.regularizers)
    assert pickle.loads(pickle.dumps(output)) == output


@pytest.mark.asyncio
async def test_rows_106_to_113_the_files_of_the_guide(tmp_path: Path):
    output = await Pipeline(nll, guide_specs(), track_grad_norms=True).compute([], guide_logprobs())
    path = tmp_path / "training_metrics.json"
    path.write_text(output.model_dump_json(indent=2))
    plain = json.loads(path.read_text())
    assert set(plain) == {
        "loss_total",
        "base_loss",
        "regularizers",
        "regularizer_total",
        "total_grad_norm",
        "diagnosis",
        "skipped",
        "abandoned_threads",
        "service_output",
    }
    assert set(plain["base_loss"]) == {"value", "metrics", "grad_norm"}
    assert set(plain["regularizers"]["l1_sparsity"]) == {
        "name",
        "value",
        "weight",
        "contribution",
        "custom_metrics",
        "grad_norm",
        "grad_norm_weighted",
        "differentiable",
        "clip_scale",
        "attempts",
    }
    assert plain["service_output"] is None
    assert plain["regularizers"]["l1_sparsity"]["value"] == pytest.approx(4.9, rel=1e-6)
    assert CustomLossOutput.model_validate_json(path.read_text()) == output


@pytest.mark.asyncio
async def test_row_111_none_is_null():
    output = await Pipeline(nll, guide_specs()).compute([], guide_logprobs())
    plain = json.loads(output.model_dump_json())
    assert plain["total_grad_norm"] is None
    assert plain["base_loss"]["grad_norm"] is None
    assert plain["regularizers"]["entropy"]["grad_norm_weighted"] is None


@pytest.mark.asyncio
async def test_row_111_metrics_that_are_no_json_numbers():
    values = {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "flag": True, "count": 3, "one": 1.0}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    output = await Pipeline(nll, [spec(lambda d, p: (p.sum(), values), "m")]).compute([], guide_logprobs())
    text = output.model_dump_json()
    plain = json.loads(text, parse_constant=refuse)
    assert plain["regularizers"]["m"]["custom_metrics"]["nan"] == "NaN"
    assert plain["regularizers"]["m"]["custom_metrics"]["inf"] == "Infinity"
    again = CustomLossOutput.model_validate_json(text).regularizers["m"].custom_metrics
    assert types_of(again) == types_of(values)
    assert math.isnan(again.pop("nan"))
    assert again == {name: value for name, value in values.items() if name != "nan"}


@pytest.mark.parametrize(("field", "value"), [("loss_total", 1.0), ("skipped", {})])
def test_row_106_frozen(field: str, value: Any):
    output = CustomLossOutput(loss_total=0.0, base_loss=BaseLossOutput(value=0.0))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        setattr(output, field, value)


def test_row_106_defaults():
    output = CustomLossOutput(loss_total=0.0, base_loss=BaseLossOutput(value=0.0))
    assert (output.regularizers, output.regularizer_total, output.total_grad_norm) == ({}, 0.0, None)
    assert (output.skipped, output.abandoned_threads, output.service_output) == ({}, 0, None)
    regularizer = RegularizerOutput(name="n", value=1.0, weight=0.5, contribution=0.5)
    assert (regularizer.custom_metrics, regularizer.grad_norm, regularizer.differentiable) == ({}, None, True)


def test_the_services_own_output_makes_the_round_trip():
    service = ForwardBackwardOutput.model_validate(
        {
            "loss_fn_outputs": [
                {"logprobs": {"data": [-0.5, -1.2], "dtype": "float32", "shape": [2]}},
                {"logprobs": {"data": [-0.8], "dtype": "float32", "shape": [1]}},
            ],
            "metrics": {"loss:sum": 2.5},
        }
    )
    output = CustomLossOutput(loss_total=0.0, base_loss=BaseLossOutput(value=0.0), service_output=service)
    again = CustomLossOutput.model_validate_json(output.model_dump_json())
    assert again == output
    assert again.service_output is not None
    values = again.service_output.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert values.tolist() == np.array([-0.5, -1.2], np.float32).tolist()


@pytest.mark.asyncio
async def test_row_109_contribution_is_signed():
    output = await Pipeline(nll, [spec(lambda d, p: p.sum(), "negative", 0.1)]).compute([], guide_logprobs())
    assert output.regularizers["negative"].contribution == pytest.approx(-0.49, rel=1e-6)
    assert output.loss_total == pytest.approx(0.98 - 0.49, rel=1e-6)


@pytest.mark.asyncio
async def test_row_1_the_total_is_summed_in_double_precision():
    """2^24 + 1 is no float32: summed there, the small contributions would vanish."""
    specs = [spec(lambda d, p: torch.tensor(1.0), f"one{index}") for index in range(3)]
    output = await Pipeline(lambda d, p: torch.tensor(2.0**24), specs).compute([], guide_logprobs())
    assert output.loss_total == 2.0**24 + 3
    assert isinstance(output.loss_total, float)
