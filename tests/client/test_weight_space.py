"""Gradients in the space of the weights: their norm, and the diagnosis of terms, against torch over the parameters."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.client.conftest import RecordedService
from tests.client.data import datum, nll
from tests.client.recorder import answering, quick_config
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    AsyncTrainingClient,
    Datum,
    InvalidData,
    OptimizerParams,
    OptimStepResponse,
    Pipeline,
    RegularizerSpec,
    RequestFailed,
    UnsupportedFeature,
)
from tinkex_py.local.models import load_model
from tinkex_py.runs import TrainSettings, read_steps, train
from tinkex_py.runs.report import write_report

pytestmark = pytest.mark.asyncio
DATA = {
    "[T], lengths differ": [datum(length, 2) for length in (3, 9, 1, 5)],
    "[T, K]": [datum(length, 3, candidates=3) for length in (4, 2, 7)],
}


def absolute(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.abs().sum()


def squared(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs * logprobs).mean()


def constant(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return torch.tensor(3.0)


def pipeline(combine: Any = "sum") -> Pipeline:
    """A base loss, and terms that are clipped, have weight 0 or no gradient, or are held above a bound's multiplier."""
    specs = [
        RegularizerSpec(fn=squared, weight=0.7, name="squared"),
        RegularizerSpec(fn=absolute, weight=0.3, name="clipped", max_grad_norm=0.5),
        RegularizerSpec(fn=absolute, weight=0.0, name="off"),
        RegularizerSpec(fn=constant, weight=1.0, name="constant"),
    ]
    return Pipeline(nll, specs if combine == "sum" else specs[:2], combine=combine)


def pulls(logprobs: torch.Tensor) -> list[torch.Tensor]:
    """The terms of `pipeline`, written by hand."""
    return [-logprobs.sum(), logprobs.square().mean(), logprobs.abs().sum(), logprobs.abs().sum()]


async def by_torch(training: AsyncTrainingClient, data: Sequence[Datum], folder: Path) -> np.ndarray:
    """Gradients of the four terms over all weights of the adapter, by peft and torch alone, `[4, weights]`."""
    saved = await training.save_state("here")
    store = RecordedService.latest.core.store
    weights = load_file(store.file(store.find(saved.path), "adapter_model.safetensors"))
    base = load_model("tiny", "cpu", folder).network
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM"))
    own = {name.replace(".default.", "."): value for name, value in model.named_parameters() if value.requires_grad}
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])
    model.eval()
    rows = []
    for item in data:
        logits = model(input_ids=torch.tensor([item.model_input.to_ints()])).logits[0]
        targets = item.loss_fn_inputs["target_tokens"].to_torch()
        rows.append(logits.log_softmax(-1).gather(1, targets.reshape(len(targets), -1)).reshape(-1))
    logprobs = torch.cat(rows)
    parts = [torch.autograd.grad(pull, list(own.values()), retain_graph=True) for pull in pulls(logprobs)]
    return np.stack([torch.cat([one.reshape(-1) for one in part]).double().numpy() for part in parts])


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("kind", DATA)
async def test_the_diagnosis_equals_torch_over_the_parameters(bench: Any, tmp_path: Path, kind: str) -> None:
    data, training = DATA[kind], await bench.train()
    await training.forward_backward_custom(data, nll)
    await training.optim_step(AdamParams(learning_rate=1e-2))  # B of LoRA is no longer 0
    gradients = await by_torch(training, data, tmp_path)
    passes = RecordedService.latest.core.engine.passes_run
    output = await training.weight_space_diagnosis(data, pipeline())
    assert RecordedService.latest.core.engine.passes_run == passes + 1  # the graph was kept
    # |x| has a gradient of +-1 in each of N logprobs, so clipping multiplies it by 0.5 / sqrt(N).
    count = sum(item.loss_fn_inputs["target_tokens"].to_numpy().size for item in data)
    factors = np.array([1.0, 0.7, 0.3 * 0.5 / count**0.5, 0.0])
    total = factors @ gradients
    assert output.total_grad_norm == pytest.approx(np.linalg.norm(total), rel=1e-4)
    assert output.base_loss.grad_norm == pytest.approx(np.linalg.norm(gradients[0]), rel=1e-4)
    assert list(output.diagnosis) == ["base_loss", "squared", "clipped", "off", "constant"]
    for row, (name, own) in enumerate(list(output.diagnosis.items())[:4]):
        assert own.cosine_with_base == pytest.approx(cosine(gradients[row], gradients[0]), abs=1e-5)
        assert own.cosine_with_total == pytest.approx(cosine(gradients[row], total), abs=1e-5)
        assert own.share_of_total == pytest.approx(factors[row] * gradients[row] @ total / (total @ total), abs=1e-5)
        if row:
            weight = output.regularizers[name].weight
            assert output.regularizers[name].grad_norm == pytest.approx(np.linalg.norm(gradients[row]), rel=1e-4)
            assert output.regularizers[name].grad_norm_weighted == pytest.approx(
                weight * np.linalg.norm(gradients[row]), rel=1e-4
            )
    assert (output.diagnosis["constant"].cosine_with_total, output.regularizers["constant"].grad_norm) == (None, 0.0)


@pytest.mark.parametrize("combine", ["pcgrad", "mgda"])
async def test_the_diagnosis_follows_the_way_in_which_gradients_are_combined(bench: Any, combine: Any) -> None:
    """The norm of the total is the one that the optimizer step reports for the same gradient."""
    data, training = DATA["[T], lengths differ"], await bench.train()
    output = await training.weight_space_diagnosis(data, pipeline(combine))
    step = await training.forward_backward_custom(data, pipeline(combine))
    assert output.coefficients == step.coefficients
    assert sum(own.share_of_total or 0.0 for own in output.diagnosis.values()) == pytest.approx(1.0)
    assert output.total_grad_norm == pytest.approx((await training.optim_step()).grad_norm, rel=1e-5)


