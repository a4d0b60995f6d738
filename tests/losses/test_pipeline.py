"""Rows 46-63 of the guide: composing, order, limits, what goes in."""

import asyncio
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch

from tests.losses.support import (
    LIMIT,
    Crowd,
    Gate,
    async_nll,
    datum,
    guide_logprobs,
    guide_specs,
    l1,
    names_of,
    nll,
    packed,
    recorded,
    spec,
)
from tinkex_py import InvalidData, Pipeline, PipelineError, RegularizerError, per_datum

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("parallel", [True, False])
async def test_rows_49_to_53_the_guides_example(parallel: bool):
    output = await Pipeline(nll, guide_specs(), parallel=parallel).compute([], guide_logprobs())
    assert output.base_loss.value == pytest.approx(0.98, rel=1e-6)
    assert output.regularizer_total == pytest.approx(0.0816464, abs=5e-8)
    assert output.loss_total == pytest.approx(1.0616464, abs=1.1e-7)
    assert list(output.regularizers) == ["l1_sparsity", "l2_weight_decay", "entropy"]
    contributions = {name: regularizer.contribution for name, regularizer in output.regularizers.items()}
    assert contributions == pytest.approx(
        {"l1_sparsity": 0.049, "l2_weight_decay": 0.03415, "entropy": -0.0015035655}, rel=1e-6
    )
    assert (output.service_output, output.skipped, output.abandoned_threads) == (None, {}, 0)


async def test_row_52_without_regularizers():
    output = await Pipeline(nll).compute([], guide_logprobs())
    assert output.regularizer_total == 0.0
    assert output.regularizers == {}
    assert output.loss_total == output.base_loss.value


async def test_row_47_metrics_of_the_base_loss():
    output = await Pipeline(lambda d, p: (-p.mean(), {"tokens": 5})).compute([], guide_logprobs())
    assert output.base_loss.metrics == {"tokens": 5}


