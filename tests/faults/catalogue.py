"""The faults that are injected: what networks, proxies and services do to requests in production.

`RECOVERS`: faults from which a client recovers at every place of a step. `FINAL`: responses that end a call in a typed
error.
"""

import asyncio
import gzip
import itertools
import json
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from tests.faults.proxy import Answer, Fault, Passing

PROTOBUF = "application/x-protobuf"
SHORT = 0.03
"""Seconds that a slow fault takes."""

Treatment = Callable[[Passing], Awaitable[None]]


def before(name: str, treat: Treatment) -> Fault:
    """Returns a fault that happens before the request reaches the service."""
    return Fault(f"{name}, before", treat)


def after(name: str, treat: Treatment) -> Fault:
    """Returns a fault that replaces the response after the service has processed the request."""

    async def act(passing: Passing) -> None:
        await passing.ask()
        await treat(passing)

    return Fault(f"{name}, after", act)


def answering(answer: Answer) -> Treatment:
    """Sends this response."""

    async def treat(passing: Passing) -> None:
        await passing.answer(answer)

    return treat


def sending(data: bytes) -> Treatment:
    """Sends these bytes and closes the connection."""

    async def treat(passing: Passing) -> None:
        await passing.send(data)
        await passing.close()

    return treat


async def reset(passing: Passing) -> None:
    await passing.reset()


async def stall(passing: Passing) -> None:
    await passing.client_leaves()


async def endless_drip(passing: Passing) -> None:
    """Sends a head, then a byte at a time: every read is quick, but the response never ends."""
    await passing.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n")
    passing.keep_alive = False
    while True:
        await passing.send(b" ")
        await passing.unless_client_leaves(asyncio.sleep(SHORT))


async def refuse(passing: Passing) -> None:
    await passing.proxy.refuse_for(SHORT)
    await passing.reset()


async def break_next_connections(passing: Passing) -> None:
    passing.proxy.broken_connections.extend([b"", b"\x15\x03\x01\x00\x02\x02\x28", b"no handshake"])
    await passing.reset()


# Faults of a correct response