async def test_a_diagnosis_changes_no_number(bench: Any) -> None:
    """Between the passes of a step, beside another step, and while a gradient is accumulated."""
    data = DATA["[T], lengths differ"]

    async def trained(*, diagnosed: bool) -> list[float]:
        training = await bench.train()
        diagnose = training.weight_space_diagnosis(data, pipeline()) if diagnosed else asyncio.sleep(0)
        again = training.weight_space_diagnosis(data[:2], pipeline()) if diagnosed else asyncio.sleep(0)
        first, _, second, _ = await asyncio.gather(
            training.forward_backward_custom(data, pipeline()),
            diagnose,
            training.forward_backward_custom(data, pipeline()),
            again,
        )
        step = await training.optim_step(AdamParams(learning_rate=1e-2))
        last = await training.forward_backward_custom(data, pipeline())
        assert training.accumulated == 1
        return [first.loss_total, second.loss_total, step.grad_norm or 0.0, last.loss_total]

    assert await trained(diagnosed=True) == await trained(diagnosed=False)


async def test_over_http_and_in_json(http_bench: Any, bench: Any) -> None:
    data = DATA["[T], lengths differ"]
    training = await http_bench.train()
    output = await training.weight_space_diagnosis(data, pipeline())
    own = await (await bench.train()).weight_space_diagnosis(data, pipeline())
    assert output.total_grad_norm == pytest.approx(own.total_grad_norm, rel=1e-6)
    async with AsyncServiceClient.local("tiny", config=quick_config(wire="json")) as service:
        training = await service.create_lora_training_client("tiny", rank=4, seed=1)
        assert await training.weight_space_diagnosis(data, pipeline()) == own


async def test_elsewhere_nothing_is_sent(local_bench: Any) -> None:
    other = local_bench()
    other.recorder.always["config"] = answering(200, {"parallel_fwdbwd_chunks": True})
    async with other.service:
        training = await other.train()
        with pytest.raises(UnsupportedFeature, match="only the embedded service"):
            await training.weight_space_diagnosis(DATA["[T, K]"], pipeline())
        assert other.kinds(training) == []
        await training.forward(DATA["[T, K]"])


async def test_too_many_terms_are_refused(bench: Any) -> None:
    training = await bench.train()
    many = [RegularizerSpec(fn=squared, weight=1.0, name=f"t{index}") for index in range(64)]
    with pytest.raises(InvalidData, match="65 terms"):
        await training.weight_space_diagnosis(DATA["[T, K]"], Pipeline(nll, many))
    assert bench.kinds(training) == []
    for config in ({"gradients": 65.0}, {"gradients": 0.5}, {"gradients": "1"}, {}):
        with pytest.raises(RequestFailed, match="gradients, from 1 to 64"):
            await training.forward(DATA["[T, K]"], "gradient_products", loss_fn_config=config)
    with pytest.raises(RequestFailed, match="send it as a forward pass"):
        await training.forward_backward(DATA["[T, K]"], "gradient_products", loss_fn_config={"gradients": 1})


@pytest.mark.parametrize(
    ("params", "sent"),
    [
        (None, 1e12),
        (AdamParams(grad_clip_norm=0.5), 0.5),
        (OptimizerParams(type="adamw", learning_rate=1e-4), 1e12),
    ],
)
async def test_the_norm_of_a_step_is_asked_for_where_nothing_clips(bench: Any, params: Any, sent: float) -> None:
    training, data = await bench.train(), DATA["[T], lengths differ"]
    await training.forward_backward_custom(data, nll)
    accumulated = RecordedService.latest.core.engine.gradient(training.model_id)
    done = await training.optim_step(params, grad_norm=True)
    norm = float(torch.cat([part.reshape(-1) for part in accumulated.values()]).double().norm())
    assert done.grad_norm == pytest.approx(norm, rel=1e-6)
    await training.optim_step()
    bodies = [arrival.json for arrival in bench.recorder.of("optim_step")]
    fields = [body.get("adam_params") or body["optimizer_params"] for body in bodies]
    assert [one.get("grad_clip_norm") for one in fields] == [sent, None]


@pytest.mark.parametrize(
    ("metrics", "norm"),
    [
        (None, None),
        ({"loss": 1.0, "grad_norm_limit": 2.0}, None),
        ({"skyrl.ai/grad_norm": 3.0}, 3.0),
        ({"x": 1.0, "grad_norm:mean": 4.0}, 4.0),
    ],
)
async def test_services_name_the_norm_differently(metrics: Any, norm: float | None) -> None:
    assert OptimStepResponse(metrics=metrics).grad_norm == norm


async def test_a_run_records_the_norm_and_the_report_draws_it(bench: Any, tmp_path: Path) -> None:
    training = await bench.train()
    settings = TrainSettings(grad_norm=True)
    await train(bench.service, training, [DATA["[T, K]"]] * 2, nll, folder=tmp_path / "run", settings=settings)
    bodies = [arrival.json["adam_params"] for arrival in bench.recorder.of("optim_step")]
    assert [body["grad_clip_norm"] for body in bodies] == [1e12, 1e12]
    assert all(record.metrics["grad_norm"] > 0 for record in read_steps(tmp_path / "run"))
    assert "update_norms" in write_report([tmp_path / "run"], tmp_path / "out").charts
