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

from tests.losses.support import guide_logprobs, guide_specs, nll, spec
from tinkex_py import (
    BaseLossOutput,
    CustomLossOutput,
    ForwardBackwardOutput,
    GradientDiagnosis,
    Pipeline,
    RegularizerOutput,
)

METRICS = {"flag": True, "count": 2**53, "whole": 1.0, "small": 5e-324, "large": -1.7e308, "": False}


def test_row_114_full_round_trip():
    first = RegularizerOutput(
        name="first",
        value=-0.1,
        weight=0.5,
        contribution=-0.05,
        custom_metrics=METRICS,
        grad_norm=0.3,
        grad_norm_weighted=0.15,
        differentiable=False,
        clip_scale=0.25,
        attempts=3,
    )
    second = RegularizerOutput(name="a second, \u00e9", value=1e300, weight=0.0, contribution=0.0)
    output = CustomLossOutput(
        loss_total=0.1 + 0.2,
        base_loss=BaseLossOutput(value=0.5, metrics=METRICS, grad_norm=0.0),
        regularizers={one.name: one for one in (second, first)},
        regularizer_total=-0.05,
        total_grad_norm=1e-30,
        diagnosis={"base_loss": GradientDiagnosis(cosine_with_base=1.0, share_of_total=-2.5, conflicts=False)},
        coefficients={"base_loss": 1.25, "first": 0.0},
        skipped={"third": "ValueError"},
        abandoned_threads=2,
    )
    for one in (first, output.base_loss, output):
        assert type(one).model_validate_json(one.model_dump_json()) == one
        assert pickle.loads(pickle.dumps(one)) == one
    again = CustomLossOutput.model_validate_json(output.model_dump_json())
    assert types_of(again.base_loss.metrics) == types_of(METRICS)
    assert list(again.regularizers) == list(output.regularizers)


def types_of(values: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in values.items()}


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
        "coefficients",
        "skipped",
        "abandoned_threads",
        "service_output",
        "logprob_difference_mean",
        "logprob_difference_largest",
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
        "constraint",
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
