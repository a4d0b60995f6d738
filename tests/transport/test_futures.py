"""Waiting for a future: what each answer of the service means, and how often it is asked."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tinkex_py import limits, telemetry
from tinkex_py.errors import (
    Authentication,
    BillingRequired,
    Conflict,
    ConnectionFailed,
    InvalidResponse,
    PermissionDenied,
    RequestFailed,
    ResultLost,
    ServerError,
    TimeoutExceeded,
    TinkexError,
)
from tinkex_py.limits import RetryPolicy
from tinkex_py.transport import api as service_api
from tinkex_py.transport.api import RETRIEVE_FUTURE, ServiceApi
from tinkex_py.transport.auth import Auth
from tinkex_py.transport.decoding import Result
from tinkex_py.transport.messages import NO_SECRET, Request, Response, Secret

pytestmark = pytest.mark.asyncio
RETRY = RetryPolicy(deadline=30.0, initial_wait=0.0, max_wait=0.0)
PROTOBUF = "application/x-protobuf"


def told(status: int = 200, fields: Any = None, **headers: str) -> Response:
    body = b"" if fields is None else json.dumps(fields).encode()
    sent = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Response(status=status, headers=sent, body=body)


PENDING = [
    told(408),
    told(408, {"queue_state": "active"}),
    Response(408, {}, b"<html>"),
    told(200, {"type": "try_again", "queue_state": "active"}),
    told(200, {"status": "pending"}),
    told(200, {"status": "queued"}),
    told(200, {"status": "running"}),
]
DONE = told(200, {"metrics": {}, "type": "optim_step"})


class Asking:
    """A service that gives one answer after the other, the last one for ever. Time passes only in pauses."""

    def __init__(self, *answers: Response | TinkexError) -> None:
        self.answers = list(answers)
        self.iterations: list[int] = []
        self.signs_of_life = 0
        self.is_alive = False

    async def exchange(self, sent: Request, *, key: Secret = NO_SECRET, attempt: int = 1) -> Response:
        if sent.path != RETRIEVE_FUTURE:  # the sign of life that is asked for where a poll took too long
            self.signs_of_life += 1
            if not self.is_alive:
                raise ConnectionFailed("dead")
            return Response(200, {}, b"")
        self.iterations.append(int(sent.headers["x-tinker-request-iteration"]))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, TinkexError):
            raise answer
        return answer


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which takes time."""
    made: list[float] = []

    class Timeless:
        """asyncio, but nobody sleeps."""

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        async def sleep(self, seconds: float) -> None:
            made.append(seconds)
            await asyncio.sleep(0)

    monkeypatch.setattr(service_api, "asyncio", Timeless())
    monkeypatch.setattr(limits, "asyncio", Timeless())
    return made


async def waited(
    asking: Asking,
    retry: RetryPolicy = RETRY,
    decode: Callable[[Result], Any] = lambda result: result,
    billing_pause: float = 0.0,
) -> Any:
    http: Any = asking
    api = ServiceApi(http, http, Auth(Secret("key"), Secret("")), retry=retry, poll_timeout=10.0)
    api.billing.longest = billing_pause
    return await api.result("r1", "OptimStep", decode)


@pytest.mark.parametrize("pending", PENDING)
async def test_not_yet_is_asked_again_with_a_growing_pause(pauses, pending):
    asking = Asking(*[pending] * 9, DONE)
    assert (await waited(asking)).fields == {"metrics": {}, "type": "optim_step"}
    assert asking.iterations == list(range(10))
    assert len(pauses) == 9, "a service that answers at once is never asked again at once"
    assert pauses == sorted(pauses)
    assert pauses[0] >= 0.05
    assert pauses[-1] == 2.0


async def test_polling_never_spins():
    """By number, not by time: against a service that says "not yet" at once, 0.7 s hold a handful of polls."""
    asking = Asking(told(408))
    waiting = asyncio.create_task(waited(asking))
    await asyncio.wait([waiting], timeout=0.7)
    assert 2 <= len(asking.iterations) <= 6
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_errors_never_spin(monkeypatch):
    retry = RetryPolicy(deadline=60.0, initial_wait=0.5, max_wait=30.0)
    for trouble in (told(503), ConnectionFailed("reset"), told(429), told(500, x_should_retry="true")):
        asking = Asking(trouble)
        waiting = asyncio.create_task(waited(asking, retry))
        await asyncio.wait([waiting], timeout=0.3)
        assert 1 <= len(asking.iterations) <= 3, trouble
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_retry_after_is_obeyed(pauses):
    asking = Asking(told(503, retry_after="7"), told(429, retry_after="3"), DONE)
    await waited(asking)
    assert pauses == [7.0, 3.0]


