"""Responses 402: a bounded pause that is reported, then the error."""

import asyncio
from typing import Any

import pytest

from tinkex_py import BillingRequired, limits, telemetry
from tinkex_py.limits import BillingPause

pytestmark = pytest.mark.asyncio


class Clock:
    """asyncio with its own clock, which sleeping advances."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def get_running_loop(self) -> "Clock":
        return self

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(limits, "asyncio", made)
    return made


class Unpaid:
    """Asks for payment this many times, then succeeds."""

    def __init__(self, times: int, retry_after: float | None = None) -> None:
        self.left = times
        self.retry_after = retry_after

    async def __call__(self) -> str:
        self.left -= 1
        if self.left >= 0:
            raise BillingRequired("pay", status=402, request_id="r7", retry_after=self.retry_after)
        return "done"


@pytest.mark.parametrize(("asked", "waited"), [(7.0, 7.0), (0.0, 5.0), (None, 5.0), (1e-6, 0.02)])
async def test_requests_wait_as_long_as_the_service_asks_but_never_spin(clock, asked, waited):
    assert await BillingPause(3600.0).around(Unpaid(3, asked)) == "done"
    assert clock.sleeps == [waited] * 3


@pytest.mark.parametrize("longest", [0.0, 30.0])
async def test_requests_share_the_limit(clock, longest):
    pause = BillingPause(longest)
    for _ in range(2):
        with pytest.raises(BillingRequired):
            await pause.around(Unpaid(10**6))
        assert sum(clock.sleeps) == longest
    clock.now += 301.0  # long enough without 402: the limit starts again
    if longest:
        assert await pause.around(Unpaid(2)) == "done"


async def test_a_pause_that_the_service_asks_for_ends_at_the_limit(clock):
    with pytest.raises(BillingRequired):
        await BillingPause(10.0).around(Unpaid(10**6, 60.0))
    assert clock.sleeps == [10.0]


async def test_a_service_that_asks_rarely_cannot_restart_the_limit(clock):
    """Each request takes longer than the time after which the shared limit starts again."""
    unpaid, sent = Unpaid(10**6), 0

    async def slow() -> str:
        nonlocal sent
        sent += 1
        clock.now += 400.0
        return await unpaid()

    with pytest.raises(BillingRequired):
        await BillingPause(1000.0).around(slow)
    assert sent == 4  # refused after 0, 405, 810 and 1215 s


async def test_the_pause_is_reported_once_a_minute(clock):
    events: list[Any] = []
    telemetry.attach(events.append, events="tinkex.billing.paused")
    await BillingPause(3600.0).around(Unpaid(30))  # 150 s
    assert [event.measurements["paused"] for event in events] == [0.0, 60.0, 120.0]
    assert {event.metadata["request_id"] for event in events} == {"r7"}
