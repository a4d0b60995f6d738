"""Bounds instead of weights: the multiplier, what it sees, and what outputs and events show.

Its numbers by hand are those of section H of the sheet, in tests/objectives.
"""

import dataclasses
import json
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.losses.support import guide_logprobs, nll, recorded
from tests.objectives.sheet_constraints import call, multipliers, over
from tinkex_py import CustomLossOutput, Datum, Executor, InvalidSpec, ModelInput, Pipeline, RegularizerSpec
from tinkex_py.base_losses import NLL
from tinkex_py.losses import replay
from tinkex_py.losses.constraints import Constraint, DualAscent, LogDualAscent, PIDMultiplier
from tinkex_py.losses.controllers import AdaptiveKL
from tinkex_py.regularizers import L1, Orthogonality, SampledKL
from tinkex_py.runs.accumulation import over_step

CONTROLLERS: list[Callable[..., Constraint]] = [
    lambda **bound: DualAscent(rate=0.3, maximum=2.0, **bound),
    lambda **bound: LogDualAscent(rate=0.3, maximum=2.0, **bound),
    lambda **bound: PIDMultiplier(p=0.2, i=0.1, d=0.05, maximum=2.0, **bound),
]
numbers = st.lists(st.floats(-50, 50), min_size=1, max_size=12)


def mean(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.mean()  # 0.98 of the guide's logprobs


def spread(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.square().mean()  # 1.366 of the guide's logprobs


# The multiplier


@pytest.mark.parametrize("make", CONTROLLERS)
@given(values=numbers, bound=st.floats(-5, 5))
def test_a_multiplier_is_at_least_zero_and_at_most_the_maximum(
    make: Callable[..., Constraint], values: list[float], bound: float
):
    assert all(0.0 <= weight <= 2.0 for weight in multipliers(make(at_most=bound), *over(*values)))


@pytest.mark.parametrize("make", CONTROLLERS)
@given(values=numbers, bound=st.floats(-5, 5))
def test_a_lower_bound_is_the_mirror_of_an_upper_one(
    make: Callable[..., Constraint], values: list[float], bound: float
):
    mirrored = multipliers(make(at_least=-bound), *over(*(-value for value in values)))
    assert mirrored == multipliers(make(at_most=bound), *over(*values))


@pytest.mark.parametrize("make", CONTROLLERS)
@settings(max_examples=20)
@given(values=numbers)
def test_a_restored_multiplier_goes_on_exactly(make: Callable[..., Constraint], values: list[float]):
    whole, cut = make(at_most=0.5), make(at_most=0.5)
    for controller in (whole, cut):
        controller.weight_of("r")
    for index, value in enumerate(values):
        for controller in (whole, cut):
            controller.update([call(controller, value, {})])
        if index == len(values) // 2:
            state = json.loads(json.dumps(cut.state_dict()))
            cut = make(at_most=0.5)
            cut.load_state_dict(state)
    assert cut.weights == whole.weights
    assert cut.state_dict() == whole.state_dict()


@pytest.mark.parametrize("state", [{}, {"weights": {"r": "x"}}, {"weights": {}, "sums": 1}, []])
def test_a_state_that_is_none_is_refused(state: Any):
    controller = PIDMultiplier(at_most=1.0)
    with pytest.raises(InvalidSpec):
        controller.load_state_dict(state)
    assert controller.weights == {}


def test_the_sum_of_violations_does_not_grow_at_the_maximum():
    pid = PIDMultiplier(at_most=0.0, p=0.0, i=0.1, d=0.0, maximum=2.0)
    # The sum ends at 20; one step of -5 leaves 15.
    assert multipliers(pid, *over(*[100.0] * 50, -5.0))[-1] == pytest.approx(1.5)


def test_a_long_violation_does_not_overflow():
    log = LogDualAscent(at_most=0.0, rate=1e3, maximum=1e12)
    assert multipliers(log, *over(1e9)) == pytest.approx([math.exp(20)])


def test_the_default_rate_follows_the_bound():
    # A value of twice the bound raises the multiplier by 0.1.
    for bound in (0.05, 4.0):
        assert multipliers(DualAscent(at_most=bound), *over(2 * bound)) == pytest.approx([0.1])
    assert multipliers(DualAscent(at_most=0.0), *over(1.0)) == pytest.approx([0.1])


def test_a_call_without_a_token_moves_nothing():
    controller = DualAscent(at_most=1.0, rate=0.1, initial=0.5)
    assert multipliers(controller, [(0.0, {"tokens": 0.0})], [(3.0, {"tokens": 2.0}), (0.0, {"tokens": 0.0})]) == [
        0.5,
        pytest.approx(0.7),
    ]


# Specs


def test_a_spec_has_a_weight_or_a_bound():
    made = RegularizerSpec(fn=mean, at_most=1, name="r")
    assert isinstance(made.weight, DualAscent)
    assert (made.at_most, made.weight.at_most, made.weight.at_least) == (1.0, 1.0, None)
    assert isinstance(RegularizerSpec(fn=mean, at_least=0.5).weight, DualAscent)
    given = LogDualAscent(at_least=0.5)
    assert RegularizerSpec(fn=mean, weight=given).weight is given
    assert dataclasses.replace(made, name="other").weight is made.weight
    assert dataclasses.replace(made, weight=0.5, at_most=None).weight == 0.5
    assert pickle.loads(pickle.dumps(made)).weight.at_most == 1.0  # our own bytes
    assert made.facts()["weight"] == "DualAscent(at_most=1), now 0"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "weight=None, and there is no bound: pass weight"),
        ({"weight": 0.1, "at_most": 1.0}, "weight and a bound exclude each other, got weight=0.1, at_most=1.0"),
        ({"weight": AdaptiveKL(initial=0.1, target=1.0), "at_least": 1.0}, "weight and a bound exclude each other"),
        ({"weight": DualAscent(at_most=2.0), "at_most": 1.0}, "weight and a bound exclude each other"),
        (
            {"at_most": 1.0, "at_least": 0.5},
            "at_most=1.0 and at_least=0.5 exclude each other: for a range",
        ),
        ({"at_most": "tight"}, "at_most must be a valid number, got 'tight'"),
        ({"at_least": float("nan")}, "at_least .*got nan"),
        ({"at_most": True}, "at_most .*got True"),
    ],
)
def test_other_specs_are_refused(fields: dict[str, Any], words: str):
    with pytest.raises(InvalidSpec, match=f"regularizer 'r': {words}"):
        RegularizerSpec(fn=mean, name="r", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"fn": SampledKL(reference_field="logprobs")},
        {"fn": L1(reduction="token-mean"), "options": {"reduction": "sum"}},
        {"fn": Orthogonality()},
    ],
)
def test_a_sum_has_no_bound(fields: dict[str, Any]):
    words = "reduction='sum' grows with the batch: pass options={'reduction': 'token-mean'}"
    with pytest.raises(InvalidSpec, match=words):
        RegularizerSpec(name="r", at_most=1.0, **fields)
    with pytest.raises(InvalidSpec, match=words):
        RegularizerSpec(name="r", weight=PIDMultiplier(at_least=1.0), **fields)
    assert RegularizerSpec(fn=L1(), at_most=1.0, options={"reduction": "token-mean"}).at_most == 1.0


