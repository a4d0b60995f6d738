"""Polling a future: the meaning of each response, and the pauses between polls."""

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
THREE_ATTEMPTS = RetryPolicy(deadline=30.0, max_attempts=3, initial_wait=0.0)
PROTOBUF = "application/x-protobuf"


def reply(status: int = 200, fields: Any = None, **headers: str) -> Response:
    body = b"" if fields is None else json.dumps(fields).encode()
    sent = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Response(status=status, headers=sent, body=body)


DONE = reply(200, {"metrics": {}, "type": "optim_step"})


class Service:
    """Returns or raises the replies in order, and repeats the last one. Time passes only in pauses."""

    def __init__(self, *replies: Response | TinkexError) -> None:
        self.replies = list(replies)
        self.iterations: list[int] = []
        self.health_checks = 0
        self.is_alive = False

    async def exchange(self, sent: Request, *, key: Secret = NO_SECRET, attempt: int = 1) -> Response:
        if sent.path != RETRIEVE_FUTURE:  # the health check after a poll that took too long
            self.health_checks += 1
            if not self.is_alive:
                raise ConnectionFailed("dead")
            return Response(200, {}, b"")
        self.iterations.append(int(sent.headers["x-tinker-request-iteration"]))
        one = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(one, TinkexError):
            raise one
        return one


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses so far, none of which takes time."""
    made: list[float] = []

    class Timeless:
        """asyncio without sleeping."""

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        async def sleep(self, seconds: float) -> None:
            made.append(seconds)
            await asyncio.sleep(0)

    monkeypatch.setattr(service_api, "asyncio", Timeless())
    monkeypatch.setattr(limits, "asyncio", Timeless())
    return made


async def result_of(
    *replies: Response | TinkexError,
    service: Service | None = None,
    retry: RetryPolicy = RETRY,
    decode: Callable[[Result], Any] = lambda result: result,
    billing_pause: float = 0.0,
) -> Any:
    http: Any = service or Service(*replies)
    api = ServiceApi(http, http, Auth(Secret("key"), Secret("")), retry=retry, poll_timeout=10.0)
    api.billing.longest = billing_pause
    return await api.result("r1", "OptimStep", decode)


# Pending


@pytest.mark.parametrize(
    "pending",
    [
        reply(408),
        reply(408, {"queue_state": "active"}),
        Response(408, {}, b"<html>"),
        reply(200, {"type": "try_again", "queue_state": "active"}),
        *(reply(200, {"status": status}) for status in ("pending", "queued", "running")),
    ],
)
async def test_not_yet_is_asked_again_with_a_growing_pause(pauses, pending):
    service = Service(*[pending] * 9, DONE)
    assert (await result_of(service=service)).fields == {"metrics": {}, "type": "optim_step"}
    assert service.iterations == list(range(10))
    assert len(pauses) == 9, "a service that responds at once is never polled again at once"
    assert pauses == sorted(pauses)
    assert pauses[0] >= 0.05
    assert pauses[-1] == 2.0


async def test_polling_never_spins(pauses):
    """A service that responds "pending" at once for a minute gets about one poll in two seconds."""
    await result_of(*[reply(408)] * 35, DONE)
    assert 60.0 <= sum(pauses) <= 70.0


async def test_metadata_alone_is_not_the_result():
    service = Service(reply(200, {"status": "complete_metadata", "response_payload_size": 9}), DONE)
    await result_of(service=service)
    assert service.iterations == [0, 1]


async def test_a_poll_that_takes_long_is_no_trouble_where_the_service_answers_otherwise():
    """Some services hold polls for longer than the timeout, for example during a compilation."""
    service = Service(*[TimeoutExceeded("slow")] * 20, DONE)
    service.is_alive = True
    await result_of(service=service, retry=THREE_ATTEMPTS)
    assert service.health_checks == 20


async def test_the_queue_state_is_reported_once_per_change():
    events: list[Any] = []
    telemetry.attach(events.append, events="tinkex.future.queue_state")
    states = ["active", "active", "paused_capacity", "paused_capacity", "active", None, "active"]
    replies = [reply(408, {"queue_state": state} if state else None) for state in states]
    replies[3] = reply(200, {"type": "try_again", "queue_state": "paused_capacity", "queue_state_reason": "full"})
    await result_of(*replies, DONE)
    assert [event.metadata["queue_state"] for event in events] == ["active", "paused_capacity", "active"]
    assert all(event.metadata["request_id"] == "r1" for event in events)


# Retries


@pytest.mark.parametrize(
    "failure",
    [*map(reply, (429, 500, 502, 503)), ConnectionFailed("x"), InvalidResponse("z"), TimeoutExceeded("y")],
)
async def test_transient_failures_are_retried(failure):
    service = Service(*[failure] * 4, DONE)
    await result_of(service=service)
    assert len(service.iterations) == 5
    service = Service(failure)
    with pytest.raises(type(failure) if isinstance(failure, TinkexError) else TinkexError):
        await result_of(service=service, retry=THREE_ATTEMPTS)
    assert len(service.iterations) == 3


async def test_a_pending_response_restarts_the_attempts():
    failures = [reply(500), reply(500), reply(408), reply(500), reply(500)]
    await result_of(*failures, DONE, retry=THREE_ATTEMPTS)


async def test_retry_after_is_obeyed_up_to_the_deadline(pauses):
    await result_of(reply(503, retry_after="7"), reply(429, retry_after="3"), DONE)
    assert pauses == [7.0, 3.0]
    with pytest.raises(ServerError) as caught:
        await result_of(reply(503, retry_after="50"), retry=RetryPolicy(deadline=20.0))
    assert caught.value.retry_after == 50.0
    assert pauses == [7.0, 3.0]


async def test_pauses_are_random_below_an_exponential_bound(pauses):
    retry = RetryPolicy(deadline=1e9, initial_wait=1.0, max_wait=8.0)
    for _ in range(60):
        await result_of(*[ConnectionFailed("reset")] * 5, DONE, retry=retry)
    for attempt, longest in enumerate((1.0, 2.0, 4.0, 8.0, 8.0)):
        drawn = sorted(pauses[attempt::5])
        assert 0.0 <= drawn[0] < 0.25 * longest  # fails with a probability of 0.75**60, about 3e-8
        assert 0.75 * longest < drawn[-1] <= longest


async def test_a_result_that_cannot_be_decoded_is_fetched_again():
    def decode(result: Result) -> Any:
        if result.fields == {"half": True}:
            raise InvalidResponse("torn")
        return result.fields

    torn = reply(200, {"half": True})
    assert (await result_of(torn, torn, DONE, decode=decode))["type"] == "optim_step"
    with pytest.raises(InvalidResponse, match="torn"):
        await result_of(torn, retry=THREE_ATTEMPTS, decode=decode)


async def test_payment_is_awaited_up_to_a_limit():
    unpaid = [reply(402, retry_after="2")] * 3
    assert (await result_of(*unpaid, DONE, billing_pause=3600.0)).fields == {"metrics": {}, "type": "optim_step"}
    with pytest.raises(BillingRequired):
        await result_of(reply(402))


# Results


@pytest.mark.parametrize("kind", [PROTOBUF, f"{PROTOBUF}; charset=utf-8", "Application/X-Protobuf"])
async def test_the_content_type_decides_the_encoding(kind):
    # Bytes that happen to be JSON are protobuf if the service says so.
    for body in (b"\x01\x02", b'{"error": "no"}'):
        assert await result_of(Response(200, {"content-type": kind}, body)) == Result(body, None)
    with pytest.raises(Authentication):
        await result_of(Response(401, {"content-type": kind}, b"\x01"))


@pytest.mark.parametrize(
    "fields",
    [*({"status": status, "path": "p"} for status in ([], {}, 5, True, "odd")), {"error": None, "path": "p"}],
)
async def test_an_object_without_an_error_is_a_result(fields):
    assert await result_of(reply(200, fields)) == Result(b"", fields)
    assert await result_of(reply(200, {"status": "completed", "result": fields})) == Result(b"", fields)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"3"])
async def test_a_success_that_is_not_an_object_is_an_error(body):
    with pytest.raises(InvalidResponse):
        await result_of(Response(200, {"content-type": "text/html"}, body), retry=THREE_ATTEMPTS)


@pytest.mark.parametrize(
    ("category", "expected"),
    [("user", "user"), ("server", "server"), ("unknown", "unknown"), ("USER", "unknown"), (None, "unknown")],
)
async def test_a_failed_request_is_final(category, expected):
    failed = {"error": "too long", "category": category}
    for fields in (failed, {"status": "completed", "result": failed}):
        service = Service(reply(200, fields))
        with pytest.raises(RequestFailed, match=r"OptimStep.*too long") as caught:
            await result_of(service=service)
        assert (caught.value.category, caught.value.request_id) == (expected, "r1")
        assert service.iterations == [0]


@pytest.mark.parametrize("error", ["", False, 0, {"code": 3}])
async def test_any_error_that_is_not_null_is_a_failure(error):
    with pytest.raises(RequestFailed):
        await result_of(reply(200, {"error": error, "category": []}))


async def test_a_400_is_repeated_once():
    await result_of(reply(400, {"detail": "which future?"}), DONE)
    service = Service(reply(400, {"detail": "bad data", "category": "user"}))
    with pytest.raises(RequestFailed, match="bad data") as caught:
        await result_of(service=service)
    assert service.iterations == [0, 1]
    assert caught.value.category == "user"
    for body in (b"plain words", b"", b"[1]", b'{"detail": [{"msg": "odd"}]}'):
        with pytest.raises(RequestFailed):
            await result_of(Response(400, {}, body))


@pytest.mark.parametrize(
    ("status", "error_class", "text"),
    [
        (401, Authentication, "no data"),
        (402, BillingRequired, "no data"),
        (403, PermissionDenied, "no data"),
        (404, ResultLost, "create_training_client_from_state"),
        (409, Conflict, "no data"),
        (410, ResultLost, "create_training_client_from_state"),
        (422, RequestFailed, "no data"),
    ],
)
async def test_other_refusals_are_final(status, error_class, text):
    service = Service(reply(status, {"detail": {"msg": "no data"}}))
    with pytest.raises(error_class, match=text) as caught:
        await result_of(service=service)
    assert service.iterations == [0]
    if isinstance(caught.value, RequestFailed):
        assert caught.value.request_id == "r1"


async def test_start_then_stop_or_exception():
    names: list[str] = []
    telemetry.attach(lambda event: names.append(event.name), events="tinkex.future.*")
    await result_of(DONE)
    with pytest.raises(RequestFailed):
        await result_of(reply(200, {"error": "x"}))
    assert names == [f"tinkex.future.{phase}" for phase in ("start", "stop", "start", "exception")]
