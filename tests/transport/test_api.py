"""Which failures are retried, how long the client waits between attempts, and when it gives up."""

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tinkex_py import errors
from tinkex_py.limits import Attempts, RetryPolicy
from tinkex_py.transport.api import ServiceApi
from tinkex_py.transport.auth import Auth
from tinkex_py.transport.failures import status_error
from tinkex_py.transport.messages import Request, Response, Secret, request

AT_ONCE = RetryPolicy(initial_wait=0.0, max_wait=0.0)


class Script:
    """Returns or raises the outcomes in order, and repeats the last one."""

    def __init__(self, *outcomes: Response | BaseException) -> None:
        self.outcomes = list(outcomes)
        self.attempts: list[int] = []

    async def __call__(self, attempt: int) -> Response:
        self.attempts.append(attempt)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        await asyncio.sleep(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


async def stalls(_attempt: int) -> Response:
    await asyncio.Event().wait()
    raise AssertionError


async def send_with_retry(
    policy: RetryPolicy,
    script: Callable[[int], Awaitable[Response]],
    retry_statuses: Callable[[int], bool] | None = None,
) -> Response:
    class Http:
        host = "scripted"

        async def exchange(self, sent: Request, *, key: Secret, attempt: int) -> Response:
            return await script(attempt)

    http: Any = Http()
    api = ServiceApi(http, http, Auth(Secret("key"), Secret("")), retry=policy, poll_timeout=1.0)
    return await api.send(request("POST", "/x"), lambda response: response, retry_statuses=retry_statuses)


def status(code: int, **headers: str) -> Response:
    return Response(code, {name.replace("_", "-"): value for name, value in headers.items()}, b"")


OK = status(200)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "failure",
    [
        *(status(code) for code in (408, 425, 429, 500, 503, 599)),
        status(404, x_should_retry="true"),
        status(503, x_should_retry="maybe"),
        status(503, retry_after="nan"),
        errors.ConnectionFailed("x"),
        errors.TimeoutExceeded("x"),
        errors.InvalidResponse("x"),
    ],
)
async def test_what_is_worth_another_attempt(failure: Response | BaseException):
    send = Script(failure, failure, OK)
    assert await send_with_retry(AT_ONCE, send) is OK
    assert send.attempts == [1, 2, 3]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("final", "kind"),
    [
        (status(400), errors.BadRequest),
        (status(401), errors.Authentication),
        (status(404), errors.MissingEndpoint),
        (status(409), errors.Conflict),
        (status(409, x_should_retry="true"), errors.Conflict),
        (status(410), errors.APIStatusError),
        (status(422), errors.Unprocessable),
        (status(307), errors.APIStatusError),
        (status(503, x_should_retry="false"), errors.ServerError),
        (status(429, x_should_retry=" FALSE "), errors.RateLimited),
        (errors.ClientClosed("x"), errors.ClientClosed),
        (errors.InvalidData("x"), errors.InvalidData),
        (ZeroDivisionError(), ZeroDivisionError),
        (TimeoutError(), TimeoutError),
        (asyncio.CancelledError(), asyncio.CancelledError),
    ],
)
async def test_what_is_final(final: Response | BaseException, kind: type[BaseException]):
    send = Script(final)
    with pytest.raises(kind) as caught:
        await send_with_retry(AT_ONCE, send)
    assert type(caught.value) is kind
    assert send.attempts == [1]


@pytest.mark.asyncio
async def test_a_caller_can_choose_the_statuses():
    assert await send_with_retry(AT_ONCE, Script(status(404), OK), lambda code: code == 404) is OK
    with pytest.raises(errors.ServerError):
        await send_with_retry(AT_ONCE, Script(status(503)), lambda code: False)


@pytest.mark.asyncio
async def test_the_last_error_counts_the_attempts():
    policy = RetryPolicy(max_attempts=3, initial_wait=0.0)
    with pytest.raises(errors.ServerError) as caught:
        await send_with_retry(policy, Script(status(500), status(502), status(503)))
    assert (caught.value.status, caught.value.attempts) == (503, 3)
    assert "after 3 attempts" in str(caught.value)
    assert type(pickle.loads(pickle.dumps(caught.value))) is errors.ServerError
    last = errors.ConnectionFailed("last")
    with pytest.raises(errors.ConnectionFailed) as lost:
        await send_with_retry(policy, Script(status(500), status(500), last))
    assert lost.value is last
    assert lost.value.attempts == 3
    with pytest.raises(errors.ServerError) as caught:
        await send_with_retry(RetryPolicy.none(), Script(status(503)))
    assert caught.value.attempts == 1


