"""Answers 402: a bounded pause that is told, then the error."""

import asyncio
from typing import Any

import pytest

from tinkex_py import BillingRequired, limits, telemetry
from tinkex_py.limits import BillingPause

pytestmark = pytest.mark.asyncio


class Clock:
    """asyncio with a clock of our own: sleeping moves it."""

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


def unpaid(retry_after: float | None = None) -> BillingRequired:
    return BillingRequired("pay", status=402, request_id="r7", retry_after=retry_after)


class Unpaid:
    """Asks for payment so many times, then answers."""

    def __init__(self, times: int, retry_after: float | None = None) -> None:
        self.left = times
        self.retry_after = retry_after
        self.sent = 0

    async def __call__(self) -> str:
        self.sent += 1
        self.left -= 1
        if self.left >= 0:
            raise unpaid(self.retry_after)
        return "done"


async def test_it_is_waited_for(clock):
    send = Unpaid(3)
    assert await BillingPause(3600.0).around(send) == "done"
    assert clock.sleeps == [5.0] * 3
    assert send.sent == 4


async def test_it_ends_in_the_error(clock):
    with pytest.raises(BillingRequired):
        await BillingPause(30.0).around(Unpaid(10**6))
    assert sum(clock.sleeps) == 30.0


async def test_no_pause_at_all(clock):
    send = Unpaid(1)
    with pytest.raises(BillingRequired):
        await BillingPause(0.0).around(send)
    assert clock.sleeps == []


async def test_requests_share_the_clock(clock):
    pause = BillingPause(30.0)
    with pytest.raises(BillingRequired):
        await pause.around(Unpaid(10**6))
    before = len(clock.sleeps)
    with pytest.raises(BillingRequired):
        await pause.around(Unpaid(10**6))
    assert len(clock.sleeps) == before
    clock.now += 301.0  # long enough without 402: it begins anew
    assert await pause.around(Unpaid(2)) == "done"


@pytest.mark.parametrize(("told", "waited"), [(7.0, 7.0), (0.0, 5.0), (None, 5.0), (1e-6, 0.02)])
async def test_the_service_may_say_how_long_but_never_to_spin(clock, told, waited):
    await BillingPause(3600.0).around(Unpaid(1, told))
    assert clock.sleeps == [waited]


async def test_it_is_told_once_a_minute(clock):
    events: list[Any] = []
    telemetry.attach(events.append, events="tinkex.billing.paused")
    await BillingPause(3600.0).around(Unpaid(30))  # 150 s
    assert [event.measurements["paused"] for event in events] == [0.0, 60.0, 120.0]
    assert {event.metadata["request_id"] for event in events} == {"r7"}
