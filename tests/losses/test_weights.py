"""Weights that move: schedules of the step, controllers that read the outputs, and their saved states."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.losses.support import guide_logprobs, l1, l2, nll, recorded, spec
from tinkex_py import CustomLossOutput, Executor, InvalidSpec, Pipeline, PipelineError, RegularizerSpec
from tinkex_py.losses.balancing import famo_slopes, log_variance_slope
from tinkex_py.losses.controllers import (
    DWA,
    FAMO,
    AdaptiveEntropy,
    AdaptiveKL,
    GradNormBalance,
    TargetGradientRatio,
    UncertaintyWeighting,
)
from tinkex_py.losses.output import BaseLossOutput, RegularizerOutput
from tinkex_py.losses.schedules import Constant, Cosine, Linear, Piecewise, WarmUp
from tinkex_py.losses.weights import WeightController


def measured(
    values: Mapping[str, float],
    norms: Mapping[str, float] | None = None,
    *,
    base: float = 1.0,
    base_norm: float = 1.0,
    tokens: float = 1.0,
    total: float | None = None,
) -> CustomLossOutput:
    """An output as a custom step gives it, with these values and norms."""
    regularizers = {
        name: RegularizerOutput(
            name=name,
            value=value,
            weight=1.0,
            contribution=value,
            custom_metrics={"entropy": value, "tokens": tokens} | ({"total_of_step": total} if total else {}),
            grad_norm=None if norms is None else norms[name],
        )
        for name, value in values.items()
    }
    return CustomLossOutput(
        loss_total=base + sum(values.values()),
        base_loss=BaseLossOutput(value=base, grad_norm=base_norm),
        regularizers=regularizers,
    )


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.3), {0: 0.3, 7: 0.3}),
        (Linear(1.0, 0.0, 4), {0: 1.0, 1: 0.75, 2: 0.5, 4: 0.0, 100: 0.0}),
        (Linear(0.1, 0.3, 2), {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.3}),
        # (1 + cos(pi/3))/2 = 3/4 and (1 + cos(2 pi/3))/2 = 1/4
        (Cosine(1.0, 0.0, 3), {0: 1.0, 1: 0.75, 2: 0.25, 3: 0.0, 9: 0.0}),
        (Cosine(0.0, 2.0, 2), {0: 0.0, 1: 1.0, 2: 2.0}),
        (WarmUp(4, 0.2), {0: 0.0, 1: 0.05, 2: 0.1, 4: 0.2, 50: 0.2}),
        (WarmUp(2, Linear(1.0, 0.0, 4)), {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.75, 6: 0.0}),
        (Piecewise({0: 0.1, 10: 0.01, 5: 0.05}), {0: 0.1, 4: 0.1, 5: 0.05, 9: 0.05, 10: 0.01, 99: 0.01}),
    ],
)
def test_schedules_by_hand(schedule: Callable[[int], float], expected: Mapping[int, float]):
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, abs=1e-12)


@given(start=st.floats(0, 1e6), end=st.floats(0, 1e6), steps=st.integers(1, 50), step=st.integers(0, 80))
def test_ramps_stay_between_their_ends(start: float, end: float, steps: int, step: int):
    low, high = min(start, end), max(start, end)
    for schedule in (Linear(start, end, steps), Cosine(start, end, steps)):
        assert low * (1 - 1e-12) <= schedule(step) <= high * (1 + 1e-12)
    assert Linear(start, end, steps)(steps) == end
    assert Linear(start, end, steps)(0) == start


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(-0.1),
        lambda: Constant(math.nan),
        lambda: Linear(0.0, math.inf, 3),
        lambda: Linear(0.0, 1.0, 0),
        lambda: Linear(0.0, 1.0, True),
        lambda: Cosine(-1.0, 1.0, 3),
        lambda: Cosine(0.0, 1.0, 2.5),
        lambda: WarmUp(0, 1.0),
        lambda: WarmUp(3, -1.0),
        lambda: Piecewise({1: 0.5}),
        lambda: Piecewise({0: 0.5, -1: 0.5}),
        lambda: Piecewise({0: "much"}),  # type: ignore[dict-item]
    ],
)
def test_bad_schedules_are_refused(make: Callable[[], object]):
    with pytest.raises(InvalidSpec):
        make()


@pytest.mark.asyncio
async def test_a_schedule_gives_the_weight_of_the_step():
    schedule = Linear(1.0, 0.0, 4)
    pipeline = Pipeline(nll, [spec(l1, "l1", schedule)], track_grad_norms=True)
    with recorded("tinkex.regularizer.compute.*") as events:
        output = await pipeline.compute([], guide_logprobs(), step=1)
    assert output.regularizers["l1"].weight == 0.75
    assert output.loss_total == pytest.approx(0.98 + 0.75 * 4.9, rel=1e-6)
    assert [event.metadata["weight"] for event in events] == [0.75, 0.75]
    last = await pipeline.compute([], guide_logprobs(), step=4)
    assert last.regularizers["l1"].weight == 0.0
    assert last.regularizers["l1"].grad_norm == pytest.approx(math.sqrt(5), rel=1e-6)
    assert (await pipeline.compute([], guide_logprobs())).regularizers["l1"].weight == 1.0
    one = await Executor.execute_one(spec(l1, "l1", schedule), [], guide_logprobs(), step=3)
    assert one.weight == 0.25


@pytest.mark.asyncio
@pytest.mark.parametrize("given", [math.nan, -1.0, math.inf, "0.5", True, None])
async def test_what_a_schedule_gives_is_checked(given: Any):
    called: list[int] = []

    def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        called.append(1)
        return logprobs.sum()

    pipeline = Pipeline(nll, [RegularizerSpec(fn=term, weight=lambda step: given, name="moved")])
    with recorded("tinkex.custom_loss.*") as events, pytest.raises(InvalidSpec, match=r"'moved'.*step 7"):
        await pipeline.compute([], guide_logprobs(), step=7)
    assert [event.name for event in events] == ["tinkex.custom_loss.start", "tinkex.custom_loss.exception"]
    assert not called


@pytest.mark.asyncio
async def test_a_schedule_that_raises_is_named():
    def broken(step: int) -> float:
        raise KeyError("no such step")

    with pytest.raises(InvalidSpec, match=r"'moved'.*step 0 with KeyError") as caught:
        await Pipeline(nll, [spec(l1, "moved", broken)]).compute([], guide_logprobs())
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("weight", [lambda: 1.0, lambda step, other: 1.0, Linear, [0.1], object()])
def test_what_is_no_weight_is_refused(weight: Any):
    with pytest.raises(InvalidSpec, match="'l1'"):
        RegularizerSpec(fn=l1, weight=weight, name="l1")


@pytest.mark.asyncio
@pytest.mark.parametrize("step", [-1, 0.5, True, None])
async def test_a_step_is_a_count(step: Any):
    with pytest.raises(PipelineError, match="step must be an int >= 0"):
        await Pipeline(nll).compute([], guide_logprobs(), step=step)


# Controllers


def test_adaptive_kl_by_hand():
    controller = AdaptiveKL(initial=0.2, target=2.0, horizon=10.0)
    assert controller.weight_of("kl") == 0.2
    controller.update([measured({"kl": 2.1})])  # error 0.05
    assert controller.weight_of("kl") == pytest.approx(0.2 * 1.005)
    controller.update([measured({"kl": 9.0}), measured({"kl": 11.0})])  # error 4, clipped to 0.2
    assert controller.weight_of("kl") == pytest.approx(0.2 * 1.005 * 1.02)
    controller.update([measured({"kl": -1.0})])  # error -1.5, clipped to -0.2
    assert controller.weight_of("kl") == pytest.approx(0.2 * 1.005 * 1.02 * 0.98)
    controller.update([measured({"other": 5.0})])
    assert controller.weight_of("kl") == pytest.approx(0.2 * 1.005 * 1.02 * 0.98)


def test_adaptive_entropy_over_several_calls():
    """Its numbers by hand are those of entry G2 of the sheet, in tests/objectives."""
    controller = AdaptiveEntropy(target=0.13, delta=0.005, maximum=0.008)
    controller.weight_of("bonus")
    # The mean over 100 tokens is 0.13, that of the calls 0.25.
    controller.update([measured({"bonus": 0.4}, tokens=10), measured({"bonus": 0.1}, tokens=90)])
    assert controller.weight_of("bonus") == 0.005
    controller.update([measured({"bonus": 0.1})])
    assert controller.weight_of("bonus") == 0.008
    output = measured({"bonus": 0.1})
    output.regularizers["bonus"].custom_metrics.clear()
    with pytest.raises(InvalidSpec, match="'bonus' must report the metrics 'entropy' and 'tokens'"):
        controller.update([output])


def test_the_parts_of_a_mean_over_the_step_add_up():
    controller = AdaptiveKL(initial=0.2, target=2.0, horizon=10.0)
    controller.weight_of("kl")
    parts = [measured({"kl": 0.5}, total=16.0), measured({"kl": 1.6}, total=16.0)]  # 2.1 in all: an error of 0.05
    controller.update(parts)
    assert controller.weight_of("kl") == pytest.approx(0.2 * 1.005)


def test_target_gradient_ratio_by_hand():
    controller = TargetGradientRatio(ratio=0.5, initial=0.1, max_factor=4.0)
    controller.weight_of("l1")
    controller.update([measured({"l1": 1.0}, {"l1": 4.0}, base_norm=2.0)])  # 0.5 * 2 / 4 = 0.25
    assert controller.weight_of("l1") == pytest.approx(0.25)
    controller.update([measured({"l1": 1.0}, {"l1": 1e-9}, base_norm=2.0)])  # wants 1e9: four times at most
    assert controller.weight_of("l1") == pytest.approx(1.0)
    controller.update([measured({"l1": 1.0}, {"l1": 100.0}, base_norm=2.0)])  # wants 0.01: a quarter at most
    assert controller.weight_of("l1") == pytest.approx(0.25)
    controller.update([measured({"l1": 1.0}, {"l1": 0.0}, base_norm=2.0)])
    controller.update([measured({"l1": 1.0}, {"l1": 1.0}, base_norm=0.0)])
    assert controller.weight_of("l1") == pytest.approx(0.25)
    # Means over the custom steps of one optimizer step: 0.5 * mean(1, 3) / mean(4, 12) = 0.125
    controller.update(
        [measured({"l1": 1.0}, {"l1": 4.0}, base_norm=1.0), measured({"l1": 1.0}, {"l1": 12.0}, base_norm=3.0)]
    )
    assert controller.weight_of("l1") == pytest.approx(0.125)


@pytest.mark.asyncio
async def test_target_gradient_ratio_reaches_its_ratio_and_asks_for_norms():
    controller = TargetGradientRatio(ratio=0.2, initial=0.001)
    pipeline = Pipeline(nll, [spec(l1, "l1", controller)])
    for _ in range(12):
        output = await pipeline.compute([], guide_logprobs())
        pipeline.update_controllers([output])
    weighted = output.regularizers["l1"].grad_norm_weighted
    assert weighted is not None
    assert output.base_loss.grad_norm is not None
    assert weighted / output.base_loss.grad_norm == pytest.approx(0.2, rel=1e-6)


def test_grad_norm_balance_by_hand():
    controller = GradNormBalance(alpha=1.0, rate=0.5, initial=1.0)
    controller.weight_of("a")
    # First step: all r are 1. G = (1, 4), mean 2.5. Base: (2.5/1)^.5, a: (2.5/4)^.5; a / base = (1/4)^.5 = 0.5
    controller.update([measured({"a": 2.0}, {"a": 4.0}, base=3.0, base_norm=1.0)])
    assert controller.weight_of("a") == pytest.approx(0.5)
    # Losses over their first values: base 1, a 0.5; mean 0.75; r = (4/3, 2/3). G = (1, 0.5 * 4) with mean 1.5:
    # targets (2, 1), steps (2/1)^.5 and (1/2)^.5, a / base = (1/4)^.5 = 0.5
    controller.update([measured({"a": 1.0}, {"a": 4.0}, base=3.0, base_norm=1.0)])
    assert controller.weight_of("a") == pytest.approx(0.25)


def moved(controller: WeightController, *values: tuple[float, float]) -> list[float]:
    """The weight after each step with these values of base loss and regularizer."""
    controller.weight_of("a")
    weights: list[float] = []
    for base, value in values:
        controller.update([measured({"a": value}, base=base)])
        weights.append(controller.weight_of("a"))
    return weights


def test_dwa_by_hand():
    # Base 2 -> 1 and a 1 -> 0.9: speeds 0.5 and 0.9, exp(0.4 / 2).
    assert moved(DWA(), (2.0, 1.0), (1.0, 0.9)) == pytest.approx([1.0, 1.221403])
    # Windows of two steps with the same means.
    steps = (3.0, 0.5), (1.0, 1.5), (0.5, 0.8), (1.5, 1.0)
    assert moved(DWA(window=2, initial=0.1), *steps) == pytest.approx([0.1, 0.1, 0.1, 0.1221403])
    # A loss that is not above 0 has the speed 1: exp(1 - 0.5).
    assert moved(DWA(temperature=1.0), (2.0, 1.0), (1.0, -1.0))[-1] == pytest.approx(math.exp(0.5))
    assert moved(DWA(), (1.0, 1e-300), (1.0, 1e9))[-1] == pytest.approx(math.exp(20))


def test_uncertainty_weighting_by_hand():
    # s = 0 for both; slopes 1/2 - 2/2 = -0.5 and 1/2 - 1/4 = 0.25: s becomes 0.05 and -0.025.
    assert moved(UncertaintyWeighting(rate=0.1), (2.0, 0.5)) == pytest.approx([math.exp(0.075)])
    # A slope is at most 1, and a loss that is not above 0 has none.
    assert moved(UncertaintyWeighting(rate=0.1), (100.0, -1.0)) == pytest.approx([math.exp(0.1)])
    # It ends where the weighted losses are equal.
    assert moved(UncertaintyWeighting(rate=0.5), *[(4.0, 0.5)] * 200)[-1] == pytest.approx(8.0, rel=1e-6)
    assert log_variance_slope(2.0, -0.5) == pytest.approx(-1.148721, abs=1e-6)
    assert log_variance_slope(2.0, math.log(2.0)) == pytest.approx(0.0)


def test_famo_by_hand():
    # Losses 1 and 2 with equal shares: (1/2) / (1/1). Then 0.8 and 1.9: Adam's first step moves the logits by its rate.
    expected = [0.5, math.exp(0.05) * 0.8 / 1.9]
    assert moved(FAMO(decay=0.0), (1.0, 2.0), (0.8, 1.9)) == pytest.approx(expected, rel=1e-6)
    progress = {"base_loss": math.log(1 / 0.8), "a": math.log(2 / 1.9)}
    assert progress == pytest.approx({"base_loss": 0.223144, "a": 0.051293}, abs=1e-6)
    slopes = famo_slopes({"base_loss": 0.0, "a": 0.0}, progress)
    assert slopes == pytest.approx({"base_loss": 0.042963, "a": -0.042963}, abs=1e-6)
    # A gap that is not above 0 changes nothing, and the next step has no progress.
    assert moved(FAMO(), (1.0, 2.0), (-0.5, 1.0), (1.0, 4.0)) == pytest.approx([0.5, 0.5, 0.25])
    assert moved(FAMO(lower_bound=-1.0), (-0.5, 1.0)) == pytest.approx([0.25])


def test_weights_keep_to_their_bounds():
    controller = AdaptiveKL(initial=1.0, target=1.0, horizon=0.25, minimum=0.9, maximum=1.5)
    controller.weight_of("kl")
    controller.update([measured({"kl": 100.0})])
    assert controller.weight_of("kl") == 1.5
    controller.update([measured({"kl": 0.0})])
    assert controller.weight_of("kl") == 0.9


def test_one_controller_weighs_several_names():
    controller = AdaptiveKL(initial=1.0, target=1.0)
    assert [controller.weight_of(name) for name in ("a", "b")] == [1.0, 1.0]
    controller.update([measured({"a": 1.1, "b": 0.9})])
    assert controller.weights == pytest.approx({"a": 1.01, "b": 0.99})


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveKL(initial=0.0, target=1.0),
        lambda: AdaptiveKL(initial=0.1, target=0.0),
        lambda: AdaptiveKL(initial=0.1, target=1.0, horizon=0.2),
        lambda: AdaptiveKL(initial=0.1, target=math.nan),
        lambda: AdaptiveKL(initial=0.1, target=1.0, minimum=0.2),
        lambda: AdaptiveKL(initial=0.1, target=1.0, maximum=-1.0),
        lambda: AdaptiveEntropy(target=0.0),
        lambda: AdaptiveEntropy(target=1.0, delta=0.0),
        lambda: AdaptiveEntropy(target=1.0, initial=2.0, maximum=1.0),
        lambda: TargetGradientRatio(ratio=0.0),
        lambda: TargetGradientRatio(max_factor=1.0),
        lambda: TargetGradientRatio(initial=math.inf),
        lambda: GradNormBalance(alpha=-1.0),
        lambda: GradNormBalance(rate=1.5),
        lambda: GradNormBalance(initial=True),
        lambda: DWA(temperature=0.0),
        lambda: DWA(window=0),
        lambda: DWA(initial=0.0),
        lambda: UncertaintyWeighting(rate=0.0),
        lambda: FAMO(rate=-1.0),
        lambda: FAMO(decay=-1.0),
        lambda: FAMO(lower_bound=math.inf),
    ],
)
def test_bad_controllers_are_refused(make: Callable[[], object]):
    with pytest.raises(InvalidSpec):
        make()


CONTROLLERS: list[Callable[[], WeightController]] = [
    lambda: AdaptiveKL(initial=0.2, target=1.0),
    lambda: TargetGradientRatio(ratio=0.2),
    lambda: GradNormBalance(alpha=0.7),
    lambda: AdaptiveEntropy(target=3.0, delta=0.3),
    lambda: DWA(window=2),
    lambda: UncertaintyWeighting(rate=0.3),
    lambda: FAMO(rate=0.1),
]


@pytest.mark.parametrize("make", CONTROLLERS)
@settings(max_examples=20)
@given(values=st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=8))
def test_a_restored_controller_goes_on_exactly(
    make: Callable[[], WeightController], values: list[tuple[float, float, float]]
):
    whole, cut = make(), make()
    for controller in (whole, cut):
        controller.weight_of("r")
    for index, (value, norm, base) in enumerate(values):
        output = measured({"r": value}, {"r": norm}, base=base, base_norm=base)
        whole.update([output])
        cut.update([output])
        if index == len(values) // 2:
            state = json.loads(json.dumps(cut.state_dict()))
            cut = make()
            cut.load_state_dict(state)
    assert cut.weights == whole.weights


@pytest.mark.parametrize("make", CONTROLLERS)
@pytest.mark.parametrize("state", [{}, {"weights": 3}, {"weights": {"kl": "x"}}, {"weights": {"kl": math.nan}}, []])
def test_a_state_that_is_none_is_refused(make: Callable[[], WeightController], state: Any):
    controller = make()
    with pytest.raises(InvalidSpec):
        controller.load_state_dict(state)
    assert controller.weights == {}


@pytest.mark.asyncio
async def test_a_pipeline_saves_the_states_of_its_controllers():
    def make() -> Pipeline:
        shared = TargetGradientRatio(ratio=0.2)
        return Pipeline(
            nll,
            [
                spec(l1, "a", shared),
                spec(l2, "b", shared),
                spec(l2, "c", AdaptiveKL(initial=0.1, target=1.0)),
                spec(l2, "d", 0.5),
            ],
        )

    first = make()
    assert len(first.controllers) == 2
    first.update_controllers([await first.compute([], guide_logprobs())])
    state = json.loads(json.dumps(first.state_dict()))
    assert set(state["controllers"]) == {"a", "c"}
    second = make()
    second.load_state_dict(state)
    assert await second.compute([], guide_logprobs()) == await first.compute([], guide_logprobs())
    with pytest.raises(InvalidSpec, match=r"\['a', 'c'\]"):
        second.load_state_dict({"controllers": {"a": {}}})
    with pytest.raises(InvalidSpec):
        second.load_state_dict([])


def test_a_bad_next_weight_changes_nothing():
    class Broken(WeightController):
        def next_weights(
            self, weights: Mapping[str, float], outputs: Sequence[CustomLossOutput]
        ) -> Mapping[str, float]:
            return {"a": 5.0, "b": math.nan}

    controller = Broken(initial=1.0)
    for name in ("a", "b"):
        controller.weight_of(name)
    with pytest.raises(InvalidSpec, match="the next weight of 'b'"):
        controller.update([measured({"a": 1.0, "b": 1.0})])
    assert controller.weights == {"a": 1.0, "b": 1.0}