@pytest.mark.parametrize("asked", [{"retry_after": "0"}, {"retry_after_ms": "0.001"}, {"retry_after": "-1"}])
async def test_a_service_cannot_ask_to_be_polled_at_network_speed(pauses, asked):
    retry = RetryPolicy(deadline=1e9, initial_wait=1000.0, max_wait=1000.0)
    await waited(Asking(*[told(503, **asked)] * 30, DONE), retry)
    assert sum(pauses) > 1000.0  # 30 draws from 0 to 1000 s: below it by chance with odds of 1e-32


async def test_pauses_are_random_below_an_exponential_bound(pauses):
    retry = RetryPolicy(deadline=1e9, initial_wait=1.0, max_wait=8.0)
    for _ in range(60):
        await waited(Asking(*[ConnectionFailed("reset")] * 5, DONE), retry)
    for attempt, longest in enumerate((1.0, 2.0, 4.0, 8.0, 8.0)):
        drawn = sorted(pauses[attempt::5])
        assert 0.0 <= drawn[0] < 0.25 * longest  # missed by chance: 0.75**60, about 3e-8
        assert 0.75 * longest < drawn[-1] <= longest


async def test_no_pause_that_ends_after_the_deadline_is_begun(pauses):
    asking = Asking(told(503, retry_after="50"))
    with pytest.raises(ServerError) as caught:
        await waited(asking, RetryPolicy(deadline=20.0))
    assert caught.value.retry_after == 50.0
    assert pauses == []
    assert asking.iterations == [0]


async def test_protobuf_and_json_by_content_type(pauses):
    for kind in (PROTOBUF, f"{PROTOBUF}; charset=utf-8", "Application/X-Protobuf"):
        result = await waited(Asking(Response(200, {"content-type": kind}, b"\x01\x02")))
        assert result == Result(b"\x01\x02", None), kind
    # Bytes that happen to be JSON are protobuf if the service says so.
    result = await waited(Asking(Response(200, {"content-type": PROTOBUF}, b'{"error": "no"}')))
    assert result.fields is None
    # An error status is not a result, whatever its type.
    with pytest.raises(Authentication):
        await waited(Asking(Response(401, {"content-type": PROTOBUF}, b"\x01")))
    assert (await waited(Asking(DONE))).body == b""


async def test_a_nested_result_is_unwrapped(pauses):
    nested = told(200, {"status": "completed", "result": {"metrics": {"a": 1.0}}})
    assert (await waited(Asking(nested))).fields == {"metrics": {"a": 1.0}}
    failed = told(200, {"status": "completed", "result": {"error": "inside", "category": "user"}})
    with pytest.raises(RequestFailed, match="inside"):
        await waited(Asking(failed))


@pytest.mark.parametrize("status", [[], {}, 5, True, "odd"])
async def test_a_status_of_any_kind_that_says_nothing_is_part_of_the_result(pauses, status):
    assert (await waited(Asking(told(200, {"status": status, "path": "p"})))).fields == {"status": status, "path": "p"}


async def test_an_error_that_is_null_is_none(pauses):
    assert (await waited(Asking(told(200, {"error": None, "path": "p"})))).fields == {"error": None, "path": "p"}


@pytest.mark.parametrize(
    ("category", "expected"),
    [
        ("user", "user"),
        ("server", "server"),
        ("unknown", "unknown"),
        ("USER", "unknown"),
        (None, "unknown"),
        (3, "unknown"),
        ([], "unknown"),
    ],
)
async def test_a_failed_request_is_final(pauses, category, expected):
    asking = Asking(told(200, {"error": "too long", "category": category}))
    with pytest.raises(RequestFailed, match=r"OptimStep.*too long") as caught:
        await waited(asking)
    assert caught.value.category == expected
    assert caught.value.request_id == "r1"
    assert asking.iterations == [0]


@pytest.mark.parametrize("error", ["", False, 0, {"code": 3}])
async def test_any_error_that_is_not_null_is_a_failure(pauses, error):
    with pytest.raises(RequestFailed):
        await waited(Asking(told(200, {"error": error})))


async def test_a_400_is_asked_again_once(pauses):
    asking = Asking(told(400, {"detail": "which future?"}), DONE)
    await waited(asking)
    assert asking.iterations == [0, 1]
    asking = Asking(told(400, {"detail": "bad data", "category": "user"}))
    with pytest.raises(RequestFailed, match="bad data") as caught:
        await waited(asking)
    assert asking.iterations == [0, 1]
    assert caught.value.category == "user"


@pytest.mark.parametrize("body", [b"plain words", b"", b"[1]", b'{"detail": [{"msg": "odd"}]}'])
async def test_a_400_with_any_body_is_a_failed_request(pauses, body):
    with pytest.raises(RequestFailed):
        await waited(Asking(Response(400, {}, body)))


@pytest.mark.parametrize("status", [404, 410])
async def test_a_result_that_is_gone(pauses, status):
    asking = Asking(told(status, {"detail": "which future?"}))
    with pytest.raises(ResultLost, match="lost") as caught:
        await waited(asking)
    assert asking.iterations == [0]
    assert caught.value.request_id == "r1"
    assert "create_training_client_from_state" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error_class"),
    [(401, Authentication), (402, BillingRequired), (403, PermissionDenied), (409, Conflict), (422, RequestFailed)],
)
async def test_other_refusals_are_final(pauses, status, error_class):
    asking = Asking(told(status, {"detail": "no"}))
    with pytest.raises(error_class):
        await waited(asking)
    assert asking.iterations == [0]


