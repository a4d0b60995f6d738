"""Weights that follow the optimizer steps of a training client: schedules, controllers, surgery, resumed runs."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from tests.client.conftest import Bench
from tests.client.data import bad_datum, datum, nll
from tinkex_py import (
    AdamParams,
    AsyncTrainingClient,
    CustomLossOutput,
    InvalidData,
    InvalidSpec,
    OptimizerParams,
    Pipeline,
    PipelineError,
    PrecedingRequestFailed,
    RegularizerSpec,
    RequestFailed,
    telemetry,
)
from tinkex_py.local.data import EnginePass
from tinkex_py.local.engine import Engine
from tinkex_py.losses.controllers import AdaptiveKL, DualAscent, TargetGradientRatio
from tinkex_py.losses.schedules import Linear
from tinkex_py.losses.weights import WeightController

pytestmark = pytest.mark.asyncio
DATA = [datum(4, 1), datum(2, 2)]
ADAM = AdamParams(learning_rate=0.01)


def l2(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.pow(2).sum()


class Counting(WeightController):
    """Records the outputs that it receives."""

    def __init__(self) -> None:
        super().__init__(initial=1.0)
        self.received: list[list[CustomLossOutput]] = []

    def next_weights(self, weights: Mapping[str, float], outputs: Sequence[CustomLossOutput]) -> Mapping[str, float]:
        self.received.append(list(outputs))
        return {name: weight + 1 for name, weight in weights.items()}


async def test_the_step_counts_optimizer_steps_that_were_handed_over(bench: Bench):
    training = await bench.train()
    regularizers = [RegularizerSpec(fn=l2, weight=Linear(1.0, 0.0, 4), name="l2")]
    assert training.step == 0
    seen: list[float] = []
    for _ in range(3):
        outputs = await asyncio.gather(
            training.forward_backward_custom(DATA, nll, regularizers=regularizers),
            training.forward_backward_custom(DATA, nll, regularizers=regularizers),
            training.optim_step(ADAM),
        )
        seen += [outputs[0].regularizers["l2"].weight, outputs[1].regularizers["l2"].weight]
    assert seen == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5]
    assert training.step == 3


async def test_all_steps_started_at_once_see_their_own_step(bench: Bench):
    training = await bench.train()
    regularizers = [RegularizerSpec(fn=l2, weight=lambda step: 1.0 + step, name="l2")]
    calls: list[Any] = []
    for _ in range(3):
        calls += [training.forward_backward_custom(DATA, nll, regularizers=regularizers), training.optim_step(ADAM)]
    outputs = (await asyncio.gather(*calls))[::2]
    assert [output.regularizers["l2"].weight for output in outputs] == [1.0, 2.0, 3.0]


async def test_the_weight_enters_the_gradient_that_is_sent(bench: Bench):
    training = await bench.train()
    training.step = 2
    await training.forward_backward_custom(
        DATA, lambda data, logprobs: (logprobs * 0).sum(), regularizers=[
            RegularizerSpec(fn=lambda data, logprobs: logprobs.sum(), weight=lambda step: step / 4, name="sum")
        ],
    )  # fmt: skip
    (backward,) = bench.recorder.of("B")
    weights = [
        torch.frombuffer(bytearray(sent.loss_fn_inputs["weights"].dense), dtype=torch.float32)
        for sent in backward.message.data
    ]
    assert torch.equal(torch.cat(weights), torch.full((6,), -0.5))


async def test_a_controller_is_updated_once_per_optimizer_step(bench: Bench):
    training = await bench.train()
    controller = Counting()
    one = [RegularizerSpec(fn=l2, weight=controller, name="a"), RegularizerSpec(fn=l2, weight=controller, name="b")]
    first = await training.forward_backward_custom(DATA, nll, regularizers=one)
    second = await training.forward_backward_custom(DATA, Pipeline(nll, one))
    assert controller.received == []
    await training.optim_step(ADAM)
    assert [[output.loss_total for output in outputs] for outputs in controller.received] == [
        [first.loss_total, second.loss_total]
    ]
    await training.optim_step(ADAM)  # no custom step since: nothing to tell
    assert len(controller.received) == 1
    third = await training.forward_backward_custom(DATA, nll, regularizers=one)
    assert [third.regularizers[name].weight for name in "ab"] == [2.0, 2.0]


async def test_a_step_that_did_not_happen_does_not_reach_the_controller(bench: Bench):
    training = await bench.train()
    controller = Counting()
    specs = [RegularizerSpec(fn=l2, weight=controller, name="l2")]

    def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise KeyError

    results = await asyncio.gather(
        training.forward_backward_custom(DATA, nll, regularizers=specs),
        training.forward_backward_custom(DATA, fails, regularizers=specs),
        training.optim_step(ADAM),
        return_exceptions=True,
    )
    assert isinstance(results[2], PrecedingRequestFailed)
    assert (training.step, controller.received) == (0, [])
    await asyncio.gather(
        training.forward_backward_custom([bad_datum()], nll, regularizers=specs), return_exceptions=True
    )
    await training.optim_step(ADAM)
    assert training.step == 1
    assert len(controller.received) == 1
    assert len(controller.received[0]) == 1


async def test_a_failed_gradient_does_not_reach_the_controller(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    training = await bench.train()
    controller = Counting()
    specs = [RegularizerSpec(fn=l2, weight=controller, name="l2")]
    fail_one_backward_pass(monkeypatch)
    with pytest.raises(RequestFailed):
        await training.forward_backward_custom(DATA, nll, regularizers=specs)
    again = await training.forward_backward_custom(DATA, nll, regularizers=specs)
    await training.optim_step(ADAM)
    assert [[output.loss_total for output in outputs] for outputs in controller.received] == [[again.loss_total]]


def fail_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    run_pass = Engine.run_pass
    failed: list[str] = []

    def broken(self: Engine, model_id: str, request: EnginePass) -> Any:
        if not request.forward_only and not failed:
            failed.append(model_id)
            raise RuntimeError("planted")
        return run_pass(self, model_id, request)

    monkeypatch.setattr(Engine, "run_pass", broken)


async def test_a_failing_controller_raises_and_changes_nothing(bench: Bench):
    class Broken(Counting):
        def next_weights(
            self, weights: Mapping[str, float], outputs: Sequence[CustomLossOutput]
        ) -> Mapping[str, float]:
            if super().next_weights(weights, outputs) and len(self.received) == 1:
                raise ZeroDivisionError("one over nothing")
            return {}

    training = await bench.train()
    specs = [RegularizerSpec(fn=l2, weight=Broken(), name="l2")]
    events: list[telemetry.Event] = []
    handler = telemetry.attach(events.append, events="tinkex.regularizer.controller_failed")
    try:
        await training.forward_backward_custom(DATA, nll, regularizers=specs)
        await training.optim_step(ADAM)
    finally:
        telemetry.detach(handler)
    assert [event.metadata for event in events] == [{"controller": "Broken", "step": 1, "reason": "ZeroDivisionError"}]
    with pytest.raises(PipelineError, match="Broken failed after optimizer step 1 with ZeroDivisionError"):
        await training.forward_backward_custom(DATA, nll, regularizers=specs)
    output = await training.forward_backward_custom(DATA, nll, regularizers=specs)
    assert output.regularizers["l2"].weight == 1.0
    assert bench.kinds(training) == ["F", "B", "optim_step", "F", "F", "B"]


async def test_a_bad_schedule_sends_no_gradient_and_the_client_stays_usable(bench: Bench):
    training = await bench.train()
    specs = [RegularizerSpec(fn=l2, weight=lambda step: -1.0, name="l2")]
    results = await asyncio.gather(
        training.forward_backward_custom(DATA, nll, regularizers=specs),
        training.optim_step(ADAM),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [InvalidSpec, PrecedingRequestFailed]
    await training.forward_backward_custom(DATA, nll)
    await training.optim_step(ADAM)
    assert bench.kinds(training) == ["F", "F", "B", "optim_step"]


async def test_a_step_is_a_count(bench: Bench):
    training = await bench.train()
    for step in (-1, 1.5, True, None):
        with pytest.raises(InvalidData, match="step must be an int >= 0"):
            training.step = step
    assert training.step == 0


def moving() -> Pipeline:
    return Pipeline(
        nll,
        [
            RegularizerSpec(fn=l2, weight=AdaptiveKL(initial=0.1, target=5.0, horizon=1.0), name="held"),
            RegularizerSpec(fn=l2, weight=TargetGradientRatio(ratio=0.4, max_factor=1.5), name="ratio"),
            RegularizerSpec(fn=l2, weight=Linear(0.0, 1.0, 5), name="ramp"),
        ],
    )


async def run(training: AsyncTrainingClient, pipeline: Pipeline, steps: int) -> list[float]:
    losses: list[float] = []
    for _ in range(steps):
        output, _ = await asyncio.gather(training.forward_backward_custom(DATA, pipeline), training.optim_step(ADAM))
        losses.append(output.loss_total)
    return losses


async def test_a_resumed_run_continues_exactly(bench: Bench):
    whole = await run(await bench.train(), moving(), 6)
    training, pipeline = await bench.train(), moving()
    losses = await run(training, pipeline, 3)
    saved = await training.save_state("half")
    state = json.loads(json.dumps({"step": training.step, **pipeline.state_dict()}))
    resumed = await bench.service.create_training_client_from_state(saved.path, with_optimizer=True)
    again = moving()
    again.load_state_dict(state)
    resumed.step = state["step"]
    assert losses + await run(resumed, again, 3) == whole


async def test_surgery_in_a_step(bench: Bench):
    training = await bench.train()
    opposing = [RegularizerSpec(fn=lambda data, logprobs: logprobs.sum() * 2, weight=1.0, name="opposing")]
    output = await training.forward_backward_custom(
        DATA, nll, regularizers=opposing, combine="pcgrad", track_grad_norms=True
    )
    # Exactly opposite gradients leave nothing of each other.
    assert output.total_grad_norm == pytest.approx(0.0, abs=1e-6)
    assert output.diagnosis["opposing"].conflicts is True
    with pytest.raises(PipelineError, match="set combine on it"):
        await training.forward_backward_custom(DATA, Pipeline(nll), combine="pcgrad")


async def test_a_multiplier_moves_once_per_optimizer_step(bench: Bench):
    """One call of 4 positions and one of 12 give the mean over 16; a step that failed moves nothing."""
    training = await bench.train()
    constraint = DualAscent(at_most=1.0, rate=1.0, initial=0.5)

    def tokens(data: Any, logprobs: torch.Tensor) -> Any:
        return (logprobs * 0).sum() + len(logprobs), {"tokens": len(logprobs)}

    specs = [RegularizerSpec(fn=tokens, weight=constraint, name="r")]
    small, large = [datum(4, 1)], [datum(12, 2)]
    calls = [training.forward_backward_custom(data, nll, regularizers=specs) for data in (small, large)]
    outputs = await asyncio.gather(*calls)
    assert [output.regularizers["r"].weight for output in outputs] == [0.5, 0.5]
    with pytest.raises(RequestFailed):
        await training.optim_step(OptimizerParams(type="dimuon", learning_rate=0.01))
    assert constraint.weights == {"r": 0.5}
    await training.optim_step(ADAM)  # of the same gradients
    # The mean over 16 positions is (4 * 4 + 12 * 12) / 16 = 10.
    assert constraint.weights == {"r": pytest.approx(0.5 + 9.0)}
