"""The pool by itself: order, bounds, replacement, closing."""

import asyncio
import random
from contextlib import suppress

import pytest

from tinkex_py.transport.connection_pool import ConnectionPool


class Member:
    def __init__(self, number: int, fail: bool) -> None:
        self.number = number
        self.closed = 0
        self.is_clean = True
        self._fail = fail

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.closed += 1
        if self._fail:
            raise OSError("already broken")


class Opener:
    def __init__(self, *, fail_closing: bool = False) -> None:
        self.members: list[Member] = []
        self.broken = False
        self._fail_closing = fail_closing

    async def __call__(self) -> Member:
        await asyncio.sleep(0)
        if self.broken:
            raise OSError("cannot open")
        self.members.append(Member(len(self.members), self._fail_closing))
        return self.members[-1]


async def use(pool: ConnectionPool[Member], release: asyncio.Event, log: list[object], tag: object = None) -> None:
    async with pool.connection():
        log.append(tag)
        await release.wait()


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_a_member_that_ended_well_is_used_again():
    opener = Opener()
    pool = ConnectionPool(opener, 3)
    for _ in range(5):
        async with pool.connection() as member:
            assert member.number == 0
    await pool.aclose()
    assert [member.closed for member in opener.members] == [1]


@pytest.mark.asyncio
async def test_a_member_that_is_not_clean_is_closed_and_replaced():
    opener = Opener()
    pool = ConnectionPool(opener, 1)
    async with pool.connection() as member:
        member.is_clean = False
    async with pool.connection() as member:
        assert member.number == 1
    await pool.aclose()
    assert [member.closed for member in opener.members] == [1, 1]


@pytest.mark.asyncio
@pytest.mark.parametrize("fail_closing", [False, True])
async def test_a_member_that_failed_is_closed_and_replaced(fail_closing: bool):
    opener = Opener(fail_closing=fail_closing)
    pool = ConnectionPool(opener, 1)
    with pytest.raises(ZeroDivisionError):
        async with pool.connection():
            raise ZeroDivisionError
    async with pool.connection() as member:
        assert member.number == 1
    await pool.aclose()
    assert [member.closed for member in opener.members] == [1, 1]


@pytest.mark.asyncio
async def test_waiting_is_in_order_and_a_cancelled_waiter_is_skipped():
    pool = ConnectionPool(Opener(), 1)
    release, log = asyncio.Event(), []
    tasks = [asyncio.create_task(use(pool, release, log, number)) for number in range(6)]
    await ticks(5)
    assert log == [0]
    tasks[2].cancel()
    tasks[4].cancel()
    release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert log == [0, 1, 3, 5]
    await pool.aclose()


@pytest.mark.asyncio
async def test_a_slot_survives_a_failed_opening():
    opener = Opener()
    pool = ConnectionPool(opener, 1)
    opener.broken = True
    for _ in range(3):
        with pytest.raises(OSError, match="cannot open"):
            async with pool.connection():
                pass
    opener.broken = False
    async with pool.connection() as member:
        assert member.number == 0
    await pool.aclose()


@pytest.mark.asyncio
async def test_a_member_in_use_is_closed_when_it_comes_back_to_a_closed_pool():
    opener = Opener()
    pool = ConnectionPool(opener, 1)
    release, log = asyncio.Event(), []
    task = asyncio.create_task(use(pool, release, log))
    await ticks(3)
    await pool.aclose()
    assert opener.members[0].closed == 0
    release.set()
    await task
    await ticks(3)
    assert opener.members[0].closed == 1
    await pool.aclose()
    assert opener.members[0].closed == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(20))
async def test_random_cancellations_lose_no_slot(seed: int):
    dice = random.Random(seed)
    opener = Opener(fail_closing=bool(seed % 2))
    pool = ConnectionPool(opener, 3)
    inside = peak = 0

    async def work() -> None:
        nonlocal inside, peak
        async with pool.connection() as member:
            assert not member.closed
            inside += 1
            peak = max(peak, inside)
            try:
                await ticks(dice.randrange(4))
                if dice.random() < 0.2:
                    raise ZeroDivisionError
            finally:
                inside -= 1

    tasks = [asyncio.create_task(work()) for _ in range(60)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        if dice.random() < 0.5:
            dice.choice(tasks).cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert peak <= 3
    release, log = asyncio.Event(), []
    last = [asyncio.create_task(use(pool, release, log, number)) for number in range(3)]
    await ticks(5)
    assert log == [0, 1, 2]
    release.set()
    with suppress(ZeroDivisionError):
        await asyncio.gather(*last)
    await pool.aclose()
    assert all(member.closed == 1 for member in opener.members)
