"""Rows 76-77 of the guide: terms without a base loss."""

import asyncio
from typing import Any

import pytest
import torch

from tests.losses.failing_terms import OwnError, raising
from tests.losses.support import (
    LIMIT,
    Crowd,
    async_l2,
    datum,
    guide_logprobs,
    guide_specs,
    l1,
    l2,
    recorded,
    spec,
)
from tinkex_py import (
    DuplicateRegularizerNames,
    Executor,
    InPlaceMutation,
    InvalidData,
    InvalidSpec,
    Pipeline,
    PipelineError,
    RegularizerError,
    RegularizerOutput,
    per_datum,
)

pytestmark = pytest.mark.asyncio


async def test_row_76_execute_one():
    output = await Executor.execute_one(spec(l1, "l1", 0.01), [], guide_logprobs(), timeout=5.0, track_grad_norms=True)
    assert isinstance(output, RegularizerOutput)
    assert (output.name, output.weight) == ("l1", 0.01)
    assert (output.value, output.contribution) == (pytest.approx(4.9, rel=1e-6), pytest.approx(0.049, rel=1e-6))
    assert output.grad_norm == pytest.approx(2.2360680, rel=1e-6)
    assert output.grad_norm_weighted == pytest.approx(0.0223607, abs=5e-8)
    assert (await Executor.execute_one(spec(l1, "l1", 0.01), [], guide_logprobs())).grad_norm is None


async def test_row_76_a_term_that_is_off_or_may_be_skipped_runs_on_its_own():
    assert (await Executor.execute_one(spec(l1, "l1", enabled=False), [], guide_logprobs())).value > 0
    with pytest.raises(RegularizerError):
        await Executor.execute_one(spec(raising(OwnError("x")), "t", on_error="skip"), [], guide_logprobs())


async def test_row_77_spec_order_and_empty_list():
    outputs = await Executor.execute_all(guide_specs(), [], guide_logprobs())
    assert [output.name for output in outputs] == ["l1_sparsity", "l2_weight_decay", "entropy"]
    assert await Executor.execute_all([], [], guide_logprobs()) == []


async def test_row_77_duplicates_and_strangers_are_refused():
    with recorded() as events:
        with pytest.raises(DuplicateRegularizerNames) as caught:
            await Executor.execute_all([spec(l1, "dup"), spec(l2, "dup")], [], guide_logprobs())
        with pytest.raises(InvalidSpec):
            await Executor.execute_all([l1], [], guide_logprobs())  # type: ignore[list-item]
        for option in ({"max_concurrency": 0}, {"max_threads": 0}, {"timeout": -1.0}, {"parallel": "no"}):
            with pytest.raises(PipelineError):
                await Executor.execute_all([spec(l1, "l1")], [], guide_logprobs(), **option)  # type: ignore[arg-type]
    assert caught.value.names == ("dup",)
    assert events == []


async def test_row_77_options():
    crowd = Crowd(enough=2)
    async with asyncio.timeout(LIMIT):
        await Executor.execute_all([spec(crowd, "a"), spec(crowd, "b")], [], guide_logprobs(), parallel=True)
    assert crowd.peak == 2
    order: list[int] = []

    def numbered(index: int) -> Any:
        async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            order.append(index)
            await asyncio.sleep(0)
            order.append(index)
            return logprobs.sum()

        return term

    specs = [spec(numbered(index), str(index)) for index in range(3)]
    await Executor.execute_all(specs, [], guide_logprobs(), parallel=False)
    await Executor.execute_all(specs, [], guide_logprobs(), max_concurrency=1)
    assert order == [0, 0, 1, 1, 2, 2] * 2


async def test_row_77_skipped_and_disabled_terms_are_left_out():
    specs = [
        spec(raising(OwnError("x")), "skipped", on_error="skip"),
        spec(l1, "off", enabled=False),
        spec(async_l2, "l2"),
    ]
    assert [output.name for output in await Executor.execute_all(specs, [], guide_logprobs())] == ["l2"]


@pytest.mark.parametrize("data", [None, datum(5), "text", 5])
async def test_row_63_what_is_no_list_of_datums_is_named(data: Any):
    with recorded() as events:
        for call in (
            Executor.execute_one(spec(l1, "l1"), data, guide_logprobs()),
            Executor.execute_all([spec(l1, "l1")], data, guide_logprobs()),
            Pipeline(l1).compute(data, guide_logprobs()),
        ):
            with pytest.raises(InvalidData, match=f"list of Datum, got a {type(data).__name__}"):
                await call
    assert events == []


async def test_writes_are_found_here_too():
    def writes(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        logprobs.data.mul_(2)
        return logprobs.sum()

    with pytest.raises(InPlaceMutation):
        await Executor.execute_one(spec(writes, "writes"), [], guide_logprobs())


async def test_lists_and_per_datum():
    def term(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
        return logprobs[0].sum() * 2 + logprobs[1].sum()

    parts = [torch.tensor([-0.5]), torch.tensor([-1.0, -2.0])]
    output = await Executor.execute_one(spec(per_datum(term), "t"), [datum(1), datum(2)], parts, track_grad_norms=True)
    assert output.value == -4.0
    assert output.grad_norm == pytest.approx(6**0.5, rel=1e-6)
    with pytest.raises(PipelineError):
        await Executor.execute_one(spec(per_datum(term), "t"), [datum(1)] * 3, parts)
