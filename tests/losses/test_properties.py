"""What holds of every composed loss, whatever its terms, weights and outcomes."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.losses.support import LIMIT, spec, until
from tinkex_py import Datum, Pipeline, RegularizerError, RegularizerSpec, TinkexError
from tinkex_py.losses.logprobs import Logprobs

TERMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "l1": lambda p: p.abs().sum(),
    "l2": lambda p: p.pow(2).sum(),
    "entropy": lambda p: (p.exp() * p).sum(),
    "cubes": lambda p: (p**3).mean(),
    "first": lambda p: p[:1].sin().sum(),
    "constant": lambda p: torch.tensor(2.5),
}

weights = st.floats(0.0, 10.0, allow_subnormal=False)
chosen = st.lists(st.tuples(st.sampled_from(sorted(TERMS)), weights), max_size=6, unique_by=lambda pair: pair[0])
numbers = st.lists(st.floats(-5.0, -0.01), min_size=1, max_size=12)
quick = settings(max_examples=25, deadline=None)


def base(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.mean()


def term(name: str, *, sync: bool = True) -> Any:
    formula = TERMS[name]

    async def run_async(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(0)
        return formula(logprobs)

    return (lambda data, logprobs: formula(logprobs)) if sync else run_async


def specs_of(pairs: Sequence[tuple[str, float]], *, scale: float = 1.0, sync: bool = True) -> list[RegularizerSpec]:
    return [spec(term(name, sync=sync), name, weight * scale) for name, weight in pairs]


async def evaluate(pipeline: Pipeline, values: Sequence[float]) -> Any:
    return await pipeline.evaluate([], Logprobs.from_tensors(torch.tensor(values, dtype=torch.float64)))


@pytest.mark.asyncio
@given(pairs=chosen, values=numbers, scale=st.floats(0.0, 4.0))
@quick
async def test_the_loss_is_linear_in_the_weights(pairs: Any, values: list[float], scale: float):
    plain = await evaluate(Pipeline(base), values)
    one = await evaluate(Pipeline(base, specs_of(pairs)), values)
    scaled = await evaluate(Pipeline(base, specs_of(pairs, scale=scale)), values)
    for of_one, of_scaled, of_plain in (
        (one.gradient, scaled.gradient, plain.gradient),
        (
            torch.tensor(one.output.loss_total),
            torch.tensor(scaled.output.loss_total),
            torch.tensor(plain.output.loss_total),
        ),
    ):
        assert torch.allclose(of_scaled - of_plain, scale * (of_one - of_plain), rtol=1e-5, atol=1e-4)


@pytest.mark.asyncio
@given(pairs=chosen, values=numbers, seed=st.integers(0, 100))
@quick
async def test_the_order_of_specs_changes_only_rounding(pairs: Any, values: list[float], seed: int):
    order = np.random.default_rng(seed).permutation(len(pairs))
    one = await evaluate(Pipeline(base, specs_of(pairs), track_grad_norms=True), values)
    other = await evaluate(Pipeline(base, specs_of([pairs[index] for index in order]), track_grad_norms=True), values)
    assert torch.allclose(one.gradient, other.gradient, rtol=1e-12, atol=1e-12)
    assert other.output.loss_total == pytest.approx(one.output.loss_total, rel=1e-12, abs=1e-12)
    assert other.output.total_grad_norm == pytest.approx(one.output.total_grad_norm, rel=1e-9, abs=1e-12)
    assert other.output.regularizers == one.output.regularizers
    assert list(other.output.regularizers) == [pairs[index][0] for index in order]


@pytest.mark.asyncio
@given(pairs=chosen, values=numbers, sync=st.booleans())
@quick
async def test_parallel_equals_sequential(pairs: Any, values: list[float], sync: bool):
    made = [
        await evaluate(Pipeline(base, specs_of(pairs, sync=sync), track_grad_norms=True, parallel=parallel), values)
        for parallel in (True, False)
    ]
    assert made[0].output == made[1].output
    assert torch.equal(made[0].gradient, made[1].gradient)


@pytest.mark.asyncio
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("combine", ["sum", "pcgrad"])
async def test_no_term_is_called_twice(parallel: bool, track: bool, combine: Any):
    calls: dict[str, int] = {}

    def counted(name: str, *, sync: bool) -> Any:
        def run(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            calls[name] = calls.get(name, 0) + 1
            return logprobs.pow(2).sum()

        async def run_async(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            return run(data, logprobs)

        return run if sync else run_async

    specs = [
        spec(counted("sync", sync=True), "sync"),
        spec(counted("async", sync=False), "async", retry=3),
        spec(counted("unweighted", sync=True), "unweighted", 0.0),
        spec(counted("clipped", sync=True), "clipped", max_grad_norm=0.1),
        spec(counted("off", sync=True), "off", enabled=False),
    ]
    pipeline = Pipeline(counted("base", sync=True), specs, parallel=parallel, track_grad_norms=track, combine=combine)
    for _ in range(2):
        await pipeline.compute([], torch.rand(5))
    assert calls == dict.fromkeys(("base", "sync", "async", "unweighted", "clipped"), 2)


class Kept:
    """A term that remembers, weakly, what it was given and what it made."""

    def __init__(self, ending: str) -> None:
        self.ending = ending
        self.references: list[weakref.ref[torch.Tensor]] = []

    def note(self, logprobs: torch.Tensor) -> torch.Tensor:
        loss = logprobs.pow(2).sum()
        self.references += [weakref.ref(logprobs), weakref.ref(loss)]
        return loss


class KeptSync(Kept):
    def compute(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        loss = self.note(logprobs)
        if self.ending == "fails":
            raise ValueError("no")
        return loss * float("nan") if self.ending == "nan" else loss


class KeptAsync(Kept):
    async def compute(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        loss = self.note(logprobs)
        if self.ending == "fails":
            raise ValueError("no")
        if self.ending == "hangs":
            await asyncio.Event().wait()
        return loss * float("nan") if self.ending == "nan" else loss


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [KeptSync, KeptAsync])
@pytest.mark.parametrize("ending", ["works", "fails", "nan", "hangs"])
@pytest.mark.parametrize(("size", "on_error"), [(5, "raise"), (10_000, "skip")])
async def test_leaves_and_losses_die_after_the_call(kind: Any, ending: str, on_error: Any, size: int):
    kept = kind(ending)
    specs = [spec(kept, "kept", on_error=on_error, timeout=0.01 if ending == "hangs" and kind is KeptAsync else 30.0)]
    pipeline = Pipeline(base, specs, track_grad_norms=True)
    try:
        async with asyncio.timeout(LIMIT):
            await pipeline.compute([], torch.full((size,), -0.5))
    except RegularizerError as error:
        assert error.name == "kept"  # noqa: PT017  # it may also be skipped
    assert kept.references

    def all_are_gone() -> bool:
        gc.collect()
        return all(reference() is None for reference in kept.references)

    await until(all_are_gone)


@pytest.mark.asyncio
async def test_an_error_that_is_kept_keeps_no_leaf():
    """A user who stores the last error must not keep a batch's memory with it."""
    kept = KeptAsync("nan")
    errors: list[TinkexError] = []
    try:
        await Pipeline(base, [spec(kept, "kept")]).compute([], torch.full((5,), -0.5))
    except RegularizerError as error:
        errors.append(error.with_traceback(None))
    gc.collect()
    assert errors
    assert all(reference() is None for reference in kept.references)
