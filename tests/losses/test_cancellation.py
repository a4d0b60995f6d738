"""Rule 5 of running terms, row 120 of the guide: cancellation and fatal errors."""

import asyncio
from typing import Any

import pytest
import torch

from tests.losses.failing_terms import SHORT, Cleaning, OwnBaseError, OwnError, for_ever, raising
from tests.losses.support import LIMIT, Gate, async_l2, async_nll, guide_logprobs, nll, recorded, spec, until
from tinkex_py import (
    Pipeline,
    RegularizerError,
    RegularizerTimeout,
    TinkexError,
)

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(("is_async", "parallel"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("fatal", [KeyboardInterrupt, SystemExit, OwnBaseError])
async def test_row_120_fatal_errors_cancel_the_siblings_and_come_out_unchanged(
    fatal: type[BaseException], parallel: bool, is_async: bool
):
    sibling = Cleaning()
    error = fatal("now")

    async def after_the_sibling(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        if parallel:
            await sibling.started.wait()
        raise error

    specs = [spec(after_the_sibling if is_async else raising(error), "fatal"), spec(sibling, "sibling")]
    with recorded() as events, pytest.raises((fatal, RegularizerError)) as caught:
        await Pipeline(async_nll, specs, parallel=parallel).compute([], guide_logprobs())
    if fatal is not OwnBaseError:
        assert caught.value is error
    assert caught.value is error or caught.value.__cause__ is error
    assert sibling.cleaned == sibling.started.is_set()
    assert events[-1].name == "tinkex.custom_loss.exception"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
async def test_row_120_a_cancellation_nobody_asked_for(is_async: bool, parallel: bool):
    specs = [spec(raising(asyncio.CancelledError("odd"), is_async), "odd")]
    with pytest.raises(RegularizerError) as caught:
        await Pipeline(async_nll, specs, parallel=parallel).compute([], guide_logprobs())
    assert caught.value.name == "odd"
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("parallel", [False, True])
async def test_row_120_a_term_that_cancels_its_own_task(parallel: bool):
    async def cancels_itself(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        raise AssertionError("unreachable")

    with pytest.raises(RegularizerError) as caught:
        await Pipeline(async_nll, [spec(cancels_itself, "odd")], parallel=parallel).compute([], guide_logprobs())
    assert caught.value.name == "odd"
    output = await Pipeline(async_nll, [spec(cancels_itself, "odd", on_error="skip")]).compute([], guide_logprobs())
    assert list(output.skipped) == ["odd"]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("term", ["coroutine", "thread"])
async def test_rule_5_a_timeout_around_compute_fires(term: str, parallel: bool):
    gate = Gate()
    with gate.opening():
        fn = for_ever if term == "coroutine" else gate
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(SHORT):
                await Pipeline(async_nll, [spec(fn, "slow")], parallel=parallel).compute([], guide_logprobs())
    assert not isinstance(caught.value, TinkexError)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
    await until(lambda: gate.running == 0)


async def test_rule_5_cancellation_wins_and_failures_become_its_notes():
    """The term answers the caller's cancellation with an error of its own: that must not swallow the cancellation."""

    async def fails_when_cancelled(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            await asyncio.Event().wait()
        finally:
            raise OwnError("while leaving")
        raise AssertionError("unreachable")

    seen: list[BaseException] = []

    async def step() -> None:
        try:
            await Pipeline(async_nll, [spec(fails_when_cancelled, "untidy")]).compute([], guide_logprobs())
        except BaseException as error:
            seen.append(error)
            raise

    with recorded() as events, pytest.raises(TimeoutError):
        async with asyncio.timeout(SHORT):
            await step()
    (error,) = seen
    assert isinstance(error, asyncio.CancelledError)
    assert any("untidy" in note and "OwnError" in note for note in error.__notes__)
    assert (events[-1].name, events[-1].metadata["reason"]) == ("tinkex.custom_loss.exception", "CancelledError")


@pytest.mark.parametrize("parallel", [False, True])
async def test_rule_5_a_cancelled_caller_leaves_everything_clean(parallel: bool):
    term = Cleaning()
    before = asyncio.all_tasks()
    computing = asyncio.ensure_future(
        Pipeline(async_nll, [spec(term, "cleans")], parallel=parallel).compute([], guide_logprobs())
    )
    await term.started.wait()
    computing.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await computing
    assert computing.cancelled()
    assert not hasattr(caught.value, "__notes__")  # a term that was merely cancelled has not failed
    assert term.cleaned
    assert asyncio.all_tasks() == before


async def test_fatal_errors_are_never_skipped():
    with pytest.raises(SystemExit):
        await Pipeline(nll, [spec(raising(SystemExit(3)), "t", on_error="skip")]).compute([], guide_logprobs())


async def test_row_120_a_fatal_error_wins_over_ordinary_failures():
    """Ctrl-C must not end as a note of some other error."""
    waits = asyncio.Event()

    async def leaves_with_an_interrupt(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            waits.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        raise AssertionError("unreachable")

    async def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await waits.wait()
        raise OwnError("first")

    with pytest.raises(KeyboardInterrupt):
        await Pipeline(nll, [spec(leaves_with_an_interrupt, "b"), spec(fails, "a")]).compute([], guide_logprobs())


async def test_row_120_a_term_that_somebody_cancels_before_it_starts():
    def sibling_task() -> Any:
        return next(task for task in asyncio.all_tasks() if task.get_name() == "tinkex.regularizer.victim")

    async def cancels_its_sibling(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        sibling_task().cancel()
        return logprobs.sum()

    with pytest.raises(RegularizerError) as caught:
        await Pipeline(cancels_its_sibling, [spec(async_l2, "victim")]).compute([], guide_logprobs())
    assert caught.value.name == "victim"


# What goes on although it was asked to end


class Stubborn:
    """A coroutine term that goes on after every cancellation, and notes how it was ended at last."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancellations = 0
        self.closed = False

    async def compute(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            while True:
                self.started.set()
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancellations += 1
        except GeneratorExit:
            self.closed = True
            raise


async def test_rule_5_a_term_that_swallows_its_timeout_is_left_after_its_grace():
    term = Stubborn()
    async with asyncio.timeout(LIMIT):
        with pytest.raises(RegularizerTimeout) as caught:
            await Pipeline(nll, [spec(term, "stubborn", timeout=SHORT)], cancel_grace=SHORT).compute(
                [], guide_logprobs()
            )
    assert caught.value.name == "stubborn"
    assert (term.cancellations, term.closed) == (1, True)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("form", ["object", "plain function"])
async def test_rule_5_a_term_that_swallows_the_end_of_its_siblings_is_left_after_its_grace(form: str):
    term = Stubborn()

    async def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await term.started.wait()
        raise OwnError("first")

    def returns_it(data: Any, logprobs: torch.Tensor) -> Any:
        return term.compute(data, logprobs)

    stubborn: Any = term if form == "object" else returns_it
    before = asyncio.all_tasks()
    async with asyncio.timeout(LIMIT):
        with pytest.raises(RegularizerError) as caught:
            await Pipeline(async_nll, [spec(stubborn, "stubborn"), spec(fails, "fails")], cancel_grace=SHORT).compute(
                [], guide_logprobs()
            )
    assert caught.value.name == "fails"
    assert not hasattr(caught.value, "__notes__")
    assert (term.cancellations, term.closed) == (1, True)
    assert asyncio.all_tasks() == before


async def test_rule_5_a_term_that_swallows_the_callers_cancellation_is_left_after_its_grace():
    term = Stubborn()
    computing = asyncio.ensure_future(
        Pipeline(async_nll, [spec(term, "stubborn")], cancel_grace=SHORT).compute([], guide_logprobs())
    )
    await term.started.wait()
    computing.cancel()
    async with asyncio.timeout(LIMIT):
        with pytest.raises(asyncio.CancelledError):
            await computing
    assert (term.cancellations, term.closed) == (1, True)


async def test_rule_5_a_terms_own_timeouts_need_no_grace():
    """A cancellation that the term itself asked for is not final, however long it takes to clean up after it."""

    async def recovers(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            async with asyncio.timeout(0):
                try:
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(3 * SHORT)
        except TimeoutError:
            await asyncio.sleep(3 * SHORT)
        return logprobs.sum()

    output = await Pipeline(nll, [spec(recovers, "recovers")], cancel_grace=SHORT).compute([], guide_logprobs())
    assert list(output.regularizers) == ["recovers"]


async def test_rule_5_a_term_that_refuses_to_be_closed_is_left_too():
    attempts = 0

    async def refuses(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        nonlocal attempts
        while attempts < 3:
            try:
                await asyncio.Event().wait()
            except BaseException:  # noqa: BLE001  # that is the point
                attempts += 1
        return logprobs.sum()

    async with asyncio.timeout(LIMIT):
        with pytest.raises(RegularizerTimeout):
            await Pipeline(nll, [spec(refuses, "refuses", timeout=SHORT)], cancel_grace=SHORT).compute(
                [], guide_logprobs()
            )