# Deadline and cancellation


@pytest.mark.asyncio
async def test_the_deadline_ends_an_attempt_that_stalls():
    with pytest.raises(errors.TimeoutExceeded, match=r"deadline of 0\.02 s \(1 attempt"):
        await send_with_retry(RetryPolicy(deadline=0.02), stalls)


@pytest.mark.asyncio
async def test_the_deadline_ends_the_retries_with_the_last_error():
    sent: list[int] = []

    async def responds_at_once(attempt: int) -> Response:
        # Without a suspension the deadline cannot expire during an attempt, only between two.
        sent.append(attempt)
        return status(503)

    with pytest.raises(errors.ServerError) as caught:
        await send_with_retry(RetryPolicy(deadline=0.05, initial_wait=0.001, max_wait=0.001), responds_at_once)
    assert caught.value.attempts == len(sent) > 1


@pytest.mark.asyncio
@pytest.mark.parametrize("wait", ["50", "19.9"])
async def test_a_wait_that_would_end_at_the_deadline_or_after_it_does_not_start(wait: str):
    send = Script(status(503, retry_after=wait))
    async with asyncio.timeout(10):
        with pytest.raises(errors.ServerError) as caught:
            await send_with_retry(RetryPolicy(deadline=20.0), send)
    assert caught.value.retry_after == float(wait)
    assert send.attempts == [1]


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["in an attempt", "in a wait"])
async def test_a_cancellation_ends_it_at_once(where: str):
    reached = asyncio.Event()

    async def send(attempt: int) -> Response:
        reached.set()
        return await stalls(attempt) if where == "in an attempt" else status(503, retry_after="50")

    task = asyncio.create_task(send_with_retry(RetryPolicy(), send))
    await reached.wait()
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.asyncio
async def test_a_cancellation_that_coincides_with_the_deadline_wins():
    """The caller's own timeout expires in the same iteration of the loop as the deadline: it must still fire."""

    async def cancel_at_the_deadline() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.01, task.cancel)
        await send_with_retry(RetryPolicy(deadline=0.01), stalls)

    for task in [asyncio.create_task(cancel_at_the_deadline()) for _ in range(20)]:
        with pytest.raises(asyncio.CancelledError):
            await task
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.01):
            await send_with_retry(RetryPolicy(deadline=30.0), stalls)
    assert type(caught.value) is TimeoutError


# Waits


def pauses_after(policy: RetryPolicy, outcome: Response, count: int = 1) -> list[float]:
    """Returns the pauses after each of several failures in a row."""
    failure = status_error(outcome)

    async def drawn() -> list[float]:
        attempts = Attempts(policy)
        return [pause for _ in range(count) if (pause := attempts.next_pause(failure)) is not None]

    return asyncio.run(drawn())


@pytest.mark.parametrize(
    ("headers", "expected"),
    [({"retry_after": "7"}, 7.0), ({"retry_after_ms": "20"}, 0.02), ({"retry_after": "1e9"}, 60.0)],
)
def test_the_wait_that_the_service_asks_for(headers: dict[str, str], expected: float):
    policy = RetryPolicy(deadline=1e9, initial_wait=1000.0, max_wait=1000.0)
    assert pauses_after(policy, status(503, **headers)) == [expected]


@pytest.mark.parametrize("asked", ["0", "-1", "inf", "garbage", "", "0.000001", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_service_cannot_ask_to_be_asked_at_network_speed(asked: str):
    policy = RetryPolicy(deadline=1e9, initial_wait=1000.0, max_wait=1000.0)
    for headers in ({"retry_after": asked}, {"retry_after_ms": asked}):
        # Drawn from 0 to 1000 s: below a microsecond with a probability of 1e-9.
        assert pauses_after(policy, status(503, **headers))[0] > 1e-6


def test_full_jitter_spreads_over_the_whole_range():
    drawn = sorted(pauses_after(RetryPolicy(initial_wait=1.0, max_wait=1.0), status(503), 200))
    # 200 uniform draws miss the lower or the upper fifth with a probability of 2 * 0.8**200, about 1e-19.
    assert 0.0 <= drawn[0] < 0.2
    assert 0.8 < drawn[-1] <= 1.0
