"""Rules 5 and 6 of running terms, rows 57, 85-86 and 115-127 of the guide: how terms fail, what the caller sees."""

import asyncio
import threading
from typing import Any

import anyio
import pytest
import torch

from tests.losses.failing_terms import SHORT, Cleaning, OwnError, for_ever, raising
from tests.losses.support import LIMIT, Gate, async_l2, async_nll, guide_logprobs, l1, nll, recorded, spec
from tinkex_py import (
    Executor,
    Pipeline,
    PipelineError,
    RegularizerError,
    RegularizerTimeout,
    TinkexError,
)

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
async def test_row_117_the_term_is_named_and_its_error_kept(is_async: bool, parallel: bool):
    own = OwnError("oops")
    specs = [spec(l1, "fine"), spec(raising(own, is_async), "failing")]
    with pytest.raises(RegularizerError) as caught:
        await Pipeline(nll, specs, parallel=parallel).compute([], guide_logprobs())
    assert caught.value.name == "failing"
    assert caught.value.__cause__ is own
    assert "'failing'" in str(caught.value)
    assert "OwnError" in str(caught.value)
    assert isinstance(caught.value, PipelineError)
    assert isinstance(caught.value, TinkexError)


@pytest.mark.parametrize("is_async", [False, True])
async def test_row_123_a_base_loss_that_raises(is_async: bool):
    with pytest.raises(RegularizerError) as caught:
        await Pipeline(raising(OwnError("oops"), is_async), [spec(async_l2, "l2")]).compute([], guide_logprobs())
    assert caught.value.name == "base_loss"
    assert isinstance(caught.value.__cause__, OwnError)


async def test_row_124_through_execute_one():
    with pytest.raises(RegularizerError) as caught:
        await Executor.execute_one(spec(raising(RuntimeError("oops")), "failing"), [], guide_logprobs())
    assert caught.value.name == "failing"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.__cause__.args == ("oops",)


