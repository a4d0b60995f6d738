"""Retry policies of async terms."""

import asyncio
import random
from typing import Any

import pytest
import tenacity
import torch

from tests.losses.support import async_l2, async_nll, guide_logprobs, l2, names_of, nll, recorded, spec
from tinkex_py import Executor, InPlaceMutation, InvalidSpec, InvalidTermResult, Pipeline, RegularizerError
from tinkex_py.errors import RegularizerTimeout


class Flaky:
    """Fails some times before it works."""

    def __init__(self, failures: int, error: type[BaseException] = ConnectionError) -> None:
        self.failures = failures
        self.error = error
        self.calls = 0

    async def compute(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(f"failure {self.calls}")
        return logprobs.pow(2).sum()


def at_once(attempts: int, **options: Any) -> tenacity.AsyncRetrying:
    return tenacity.AsyncRetrying(stop=tenacity.stop_after_attempt(attempts), wait=tenacity.wait_none(), **options)


@pytest.mark.asyncio
async def test_a_term_is_called_again_until_it_works():
    term = Flaky(2)
    with recorded("tinkex.regularizer.*") as events:
        output = await Pipeline(nll, [spec(term, "flaky", retry=at_once(3))], track_grad_norms=True).compute(
            [], guide_logprobs()
        )
    assert term.calls == 3
    own = output.regularizers["flaky"]
    assert own.attempts == 3
    assert own.value == pytest.approx(6.83, rel=1e-6)
    assert own.grad_norm == pytest.approx(5.2268537, rel=1e-6)
    assert names_of(events) == [
        "tinkex.regularizer.compute.start",
        "tinkex.regularizer.retry",
        "tinkex.regularizer.retry",
        "tinkex.regularizer.compute.stop",
    ]
    assert [event.measurements["attempt"] for event in events[1:3]] == [2, 3]
    assert events[1].metadata == {"regularizer_name": "flaky"}


@pytest.mark.asyncio
@pytest.mark.parametrize("reraise", [False, True])
async def test_the_last_failure_is_the_cause(reraise: bool):
    term = Flaky(9)
    with recorded("tinkex.regularizer.compute.*") as events, pytest.raises(RegularizerError) as caught:
        await Pipeline(nll, [spec(term, "flaky", retry=at_once(2, reraise=reraise))]).compute([], guide_logprobs())
    assert term.calls == 2
    assert caught.value.name == "flaky"
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert str(caught.value.__cause__) == "failure 2"
    assert names_of(events) == ["tinkex.regularizer.compute.start", "tinkex.regularizer.compute.exception"]
    assert events[1].metadata["reason"] == "ConnectionError"


@pytest.mark.asyncio
async def test_a_number_is_a_number_of_calls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(random, "uniform", lambda _low, _high: 0.0)
    term = Flaky(2)
    assert (await Executor.execute_one(spec(term, "flaky", retry=3), [], guide_logprobs())).attempts == 3
    with pytest.raises(RegularizerError):
        await Executor.execute_one(spec(Flaky(1), "flaky", retry=1), [], guide_logprobs())


@pytest.mark.asyncio
async def test_the_policy_chooses_what_is_repeated():
    policy = at_once(5, retry=tenacity.retry_if_exception_type(ConnectionError))
    term = Flaky(3, ValueError)
    with pytest.raises(RegularizerError):
        await Executor.execute_one(spec(term, "flaky", retry=policy), [], guide_logprobs())
    assert term.calls == 1


@pytest.mark.asyncio
async def test_a_policy_may_look_at_the_result_and_be_async():
    calls = 0

    async def rising(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return logprobs.sum() * 0 + calls

    async def too_small(state: tenacity.RetryCallState) -> bool:
        assert state.outcome is not None
        return bool(state.outcome.result() < 3)

    output = await Executor.execute_one(spec(rising, "rising", retry=at_once(5, retry=too_small)), [], guide_logprobs())
    assert output.value == 3.0
    by_result = at_once(2, retry=tenacity.retry_if_result(lambda result: True))
    with pytest.raises(RegularizerError, match="RetryError"):
        await Executor.execute_one(spec(rising, "rising", retry=by_result), [], guide_logprobs())


@pytest.mark.asyncio
async def test_a_cancellation_is_never_repeated():
    started = asyncio.Event()
    calls = 0

    async def waits(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        started.set()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    policy = at_once(5, retry=tenacity.retry_always)
    task = asyncio.create_task(Pipeline(async_nll, [spec(waits, "waits", retry=policy)]).compute([], guide_logprobs()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == 1


@pytest.mark.asyncio
async def test_the_timeout_covers_all_attempts():
    policy = tenacity.AsyncRetrying(wait=tenacity.wait_fixed(1000))
    with pytest.raises(RegularizerTimeout):
        await Executor.execute_one(spec(Flaky(9), "flaky", retry=policy, timeout=0.01), [], guide_logprobs())


@pytest.mark.asyncio
async def test_spoilt_logprobs_and_wrong_results_are_not_repeated():
    calls = 0

    async def writes(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logprobs.detach()
        with torch.no_grad():
            logprobs.add_(1.0)
        raise ConnectionError

    with pytest.raises(InPlaceMutation):
        await Executor.execute_one(spec(writes, "writes", retry=at_once(4)), [], guide_logprobs())
    wrong = spec(lambda data, logprobs: logprobs.sum(), "wrong", is_async=True, retry=at_once(4))
    with pytest.raises(InvalidTermResult):
        await Executor.execute_one(wrong, [], guide_logprobs())
    assert calls == 1


@pytest.mark.asyncio
async def test_one_policy_serves_many_terms_at_once():
    policy = at_once(3)
    terms = [Flaky(2) for _ in range(5)]
    outputs = await Executor.execute_all(
        [spec(term, f"t{index}", retry=policy) for index, term in enumerate(terms)], [], guide_logprobs()
    )
    assert [output.attempts for output in outputs] == [3] * 5


@pytest.mark.parametrize("retry", [0, -1, True, 1.5, "3", tenacity.Retrying()])
def test_what_is_no_policy_is_refused(retry: Any):
    with pytest.raises(InvalidSpec, match="'flaky'.*retry"):
        spec(async_l2, "flaky", retry=retry)


def test_sync_terms_have_no_policy():
    with pytest.raises(InvalidSpec, match="retry is only supported for async terms"):
        spec(l2, "l2", retry=3)
    assert spec(lambda *given: async_l2(*given), "l2", retry=3, is_async=True).retry == 3  # noqa: PLW0108


@pytest.mark.asyncio
async def test_a_skipped_term_has_had_its_attempts():
    term = Flaky(9)
    output = await Pipeline(nll, [spec(term, "flaky", retry=at_once(3), on_error="skip")]).compute([], guide_logprobs())
    assert output.skipped == {"flaky": "ConnectionError"}
    assert term.calls == 3