@pytest.mark.parametrize(
    "make",
    [
        DualAscent,
        lambda: DualAscent(at_most=1.0, at_least=0.0),
        lambda: DualAscent(at_most=1.0, rate=0.0),
        lambda: DualAscent(at_most=1.0, initial=-1.0),
        lambda: DualAscent(at_most=1.0, initial=2.0, maximum=1.0),
        lambda: DualAscent(at_least=float("inf")),
        lambda: LogDualAscent(at_most=1.0, initial=0.0),
        lambda: LogDualAscent(at_most=1.0, rate=-1.0),
        lambda: PIDMultiplier(at_most=1.0, p=-1.0),
        lambda: PIDMultiplier(at_most=1.0, i=0.0),
    ],
)
def test_bad_constraints_are_refused(make: Callable[[], object]):
    with pytest.raises(InvalidSpec):
        make()


# Outputs


async def steps(pipeline: Pipeline, count: int) -> CustomLossOutput:
    for _ in range(count):
        output = await pipeline.compute([], guide_logprobs())
        pipeline.update_controllers([output])
    return output


@pytest.mark.asyncio
async def test_what_an_output_and_its_events_show():
    pipeline = Pipeline(nll, [RegularizerSpec(fn=spread, weight=DualAscent(at_most=1.0, rate=0.5), name="r")])
    first = (await steps(pipeline, 1)).regularizers["r"]
    assert (first.weight, first.contribution) == (0.0, 0.0)
    with recorded("tinkex.regularizer.compute.stop") as events:
        output = await pipeline.compute([], guide_logprobs())
    own = output.regularizers["r"]
    assert own.constraint is not None
    assert own.weight == pytest.approx(0.5 * 0.366)
    assert own.contribution == pytest.approx(0.183 * 1.366)
    assert (own.constraint.bound, own.constraint.feasible) == (1.0, False)
    assert own.constraint.violation == pytest.approx(0.366)
    (event,) = events
    assert event.measurements["bound"] == 1.0
    assert event.measurements["violation"] == own.constraint.violation
    assert event.measurements["feasible"] is False
    assert CustomLossOutput.model_validate_json(output.model_dump_json()) == output
    html = output._repr_html_()  # the protocol of notebooks
    assert "&lt;= 1" in html
    assert ">no</td>" in html
    one = await Executor.execute_one(pipeline.regularizers[0], [], guide_logprobs())
    assert one.constraint == own.constraint