async def test_row_53_spec_order_although_the_last_ends_first():
    released = asyncio.Event()

    async def first(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await released.wait()
        return logprobs.sum()

    async def last(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        released.set()
        return logprobs.sum()

    output = await Pipeline(nll, [spec(first, "z"), spec(l1, "m"), spec(last, "a")]).compute([], guide_logprobs())
    assert list(output.regularizers) == ["z", "m", "a"]


async def test_row_61_sync_terms_overlap_in_threads():
    together = threading.Barrier(2)

    def meets(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        together.wait(LIMIT)  # breaks, and fails the term, unless two of them are here at once
        return logprobs.sum()

    await Pipeline(async_nll, [spec(meets, "a"), spec(meets, "b")], max_threads=2).compute([], guide_logprobs())


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_row_58_no_more_terms_than_max_concurrency(limit: int):
    running, peak = 0, 0

    async def counts(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1
        return logprobs.sum()

    specs = [spec(counts, str(index)) for index in range(8)]
    await Pipeline(counts, specs, max_concurrency=limit).compute([], guide_logprobs())
    assert peak == limit


async def test_row_62_sequential_order_base_loss_first():
    order: list[str] = []

    def noting(name: str, is_async: bool) -> Any:
        async def later(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            order.append(f"{name} in")
            await asyncio.sleep(0)
            order.append(f"{name} out")
            return logprobs.sum()

        def now(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            order.extend([f"{name} in", f"{name} out"])
            return logprobs.sum()

        return later if is_async else now

    specs = [spec(noting(name, name in "bd"), name) for name in "abcd"]
    with recorded("tinkex.regularizer.compute.*") as events:
        await Pipeline(noting("base", True), specs, parallel=False).compute([], guide_logprobs())
    assert order == [f"{name} {way}" for name in ["base", *"abcd"] for way in ("in", "out")]
    assert [(event.metadata["regularizer_name"], event.name.rsplit(".")[-1]) for event in events] == [
        (name, phase) for name in "abcd" for phase in ("start", "stop")
    ]


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
async def test_row_62_a_failure_starts_no_later_term(failing: int):
    order: list[int] = []

    def numbered(index: int) -> Any:
        def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            order.append(index)
            if index == failing:
                raise ValueError(index)
            return logprobs.sum()

        return term

    specs = [spec(numbered(index), str(index)) for index in (1, 2, 3)]
    with pytest.raises(RegularizerError):
        await Pipeline(numbered(0), specs, parallel=False).compute([], guide_logprobs())
    assert order == list(range(failing + 1))


async def test_row_46_two_calls_on_one_pipeline_overlap():
    crowd = Crowd(enough=2)

    async def base(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await crowd.compute(data, logprobs)
        return logprobs.sum()

    pipeline = Pipeline(base, guide_specs(), track_grad_norms=True)
    async with asyncio.timeout(LIMIT):
        first, second = await asyncio.gather(
            pipeline.compute([], guide_logprobs()), pipeline.compute([], 2 * guide_logprobs())
        )
    assert crowd.peak == 2
    assert first.regularizers["l1_sparsity"].value == pytest.approx(4.9, rel=1e-6)
    assert second.regularizers["l1_sparsity"].value == pytest.approx(9.8, rel=1e-6)
    assert second.regularizers["l2_weight_decay"].value == pytest.approx(4 * 6.83, rel=1e-6)


def _run_twice() -> list[float]:
    pipeline = Pipeline(nll, guide_specs())
    return [asyncio.run(pipeline.compute([], guide_logprobs())).loss_total for _ in range(2)]


async def test_a_pipeline_outlives_its_loop():
    first, second = await asyncio.to_thread(_run_twice)
    assert first == second == pytest.approx(1.0616464, abs=1.1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
async def test_row_63_any_shape_and_floating_dtype(dtype: torch.dtype):
    pipeline = Pipeline(lambda d, p: p.pow(2).sum(), track_grad_norms=True)
    for shape in ((), (1,), (0,), (4, 3), (2, 3, 4)):
        logprobs = torch.full(shape, -0.5, dtype=dtype)
        output = await pipeline.compute([], logprobs)
        assert output.loss_total == 0.25 * logprobs.numel()
        assert output.total_grad_norm == pytest.approx(logprobs.numel() ** 0.5, rel=1e-6)  # d(p^2) = 2p = -1 each
        assert torch.equal(logprobs, torch.full(shape, -0.5, dtype=dtype))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        *((torch.zeros(3, dtype=dtype), str(dtype)) for dtype in (torch.int64, torch.bool, torch.complex64)),
        (torch.zeros(3, device="meta"), "device meta"),
        (guide_logprobs().to_sparse_coo(), "sparse"),
        ([torch.zeros(1), torch.zeros(1, dtype=torch.float64)], "logprobs must"),
        *((stranger, "logprobs must be") for stranger in (None, 3.0, "text", [1.0], np.zeros(3, np.float32), {"a": 1})),
    ],
)
async def test_row_63_other_dtypes_are_named(logprobs: Any, message: str, listed: bool):
    with recorded() as events, pytest.raises(PipelineError, match=message):
        await Pipeline(nll).compute([], [logprobs] if listed else logprobs)
    assert events == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
async def test_row_63_terms_see_the_numbers_of_any_layout(dtype: torch.dtype):
    seen: list[torch.Tensor] = []

    async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        seen.append(logprobs.detach().clone().as_subclass(torch.Tensor))
        return torch.zeros((), dtype=torch.float64)

    for tensor in (
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.tensor(-1.5).expand(6),
        torch.zeros(0, 3),
        torch.zeros(3, 0),
        torch.tensor([math.nan, math.inf, -0.0]),
    ):
        given = tensor.to(dtype)
        await Pipeline(term).compute([], given)
        await Pipeline(term).compute([], [given, given[:1]])
        torch.testing.assert_close(seen[-2], given.contiguous(), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(seen[-1], torch.cat([given, given[:1]]), rtol=0, atol=0, equal_nan=True)


async def test_row_63_the_callers_tensor_is_its_own():
    """Its requires_grad, grad and version stay; changing it during the call changes no result and blames nobody."""
    logprobs = guide_logprobs().requires_grad_()
    version = logprobs._version
    await Pipeline(nll, guide_specs()).compute([], logprobs)
    assert logprobs.grad is None
    assert logprobs.requires_grad
    assert logprobs._version == version
    mine = guide_logprobs()

    async def meanwhile(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        mine.mul_(2)
        return -logprobs.mean()

    assert (await Pipeline(meanwhile).compute([], mine)).loss_total == pytest.approx(0.98, rel=1e-6)


@pytest.mark.parametrize("count", [1, 3])
async def test_data_and_tensors_must_be_as_many(count: int):
    """A term that zips both would otherwise train on a part of the data in silence."""
    pipeline = Pipeline(per_datum(lambda data, logprobs: sum(part.sum() for _, part in zip(data, logprobs))))  # noqa: B905
    with pytest.raises((PipelineError, InvalidData)):
        await pipeline.compute([datum(2)] * 2, [torch.zeros(2)] * count)


async def test_per_datum_sees_one_tensor_per_datum():
    shapes: list[list[tuple[int, ...]]] = []

    def term(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
        shapes.append([tuple(part.shape) for part in logprobs])
        return sum((index + 1) * part.sum() for index, part in enumerate(logprobs))  # type: ignore[return-value]

    data = [datum(2), datum(1), datum(2)]
    arrays = [np.array([-0.5, -1.2]), np.array([-0.8]), np.array([-2.1, -0.3])]
    loss = await Pipeline(per_datum(term)).evaluate(data, packed(arrays))
    direct = await Pipeline(per_datum(term)).compute(data, guide_logprobs())
    assert shapes == [[(2,), (1,), (2,)]] * 2
    assert loss.gradient.tolist() == [1, 1, 2, 3, 3]
    assert direct.loss_total == loss.output.loss_total == pytest.approx(-1.7 - 1.6 - 7.2, rel=1e-6)


async def test_mixed_shapes_can_only_be_seen_per_datum():
    arrays = [np.full(2, -1.0), np.full((3, 2), -2.0), np.full((1, 4), -3.0)]
    data = [datum(2), datum(3, 2), datum(1, 4)]

    def term(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
        assert [tuple(part.shape) for part in logprobs] == [(2,), (3, 2), (1, 4)]
        return sum((index + 1) * part.sum() for index, part in enumerate(logprobs))  # type: ignore[return-value]

    loss = await Pipeline(per_datum(term)).evaluate(data, packed(arrays))
    assert loss.output.loss_total == -2 - 24 - 36
    assert loss.gradient.reshape(-1).tolist() == [1] * 2 + [2] * 6 + [3] * 4
    with pytest.raises(PipelineError, match="per_datum") as caught:
        await Pipeline(nll).evaluate(data, packed(arrays))
    assert "base_loss" in str(caught.value)
    with pytest.raises(PipelineError, match="per_datum"):
        await Pipeline(per_datum(term), [spec(l1, "wants_packed")]).compute(
            data, [torch.from_numpy(array).float() for array in arrays]
        )


async def test_a_regularizer_that_is_off_does_not_run():
    gate = Gate()
    specs = [spec(gate, "off", enabled=False), spec(l1, "on")]
    with recorded() as events:
        output = await Pipeline(nll, specs).compute([], guide_logprobs())
    assert gate.calls == 0
    assert list(output.regularizers) == ["on"]
    assert output.skipped == {}
    assert events[0].metadata["regularizer_count"] == 1
    assert "off" not in {event.metadata.get("regularizer_name") for event in events}


async def test_offline_compute_runs_without_any_term_that_depends_on_logprobs():
    with recorded() as events:
        loss = await Pipeline(lambda d, p: torch.tensor(1.0)).evaluate([], packed([np.zeros(2)]))
    assert not loss.differentiable
    assert loss.gradient.tolist() == [0.0, 0.0]
    assert "tinkex.regularizer.not_differentiable" in names_of(events)