async def test_row_117_a_stop_iteration_is_an_error_like_others():
    with pytest.raises(RegularizerError) as caught:
        await Pipeline(raising(StopIteration("end"))).compute([], guide_logprobs())
    assert isinstance(caught.value.__cause__, StopIteration)
    with pytest.raises(RegularizerError) as caught:  # Python itself turns one raised in a coroutine into a RuntimeError
        await Pipeline(raising(StopIteration("end"), is_async=True)).compute([], guide_logprobs())
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_an_error_of_another_term_inside_a_term_is_reported_under_its_own_name():
    """A term may run a pipeline of its own."""

    async def nested(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await Pipeline(raising(OwnError("deep"))).compute(data, logprobs.detach())
        raise AssertionError("unreachable")

    with pytest.raises(RegularizerError) as caught:
        await Pipeline(nll, [spec(nested, "outer")]).compute([], guide_logprobs())
    assert caught.value.name == "outer"
    inner = caught.value.__cause__
    assert isinstance(inner, RegularizerError)
    assert inner.name == "base_loss"
    assert isinstance(inner.__cause__, OwnError)


async def test_an_error_that_cannot_be_printed_is_reported_like_others():
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    own = Unprintable()
    with pytest.raises(RegularizerError, match="Unprintable") as caught:
        await Pipeline(nll, [spec(raising(own), "odd")]).compute([], guide_logprobs())
    assert caught.value.__cause__ is own


@pytest.mark.parametrize("is_async", [False, True])
async def test_rows_57_and_119_every_term_has_the_pipelines_timeout(is_async: bool):
    gate = Gate()
    with gate.opening():
        async with asyncio.timeout(LIMIT):
            with pytest.raises(RegularizerTimeout) as caught:
                await Pipeline(async_nll, [spec(for_ever if is_async else gate, "slow")], timeout=SHORT).compute(
                    [], guide_logprobs()
                )
            assert (caught.value.name, caught.value.timeout) == ("slow", SHORT)
            assert isinstance(caught.value, TimeoutError)
            assert "'slow'" in str(caught.value)
            assert str(SHORT) in str(caught.value)
            with pytest.raises(RegularizerTimeout) as caught:
                await Pipeline(for_ever if is_async else gate, timeout=SHORT).compute([], guide_logprobs())
            assert caught.value.name == "base_loss"


async def test_row_86_a_coroutine_has_cleaned_up_when_its_timeout_is_raised():
    term = Cleaning()
    with pytest.raises(RegularizerTimeout):
        await Pipeline(nll, [spec(term, "cleans", timeout=SHORT)]).compute([], guide_logprobs())
    assert term.cleaned


@pytest.mark.parametrize("is_async", [False, True])
async def test_rule_6_a_timeout_error_of_the_term_is_an_ordinary_failure(is_async: bool):
    with pytest.raises(RegularizerError) as caught:
        await Pipeline(nll, [spec(raising(TimeoutError("mine"), is_async), "t")]).compute([], guide_logprobs())
    assert not isinstance(caught.value, RegularizerTimeout)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert caught.value.__cause__.args == ("mine",)


async def test_rule_6_a_term_with_a_timeout_of_its_own():
    async def impatient(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        with anyio.fail_after(SHORT):
            await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def recovers(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        with anyio.move_on_after(SHORT):
            await asyncio.Event().wait()
        return logprobs.sum()

    with pytest.raises(RegularizerError) as caught:
        await Pipeline(nll, [spec(impatient, "impatient")]).compute([], guide_logprobs())
    assert not isinstance(caught.value, RegularizerTimeout)
    assert isinstance(caught.value.__cause__, TimeoutError)
    output = await Pipeline(nll, [spec(recovers, "recovers")], track_grad_norms=True).compute([], guide_logprobs())
    assert output.regularizers["recovers"].differentiable


async def test_a_term_that_swallows_its_timeout_still_timed_out():
    async def stubborn(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return logprobs.sum()

    with pytest.raises(RegularizerTimeout):
        await Pipeline(nll, [spec(stubborn, "stubborn", timeout=SHORT)]).compute([], guide_logprobs())


async def test_a_sibling_that_swallows_its_cancellation_changes_nothing():
    async def stubborn(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return logprobs.sum()

    specs = [spec(stubborn, "stubborn"), spec(raising(OwnError("first"), is_async=True), "fails")]
    with recorded("tinkex.regularizer.compute.*") as events, pytest.raises(RegularizerError) as caught:
        await Pipeline(async_nll, specs).compute([], guide_logprobs())
    assert caught.value.name == "fails"
    assert not hasattr(caught.value, "__notes__")
    ends = [event for event in events if not event.name.endswith("start")]
    assert sorted(event.metadata["regularizer_name"] for event in ends) == ["fails", "stubborn"]


@pytest.mark.parametrize("parallel", [False, True])
async def test_row_125_a_sibling_that_was_cancelled_has_not_failed(parallel: bool):
    clean = Cleaning()

    async def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        if parallel:
            await clean.started.wait()
        raise OwnError("only one")

    specs = [spec(fails, "fails"), spec(clean, "sibling"), spec(async_l2, "l2", on_error="skip")]
    with pytest.raises(RegularizerError) as caught:
        await Pipeline(async_nll, specs, parallel=parallel).compute([], guide_logprobs())
    assert caught.value.name == "fails"
    assert not hasattr(caught.value, "__notes__")


async def test_row_125_the_first_failure_is_raised_the_others_are_notes():
    fails_first = asyncio.Event()

    async def first(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await fails_first.wait()
        raise OwnError("first")

    async def second(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            fails_first.set()
            await asyncio.Event().wait()
        finally:
            raise ValueError("while cleaning up")
        raise AssertionError("unreachable")

    clean = Cleaning()
    specs = [spec(clean, "third"), spec(second, "second"), spec(first, "first")]
    with pytest.raises(RegularizerError) as caught:
        await Pipeline(async_nll, specs).compute([], guide_logprobs())
    assert caught.value.name == "first"
    assert not isinstance(caught.value, BaseExceptionGroup)
    assert any("second" in note and "ValueError" in note for note in caught.value.__notes__)
    assert clean.cleaned


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
async def test_skip_leaves_the_term_out_of_value_gradient_and_output(is_async: bool, parallel: bool):
    specs = [
        spec(l1, "l1", 0.01),
        spec(raising(OwnError("skip me"), is_async), "skipped", 7.0, on_error="skip"),
        spec(async_l2, "l2", 0.005),
    ]
    output = await Pipeline(nll, specs, parallel=parallel, track_grad_norms=True).compute([], guide_logprobs())
    without = await Pipeline(nll, [specs[0], specs[2]], track_grad_norms=True).compute([], guide_logprobs())
    assert output.skipped == {"skipped": "OwnError"}
    assert output.model_copy(update={"skipped": {}}) == without


async def test_skip_reports_the_timeout_even_if_cleaning_up_failed():
    async def untidy(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("cleanup")
        raise AssertionError("unreachable")

    with recorded("tinkex.regularizer.compute.exception") as events:
        output = await Pipeline(nll, [spec(untidy, "untidy", timeout=SHORT, on_error="skip")]).compute(
            [], guide_logprobs()
        )
    assert output.skipped == {"untidy": "RegularizerTimeout"}
    assert [event.metadata["reason"] for event in events] == ["RegularizerTimeout"]


async def test_row_150_the_next_step_succeeds():
    broken = threading.Event()
    broken.set()

    def sometimes(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        if broken.is_set():
            raise OwnError("once")
        return logprobs.sum()

    pipeline = Pipeline(nll, [spec(sometimes, "sometimes")])
    with pytest.raises(TinkexError):
        await pipeline.compute([], guide_logprobs())
    broken.clear()
    assert list((await pipeline.compute([], guide_logprobs())).regularizers) == ["sometimes"]