async def half_an_answer(passing: Passing) -> None:
    encoded = (await passing.ask()).encoded()
    await passing.send(encoded[: len(encoded) - 1 - len(encoded) // 8])
    await passing.close()


async def half_an_answer_reset(passing: Passing) -> None:
    encoded = (await passing.ask()).encoded()
    await passing.send(encoded[: len(encoded) // 2])
    await passing.reset()


async def slow_drip(passing: Passing) -> None:
    encoded = (await passing.ask()).encoded()
    for start in range(0, len(encoded), 1 + len(encoded) // 40):
        await passing.send(encoded[start : start + 1 + len(encoded) // 40])
        await asyncio.sleep(SHORT / 40)


async def answered_twice(passing: Passing) -> None:
    encoded = (await passing.ask()).encoded()
    await passing.send(encoded + encoded)


async def surplus_bytes(passing: Passing) -> None:
    await passing.send((await passing.ask()).encoded() + b"\r\nHTTP/1.1 200 OK\r\n")


async def passed_on_twice(passing: Passing) -> None:
    first, second = await passing.ask(), await passing.ask()
    assert first.status == second.status
    await passing.answer(second)


async def answered_after_another(passing: Passing) -> None:
    answer = await passing.ask()
    await passing.proxy.another_answer(SHORT)
    await passing.answer(answer)


async def passed_on_after_another(passing: Passing) -> None:
    await passing.proxy.another_answer(SHORT)
    await passing.answer(await passing.ask())


async def closed_after_the_answer(passing: Passing) -> None:
    await passing.answer(await passing.ask())
    await passing.close()


def moment(seconds: float) -> str:
    """Returns the HTTP date that many seconds from now."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def busy(status: int, **headers: str) -> Answer:
    return Answer.of(status, {"detail": "busy"}, **headers)


RETRY_AFTER = {
    "seconds": {"retry_after": "1"},
    "a fraction of a second": {"retry_after": "0.021"},
    "milliseconds": {"retry_after_ms": "21"},
    "milliseconds and seconds": {"retry_after_ms": "21", "retry_after": "50"},
    "a future date": {"retry_after": moment(3600)},
    "a past date": {"retry_after": moment(-3600)},
    "nothing": {"retry_after": ""},
    "zero": {"retry_after": "0"},
    "almost zero": {"retry_after_ms": "0.000001"},
    "negative": {"retry_after": "-5"},
    "huge": {"retry_after": "1e300"},
    "infinite": {"retry_after": "inf"},
    "not a number": {"retry_after": "nan"},
    "garbage": {"retry_after": "soon; \xff\x80"},
    "an invalid date": {"retry_after": "Fri, 99 Zed 99999999999 99:99:99 GMT"},
}

HTML = Answer.of(200, b"<html>Please log in</html>", "text/html")
WRONG_PROTOBUF = Answer.of(200, b"\x0a\xff\xff\xff\xff\x0fgarbage", PROTOBUF)
JSON_LIST = Answer.of(200, [1, 2, 3])
BROKEN_GZIP = Answer.of(200, b"not gzip", content_encoding="gzip")
CUT_OFF_GZIP = Answer.of(200, gzip.compress(b'{"request_id": "1"}')[:16], content_encoding="gzip")
GARBAGE = b"\x00\xfe\xff\x16\x03 not HTTP \r\n\r\n\r\n"

HINTS = [
    before(f"status {status} with Retry-After: {name}", answering(busy(status, **hint)))
    for (name, hint), status in zip(RETRY_AFTER.items(), itertools.cycle((429, 503, 425, 500)), strict=False)
]

RECOVERS: dict[str, list[Fault]] = {
    "connection refused": [before("connection refused", refuse)] * 2,
    "connections that break at once": [before("connections that break at once", break_next_connections)],
    "reset": [before("reset", reset), after("reset", reset)],
    "half an answer": [Fault("half an answer", half_an_answer), Fault("half an answer, reset", half_an_answer_reset)],
    "garbage bytes": [
        before("garbage bytes", sending(GARBAGE)),
        after("garbage bytes", sending(GARBAGE)),
        before("an empty response", sending(b"")),
    ],
    "wrong content type": [
        before("wrong content type", answering(HTML)),
        after("wrong content type", answering(HTML)),
        after("JSON of another type", answering(JSON_LIST)),
    ],
    "wrong protobuf": [
        before("wrong protobuf", answering(WRONG_PROTOBUF)),
        after("wrong protobuf", answering(WRONG_PROTOBUF)),
    ],
    "broken gzip": [
        before("invalid gzip", answering(BROKEN_GZIP)),
        after("truncated gzip", answering(CUT_OFF_GZIP)),
    ],
    "slow drip": [Fault("slow drip", slow_drip, answers=True)],
    "an endless response": [before("an endless response", endless_drip)],
    "stall": [before("stall", stall), after("stall", stall)],
    "status, before": [
        before(f"status {status}", answering(busy(status))) for status in (408, 425, 429, 500, 502, 503, 504)
    ],
    "status, after": [
        after(f"status {status}", answering(busy(status))) for status in (408, 425, 429, 500, 502, 503, 504)
    ],
    "answered twice": [Fault("answered twice", answered_twice, answers=True)],
    "surplus bytes": [Fault("surplus bytes behind the answer", surplus_bytes, answers=True)],
    "passed on twice": [Fault("passed on twice", passed_on_twice, answers=True)],
    "answered after another": [Fault("answered after another", answered_after_another, answers=True)],
    "passed on after another": [Fault("passed on after another", passed_on_after_another, answers=True)],
    "closed after the answer": [Fault("closed after the answer", closed_after_the_answer, answers=True)],
}
"""By name, faults that happen one after another to the same request."""

FINAL: list[Fault] = [
    *(before(f"status {status}", answering(busy(status))) for status in (401, 403, 404, 409, 410, 422)),
    *(after(f"status {status}", answering(busy(status))) for status in (409, 410)),
]


def with_flags(**flags: object) -> Fault:
    """Not a fault: the response to client/config with other flags."""

    async def act(passing: Passing) -> None:
        answer = await passing.ask()
        body = json.dumps({**json.loads(answer.body), **flags}).encode()
        await passing.answer(Answer(answer.status, answer.headers, body))

    return Fault(f"flags {sorted(flags)}", act, answers=True)


def random_faults(seed: int, share: float) -> Callable[[Passing], Fault | None]:
    """Injects any of `RECOVERS` into this share of all requests."""
    dice = random.Random(seed)
    choices = [fault for faults in RECOVERS.values() for fault in dict.fromkeys(faults)]

    def choose(passing: Passing) -> Fault | None:
        return dice.choice(choices) if dice.random() < share else None

    return choose


IN_CHUNKS = with_flags(fwdbwd_max_chunk_len=2)
"""Sends calls of three datums as two requests at the same time."""