@pytest.mark.asyncio
@pytest.mark.parametrize("combine", ["sum", "pcgrad", "upgrad"])
async def test_a_lower_bound_pulls_the_value_up(combine: Any):
    bounds = {"lower": DualAscent(at_least=2.0, initial=0.5), "upper": DualAscent(at_most=-2.0, initial=0.5)}
    fns = {"lower": spread, "upper": lambda data, logprobs: -spread(data, logprobs)}
    losses = []
    for name, weight in bounds.items():
        leaf = guide_logprobs().requires_grad_()
        pipeline = Pipeline(
            nll, [RegularizerSpec(fn=fns[name], weight=weight, name="r")], combine=combine, track_grad_norms=True
        )
        loss = await pipeline.loss([], leaf)
        loss.backward()
        output = await pipeline.compute([], leaf.detach())
        losses.append((loss.item(), leaf.grad, output.diagnosis, output.regularizers["r"]))
    (lower, gradient, diagnosis, own), (upper, expected, mirrored, _) = losses
    assert lower == upper == pytest.approx(0.98 - 0.5 * 1.366, rel=1e-6)
    assert torch.equal(gradient, expected)
    assert diagnosis == mirrored
    assert own.value == pytest.approx(1.366, rel=1e-6)
    assert own.grad_norm_weighted == pytest.approx(0.5 * 2 * 6.83**0.5 / 5, rel=1e-6)
    assert own.constraint is not None
    assert own.constraint.violation == pytest.approx(2 - 1.366, rel=1e-6)


def datums(count: int) -> tuple[list[Datum], list[torch.Tensor]]:
    """Datums of 1 to 4 positions, with other logprobs at each."""
    data, logprobs = [], []
    for at in range(count):
        length = 1 + at % 4
        logprobs.append(-0.1 - torch.arange(length) / 3 - at / 7)
        fields = {"target_tokens": [1] * length, "reference_logprobs": [-1.0] * length}
        data.append(Datum(model_input=ModelInput.from_ints([1] * length), loss_fn_inputs=fields))
    return data, logprobs


@pytest.mark.asyncio
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
async def test_four_and_twelve_datums_move_a_multiplier_like_sixteen(reduction: str):
    def make() -> Pipeline:
        kl = SampledKL(reference_field="reference_logprobs", estimator="k3", mask=None, reduction=reduction)  # type: ignore[arg-type]
        return Pipeline(NLL(mask=None, reduction="token-mean"), [RegularizerSpec(fn=kl, at_most=0.1, name="kl")])

    data, logprobs = datums(16)
    cuts = slice(0, 4), slice(4, 16)
    whole, known, plain = make(), make(), make()
    whole.update_controllers([await whole.compute(data, logprobs)])
    step = over_step(known, [data[cut] for cut in cuts])
    known.update_controllers([await step.compute(data[cut], logprobs[cut]) for cut in cuts])
    plain.update_controllers([await plain.compute(data[cut], logprobs[cut]) for cut in cuts])
    (expected,) = (controller.weights["kl"] for controller in whole.controllers)
    assert expected > 0.1
    for pipeline in (known, plain):
        assert pipeline.controllers[0].weights["kl"] == pytest.approx(expected, rel=1e-6)
    # The next step has the same total, too.
    step = over_step(known, [data[cut] for cut in cuts])
    parts = [await step.compute(data[cut], logprobs[cut]) for cut in cuts]
    together = await whole.compute(data, logprobs)
    assert sum(part.loss_total for part in parts) == pytest.approx(together.loss_total, rel=1e-6)


@pytest.mark.asyncio
async def test_a_pipeline_resumes_its_multipliers():
    def make() -> Pipeline:
        return Pipeline(
            nll,
            [
                RegularizerSpec(fn=spread, weight=PIDMultiplier(at_most=1.0), name="a"),
                RegularizerSpec(fn=mean, at_least=1.5, name="b"),
            ],
        )

    first, second = make(), make()
    await steps(first, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert await steps(second, 2) == await steps(first, 2)


@pytest.mark.asyncio
async def test_a_replay_has_the_multiplier_and_the_bound(tmp_path: Path):
    data, logprobs = datums(3)

    def specs() -> Sequence[RegularizerSpec]:
        kl = SampledKL(reference_field="reference_logprobs", mask=None, reduction="token-mean")
        return [
            RegularizerSpec(fn=kl, weight=LogDualAscent(at_most=0.1), name="kl"),
            RegularizerSpec(fn=L1(mask=None, reduction="mean"), at_least=2.0),
        ]

    pipeline = Pipeline(NLL(mask=None), specs())
    pipeline.update_controllers([await pipeline.compute(data, logprobs)])
    output = await pipeline.compute(data, logprobs, record=tmp_path / "step")
    assert await replay(tmp_path / "step") == output
    assert await replay(tmp_path / "step", Pipeline(NLL(mask=None), specs())) == output