@pytest.mark.parametrize(
    "trouble",
    [told(500), told(502), told(503), told(429), ConnectionFailed("x"), TimeoutExceeded("y"), InvalidResponse("z")],
)
async def test_passing_troubles_are_waited_out(pauses, trouble):
    asking = Asking(*[trouble] * 4, DONE)
    await waited(asking)
    assert len(asking.iterations) == 5


async def test_troubles_are_counted_anew_after_an_answer(pauses):
    retry = RetryPolicy(deadline=30.0, max_attempts=3, initial_wait=0.0)
    asking = Asking(told(500), told(500), told(408), told(500), told(500), DONE)
    await waited(asking, retry)
    asking = Asking(told(500))
    with pytest.raises(ServerError):
        await waited(asking, retry)
    assert len(asking.iterations) == 3


async def test_a_success_that_is_no_json_is_an_error_in_the_end(pauses):
    retry = RetryPolicy(deadline=30.0, max_attempts=3, initial_wait=0.0)
    for body in (b"<html>", b"[]", b"3"):
        with pytest.raises(InvalidResponse):
            await waited(Asking(Response(200, {"content-type": "text/html"}, body)), retry)


async def test_a_result_that_cannot_be_read_is_fetched_again(pauses):
    def decode(result: Result) -> Any:
        if result.fields == {"half": True}:
            raise InvalidResponse("torn")
        return result.fields

    asking = Asking(told(200, {"half": True}), told(200, {"half": True}), DONE)
    assert (await waited(asking, decode=decode))["type"] == "optim_step"
    assert asking.iterations == [0, 1, 2]
    retry = RetryPolicy(deadline=30.0, max_attempts=2, initial_wait=0.0)
    with pytest.raises(InvalidResponse, match="torn"):
        await waited(Asking(told(200, {"half": True})), retry, decode)


async def test_the_queue_state_is_told_once_per_change(pauses):
    events: list[Any] = []
    telemetry.attach(events.append, events="tinkex.future.queue_state")
    states = ["active", "active", "paused_capacity", "paused_capacity", "active", None, "active"]
    answers = [told(408, {"queue_state": state} if state else None) for state in states]
    answers[3] = told(200, {"type": "try_again", "queue_state": "paused_capacity", "queue_state_reason": "full"})
    await waited(Asking(*answers, DONE))
    assert [event.metadata["queue_state"] for event in events] == ["active", "paused_capacity", "active"]
    assert all(event.metadata["request_id"] == "r1" for event in events)


async def test_start_then_stop_or_exception(pauses):
    names: list[str] = []
    telemetry.attach(lambda event: names.append(event.name), events="tinkex.future.*")
    await waited(Asking(DONE))
    with pytest.raises(RequestFailed):
        await waited(Asking(told(200, {"error": "x"})))
    assert names == ["tinkex.future.start", "tinkex.future.stop", "tinkex.future.start", "tinkex.future.exception"]


async def test_a_poll_that_takes_long_is_no_trouble_where_the_service_answers_otherwise(pauses):
    """Some services hold a poll for longer than we do, and that for as long as a compilation takes."""
    asking = Asking(*[TimeoutExceeded("slow")] * 20, DONE)
    asking.is_alive = True
    await waited(asking, RetryPolicy(deadline=30.0, max_attempts=3, initial_wait=0.0))
    assert asking.signs_of_life == 20


async def test_a_service_that_answers_nothing_at_all_is_a_trouble(pauses):
    asking = Asking(TimeoutExceeded("slow"))
    with pytest.raises(TimeoutExceeded):
        await waited(asking, RetryPolicy(deadline=30.0, max_attempts=3, initial_wait=0.0))
    assert len(asking.iterations) == 3


async def test_metadata_alone_is_not_the_result(pauses):
    asking = Asking(told(200, {"status": "complete_metadata", "response_payload_size": 9}), DONE)
    await waited(asking)
    assert asking.iterations == [0, 1]


@pytest.mark.parametrize("detail", ["bad data", {"loc": ["data"]}])
async def test_a_422_is_a_failed_request_at_once(pauses, detail):
    asking = Asking(told(422, {"detail": detail}))
    with pytest.raises(RequestFailed, match=r"data") as caught:
        await waited(asking)
    assert asking.iterations == [0]
    assert caught.value.request_id == "r1"


async def test_payment_is_waited_for_and_then_demanded(pauses):
    asking = Asking(*[told(402, retry_after="2")] * 3, DONE)
    assert (await waited(asking, billing_pause=3600.0)).fields == {"metrics": {}, "type": "optim_step"}
    with pytest.raises(BillingRequired):
        await waited(Asking(told(402)))
