"""A pipeline as a loss of the official SDK, and the official SDK's losses in a pipeline."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import tinker
import torch
from tinker import types

from tests.losses.support import async_l2, nll, spec
from tinkex_py import Datum, InvalidData, ModelInput, Pipeline, PipelineError, RegularizerError, packed_field, per_datum
from tinkex_py.losses.logprobs import Logprobs


def official_datum(tokens: Sequence[int], **inputs: torch.Tensor) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens)),
        loss_fn_inputs={"target_tokens": torch.tensor(list(tokens)), **inputs},
    )


def own_datum(tokens: Sequence[int], **inputs: torch.Tensor) -> Datum:
    return Datum(
        model_input=ModelInput.from_ints(list(tokens)),
        loss_fn_inputs={"target_tokens": torch.tensor(list(tokens)), **inputs},
    )


REFERENCES = [torch.tensor([-0.5, -0.25, -1.0]), torch.tensor([-2.0, -0.125])]
LOGPROBS = [torch.tensor([-0.75, -0.5, -1.5]), torch.tensor([-1.0, -0.3])]


def official_data() -> list[types.Datum]:
    return [
        official_datum([1, 2, 3], reference_logprobs=REFERENCES[0]),
        official_datum([4, 5], reference_logprobs=REFERENCES[1]),
    ]


def own_data() -> list[Datum]:
    return [
        own_datum([1, 2, 3], reference_logprobs=REFERENCES[0]),
        own_datum([4, 5], reference_logprobs=REFERENCES[1]),
    ]


def leaves() -> list[torch.Tensor]:
    return [part.clone().requires_grad_() for part in LOGPROBS]


def to_reference(data: Sequence[Datum], logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    difference = packed_field(data, "reference_logprobs") - logprobs
    return difference.pow(2).sum(), {"largest": difference.abs().max().item()}


def pipeline() -> Pipeline:
    return Pipeline(nll, [spec(to_reference, "ref", 0.3), spec(async_l2, "l2", 0.1)], track_grad_norms=True)


def run_as_the_official_client_does(loss_fn: Any, data: list[types.Datum]) -> tuple[list[torch.Tensor], Any, Any]:
    """Its own code: leaves from a forward result, the loss, backward, weights = -grad."""
    forward = types.ForwardBackwardOutput(
        loss_fn_output_type="t",
        loss_fn_outputs=[{"logprobs": types.TensorData.from_torch(part)} for part in LOGPROBS],
        metrics={},
    )
    result = tinker.TrainingClient._compute_custom_loss(data, loss_fn, forward)
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in result.data]
    return weights, result.loss_sum, result.metrics


@pytest.mark.asyncio
async def test_the_official_client_sends_the_same_gradient():
    loss = await pipeline().evaluate(own_data(), Logprobs.from_tensors(LOGPROBS))
    weights, value, metrics = await asyncio.to_thread(
        run_as_the_official_client_does, pipeline().as_tinker_loss(), official_data()
    )
    assert torch.equal(-torch.cat(weights), loss.gradient)
    assert value == loss.output.loss_total
    assert metrics["ref.value"] == loss.output.regularizers["ref"].value
    assert metrics["ref.largest"] == 1.0
    assert metrics["total_grad_norm"] == loss.output.total_grad_norm
    assert all(type(number) is float for number in metrics.values())


@pytest.mark.asyncio
async def test_it_may_be_called_on_a_running_loop():
    loss, metrics = pipeline().as_tinker_loss()(official_data(), leaves())
    assert metrics["loss_total"] == float(loss.detach())


def test_matrix_targets_and_mixed_shapes():
    data = [official_datum([1, 2]), official_datum([3])]
    parts = [torch.rand(2, 3).requires_grad_(), torch.rand(1).requires_grad_()]
    loss, _ = Pipeline(per_datum(lambda data, given: sum(part.pow(2).sum() for part in given))).as_tinker_loss()(
        data, parts
    )
    loss.backward()
    for part in parts:
        assert part.grad is not None
        assert torch.allclose(part.grad, 2 * part.detach())


def test_the_step_and_the_output():
    made = Pipeline(nll, [spec(async_l2, "l2", lambda step: step / 10)]).as_tinker_loss(step=3)
    assert made.output is None
    made(official_data(), leaves())
    assert made.output is not None
    assert made.output.regularizers["l2"].weight == 0.3


def test_failures_come_out_as_they_are():
    def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise KeyError("x")

    with pytest.raises(RegularizerError) as caught:
        Pipeline(nll, [spec(fails, "fails")]).as_tinker_loss()(official_data(), leaves())
    assert caught.value.name == "fails"
    with pytest.raises(PipelineError, match="no term depends"):
        Pipeline(lambda data, logprobs: torch.tensor(1.0)).as_tinker_loss()(official_data(), leaves())
    with pytest.raises(PipelineError, match="got 1 for 2 datums"):
        pipeline().as_tinker_loss()(official_data(), leaves()[:1])
    with pytest.raises(PipelineError, match="step must be"):
        pipeline().as_tinker_loss(step=-1)


@pytest.mark.parametrize("datum", [None, 3, object(), {"model_input": 1}])
def test_what_is_no_datum_is_named(datum: Any):
    with pytest.raises(InvalidData, match=r"data\[1\] must be a Datum"):
        pipeline().as_tinker_loss()([own_data()[0], datum], leaves())


def test_sparse_inputs_of_the_official_sdk():
    table = torch.zeros(4, 6)
    table[1, 2] = 3.0
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_torch(torch.tensor([1])),
            "table": types.TensorData.from_torch_sparse(table),
        },
    )

    def term(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        assert data[0].loss_fn_inputs["table"].is_sparse
        return logprobs.sum() * data[0].loss_fn_inputs["table"].to_torch().sum()

    loss, _ = Pipeline(term).as_tinker_loss()([datum], [torch.tensor([2.0]).requires_grad_()])
    assert float(loss.detach()) == 6.0


# The other way: a loss of the official SDK's cookbook form, unchanged


def official_style_loss(data: list[Any], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    losses = []
    for datum, logprobs in zip(data, logprobs_list, strict=True):
        reference = datum.loss_fn_inputs["reference_logprobs"].to_torch()
        weights = torch.tensor(datum.loss_fn_inputs["reference_logprobs"].data).reshape(
            datum.loss_fn_inputs["reference_logprobs"].shape
        )
        losses.append(((logprobs - reference) * weights).sum())
    total = torch.stack(losses).sum()
    return total, {"pairs": len(losses)}


@pytest.mark.asyncio
async def test_an_official_loss_runs_unchanged_in_a_pipeline():
    parts = leaves()
    expected, _ = official_style_loss(official_data(), parts)
    expected.backward()
    loss = await Pipeline(per_datum(official_style_loss)).evaluate(own_data(), Logprobs.from_tensors(LOGPROBS))
    assert loss.output.loss_total == float(expected.detach())
    assert loss.output.base_loss.metrics == {"pairs": 2}
    assert torch.equal(loss.gradient, torch.cat([part.grad for part in parts if part.grad is not None]))
    both_ways, _ = Pipeline(per_datum(official_style_loss)).as_tinker_loss()(official_data(), leaves())
    assert float(both_ways.detach()) == float(expected.detach())
