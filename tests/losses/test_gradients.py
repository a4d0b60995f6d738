"""Rows 1, 64-74 and 87 of the guide: the total gradient and its norms, against autograd and finite differences."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.losses.support import (
    async_l2,
    async_nll,
    datum,
    entropy,
    guide_logprobs,
    guide_specs,
    l1,
    l2,
    nll,
    packed,
    recorded,
    spec,
)
from tinkex_py import Executor, GradientTracker, NonFiniteLoss, Pipeline, RegularizerSpec, per_datum


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (got.double() - expected.double()).norm().item()
    return difference / max(expected.double().norm().item(), 1e-300)


@pytest.mark.asyncio
async def test_rows_65_to_68_the_guides_norms():
    output = await Pipeline(nll, guide_specs(), track_grad_norms=True).compute([], guide_logprobs())
    assert output.base_loss.grad_norm == pytest.approx(0.4472136, rel=1e-6)
    norms = [(regularizer.grad_norm, regularizer.grad_norm_weighted) for regularizer in output.regularizers.values()]
    assert [norm for norm, _ in norms] == pytest.approx([2.2360680, 5.2268537, 0.6250894], rel=1e-6)
    assert [weighted for _, weighted in norms] == pytest.approx([0.0223607, 0.0261343, 0.0006251], abs=5e-8)
    assert output.total_grad_norm == pytest.approx(0.4913877, abs=1e-7)
    ratio = sum(weighted for _, weighted in norms) / output.base_loss.grad_norm  # row 147
    assert ratio == pytest.approx(0.1098357, abs=1e-7)
    # Row 68 by hand: d/dlp = -1/5 + 0.01 sign(lp) + 0.01 lp + 0.001 e^lp (1 + lp).
    total = [-0.2 - 0.01 + 0.01 * lp + 0.001 * math.exp(lp) * (1 + lp) for lp in guide_logprobs().tolist()]
    assert output.total_grad_norm == pytest.approx(math.hypot(*total), rel=1e-6)


@pytest.mark.asyncio
async def test_row_68_without_regularizers_it_is_the_base_norm():
    output = await Pipeline(nll, track_grad_norms=True).compute([], guide_logprobs())
    assert output.total_grad_norm == output.base_loss.grad_norm


@pytest.mark.asyncio
async def test_row_68_the_norm_of_the_sum_not_the_sum_of_norms():
    output = await Pipeline(
        lambda d, p: p.sum(), [spec(lambda d, p: -p.sum(), "undoes_it")], track_grad_norms=True
    ).compute([], guide_logprobs())
    assert output.total_grad_norm == 0.0
    assert output.base_loss.grad_norm == pytest.approx(math.sqrt(5), rel=1e-6)


@pytest.mark.asyncio
async def test_row_69_norms_are_none_when_off():
    output = await Pipeline(nll, guide_specs()).compute([], guide_logprobs())
    assert output.total_grad_norm is None
    assert output.base_loss.grad_norm is None
    assert {(r.grad_norm, r.grad_norm_weighted) for r in output.regularizers.values()} == {(None, None)}


class CountedSquare(torch.autograd.Function):
    """p^2, counting its backward passes."""

    backwards = 0

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values)
        return values.pow(2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        CountedSquare.backwards += 1
        (values,) = ctx.saved_tensors
        return 2 * values * gradient


def counted_square(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return CountedSquare.apply(logprobs).sum()  # type: ignore[no-untyped-call]


async def counted_square_later(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return counted_square(data, logprobs)


@pytest.mark.asyncio
@pytest.mark.parametrize("fn", [counted_square, counted_square_later])
@pytest.mark.parametrize(
    ("weight", "track", "passes"), [(0.0, False, 0), (0.0, True, 1), (0.5, False, 1), (0.5, True, 1)]
)
async def test_row_70_backward_passes_are_counted(fn: Any, weight: float, track: bool, passes: int):
    CountedSquare.backwards = 0
    pipeline = Pipeline(nll, [spec(fn, "counted", weight)], track_grad_norms=track)
    loss = await pipeline.evaluate([], packed([np.array([-0.5, -1.2, -0.8, -2.1, -0.3])]))
    assert CountedSquare.backwards == passes
    counted = loss.output.regularizers["counted"]
    assert counted.value == pytest.approx(6.83, rel=1e-6)
    assert counted.contribution == pytest.approx(weight * 6.83, rel=1e-6)
    assert counted.grad_norm == (pytest.approx(5.2268537, rel=1e-6) if track else None)
    assert counted.grad_norm_weighted == (pytest.approx(weight * 5.2268537, rel=1e-6) if track else None)
    expected = -0.2 + weight * 2 * guide_logprobs()
    assert relative(loss.gradient, expected) < 1e-6


@pytest.mark.asyncio
async def test_row_72_grad_norm_of_any_loss():
    async def later(logprobs: torch.Tensor) -> Any:
        await asyncio.sleep(0)
        return logprobs.pow(2).sum(), {"metric": 1.0}

    logprobs = guide_logprobs()
    assert await GradientTracker.grad_norm(lambda p: p.abs().sum(), logprobs) == pytest.approx(2.2360680, rel=1e-6)
    assert await GradientTracker.grad_norm(lambda p: (p.pow(2), {}), logprobs) == pytest.approx(5.2268537, rel=1e-6)
    assert await GradientTracker.grad_norm(later, logprobs) == pytest.approx(5.2268537, rel=1e-6)
    assert await GradientTracker.grad_norm(lambda p: torch.tensor(1.0), logprobs) == 0.0


@pytest.mark.asyncio
@pytest.mark.parametrize("fn", [l2, async_l2])
async def test_row_73_unweighted_norm_of_a_regularizer(fn: Any):
    norm = await GradientTracker.regularizer_grad_norm(spec(fn, "l2", 0.005), [], guide_logprobs())
    assert norm == pytest.approx(5.2268537, rel=1e-6)


@pytest.mark.asyncio
async def test_row_74_total_norm_equals_the_output():
    arguments = ([], guide_logprobs())
    output = await Pipeline(nll, guide_specs(), track_grad_norms=True).compute(*arguments)
    assert await GradientTracker.total_grad_norm(nll, guide_specs(), *arguments) == output.total_grad_norm


@pytest.mark.asyncio
@pytest.mark.parametrize("scale", [-1e25, 1.0, 1e-25])
async def test_row_64_norms_of_any_size(scale: float):
    for shape in ((), (1,), (3, 7), (4096,), (5000,), (100_001,)):
        expected = pytest.approx(abs(float(np.float32(scale))) * math.sqrt(math.prod(shape)), rel=1e-6)
        assert await GradientTracker.grad_norm(lambda p: (p * scale).sum(), torch.zeros(shape)) == expected
        assert await GradientTracker.grad_norm(lambda p: p.sum() * scale, torch.zeros(shape)) == expected


@pytest.mark.asyncio
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
async def test_row_64_norms_in_any_dtype(dtype: torch.dtype):
    weights = torch.linspace(0, 1, 9000, dtype=torch.float64).to(dtype)
    norm = await GradientTracker.grad_norm(lambda p: (p * weights).sum(), torch.zeros(9000, dtype=dtype))
    assert norm == pytest.approx(weights.double().norm().item(), rel=1e-6)


TERMS: dict[str, Any] = {
    "mean": lambda p: -p.mean(),
    "abs": lambda p: p.abs().sum(),
    "square": lambda p: p.pow(2).sum(),
    "entropy": lambda p: (p.exp() * p).sum(),
    "kl": lambda p: (math.exp(-1.0) * (-1.0 - p)).sum(),
    "spread": lambda p: (p - p.mean()).pow(2).sum(),
    "unsummed": lambda p: p.sin() * 0.5,
    "last": lambda p: p[-1:].pow(3).sum(),
}


def as_term(loss: Any, form: str) -> Any:
    def sync(data: Any, logprobs: torch.Tensor) -> Any:
        return loss(logprobs)

    async def coroutine(data: Any, logprobs: torch.Tensor) -> Any:
        await asyncio.sleep(0)
        return loss(logprobs), {"seen": True}

    def listed(data: Any, logprobs: list[torch.Tensor]) -> Any:
        return loss(torch.cat(list(logprobs)))

    return {"sync": sync, "async": coroutine, "per_datum": per_datum(listed)}[form]


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=5)
forms = st.sampled_from(["sync", "async", "per_datum"])
weighted_terms = st.lists(
    st.tuples(st.sampled_from(sorted(TERMS)), st.floats(0, 10, width=32), forms), min_size=0, max_size=4
)


@settings(max_examples=40)
@given(
    lengths=shapes,
    candidates=st.none() | st.integers(1, 4),
    base=st.tuples(st.sampled_from(sorted(TERMS)), forms),
    regularizers=weighted_terms,
    parallel=st.booleans(),
    track=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_total_gradient_equals_autograd_of_the_written_out_total(
    lengths: list[int],
    candidates: int | None,
    base: tuple[str, str],
    regularizers: list[tuple[str, float, str]],
    parallel: bool,
    track: bool,
    seed: int,
):
    random = np.random.default_rng(seed)
    arrays = [
        -random.exponential(1.0, size=(length,) if candidates is None else (length, candidates)).astype(np.float32)
        for length in lengths
    ]
    data = [datum(length, candidates) for length in lengths]
    specs = [
        RegularizerSpec(fn=as_term(TERMS[name], form), weight=weight, name=f"{index}_{name}")
        for index, (name, weight, form) in enumerate(regularizers)
    ]
    pipeline = Pipeline(
        as_term(TERMS[base[0]], base[1]), specs, parallel=parallel, track_grad_norms=track, max_threads=2
    )
    loss = asyncio.run(pipeline.evaluate(data, packed(arrays)))

    leaf = torch.from_numpy(np.concatenate(arrays)).double().requires_grad_()
    parts = [TERMS[base[0]](leaf).sum(), *(weight * TERMS[name](leaf).sum() for name, weight, _ in regularizers)]
    total = sum(parts)
    slopes = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in parts]
    # float32 terms that cancel each other leave their own rounding, so the bound is relative to the parts' norms.
    scale = sum(slope.norm().item() for slope in slopes)
    assert (loss.gradient.double() - sum(slopes)).norm().item() <= 1e-6 * scale
    assert loss.gradient.shape == leaf.shape
    # The numbers inside of a part cancel too: rounding changes it like a relative change of every logprob.
    size = sum(abs(part.item()) + (leaf * slope).abs().sum().item() for part, slope in zip(parts, slopes, strict=True))
    assert loss.output.loss_total == pytest.approx(total.item(), rel=1e-6, abs=1e-6 * size)
    if track:
        assert loss.output.total_grad_norm == pytest.approx(loss.gradient.double().norm().item(), rel=1e-6, abs=1e-12)


@pytest.mark.asyncio
@pytest.mark.parametrize("shape", [(6,), (3, 2)])
async def test_the_gradient_agrees_with_finite_differences(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(11)
    point = -0.2 - torch.rand(shape, generator=generator, dtype=torch.float64)
    pipeline = Pipeline(async_nll, [spec(l1, "l1", 0.3), spec(entropy, "h", 0.7), spec(async_l2, "l2", 0.2)])
    from tinkex_py.losses.logprobs import Logprobs

    gradient = (await pipeline.evaluate([], Logprobs.from_tensors(point))).gradient
    assert gradient.dtype == torch.float64
    step = 1e-6
    for index in np.ndindex(shape):
        moved = torch.zeros(shape, dtype=torch.float64)
        moved[index] = step
        up = (await pipeline.compute([], point + moved)).loss_total
        down = (await pipeline.compute([], point - moved)).loss_total
        assert gradient[index].item() == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.asyncio
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
async def test_rule_4_a_loss_that_is_no_number(bad: float):
    def now(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.sum() * bad

    async def later(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return now(data, logprobs)

    for term in (now, later):
        with pytest.raises(NonFiniteLoss, match="'bad'") as caught:
            await Pipeline(nll, [spec(term, "bad")]).compute([], guide_logprobs())
        assert caught.value.name == "bad"
        assert isinstance(caught.value, ArithmeticError)
        with pytest.raises(NonFiniteLoss, match="base_loss"):
            await Pipeline(term).compute([], guide_logprobs())


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [3, 10_000])
async def test_rule_4_a_gradient_that_is_no_number(size: int):
    def root(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.abs().sqrt().sum()  # finite at 0, its slope is not

    with pytest.raises(NonFiniteLoss, match="gradient") as caught:
        await Pipeline(nll, [spec(root, "root")]).compute([], torch.zeros(size))
    assert caught.value.name == "root"


@pytest.mark.asyncio
async def test_rule_4_a_bad_gradient_can_be_skipped():
    specs = [spec(lambda d, p: p.sum() * math.nan, "bad", on_error="skip")]
    output = await Pipeline(nll, specs).compute([], guide_logprobs())
    assert (output.skipped, output.regularizers) == ({"bad": "NonFiniteLoss"}, {})
    assert output.loss_total == output.base_loss.value


@pytest.mark.asyncio
async def test_rule_4_a_total_that_overflows_is_typed():
    huge = spec(lambda d, p: torch.tensor(2.0, dtype=torch.float64), "huge", 1e308)
    with pytest.raises(NonFiniteLoss):
        await Pipeline(nll, [huge]).compute([], guide_logprobs())
    two = [spec(lambda d, p: torch.tensor(2.0, dtype=torch.float64), name, 0.8e308) for name in "ab"]
    with pytest.raises(NonFiniteLoss):
        await Pipeline(nll, two).compute([], guide_logprobs())
    with pytest.raises(NonFiniteLoss):
        await Pipeline(nll, [spec(lambda d, p: (p * 1e30).sum(), "steep", 1e20)]).compute([], guide_logprobs())
    with pytest.raises(NonFiniteLoss, match="weight 1e\\+300"):
        await Pipeline(nll, [spec(lambda d, p: p.sum(), "heavy", 1e300)]).compute([], guide_logprobs())


@pytest.mark.asyncio
async def test_rule_4_finite_gradients_whose_sum_overflows_are_fine():
    output = await Pipeline(lambda d, p: (p * 3e38).sum() * 0.5, track_grad_norms=True).compute([], torch.zeros(5000))
    assert output.total_grad_norm == pytest.approx(1.5e38 * math.sqrt(5000), rel=1e-6)


@pytest.mark.asyncio
async def test_rule_4_and_row_31_one_warning_per_name_and_pipeline():
    specs = [
        spec(lambda d, p: torch.tensor(2.0), "constant", 0.5),
        spec(lambda d, p: p.detach().sum(), "cut"),
        spec(l1, "l1"),
    ]
    pipeline, other = (Pipeline(nll, specs, track_grad_norms=True) for _ in range(2))
    with recorded("tinkex.regularizer.not_differentiable") as events:
        for _ in range(3):
            output = await pipeline.compute([], guide_logprobs())
        assert sorted(event.metadata["regularizer_name"] for event in events) == ["constant", "cut"]
        await other.compute([], guide_logprobs())
        assert len(events) == 4
    assert {name: r.differentiable for name, r in output.regularizers.items()} == {
        "constant": False,
        "cut": False,
        "l1": True,
    }
    constant = output.regularizers["constant"]
    assert (constant.value, constant.contribution, constant.grad_norm, constant.grad_norm_weighted) == (
        2.0,
        1.0,
        0.0,
        0.0,
    )


@pytest.mark.asyncio
async def test_executor_runs_the_same_arithmetic():
    outputs = await Executor.execute_all(guide_specs(), [], guide_logprobs(), track_grad_norms=True)
    pipeline = await Pipeline(nll, guide_specs(), track_grad_norms=True).compute([], guide_logprobs())
    assert outputs == list(pipeline.regularizers.values())
