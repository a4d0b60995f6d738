"""A bound on bytes under way: never exceeded, in order, and safe to cancel."""

import asyncio

import pytest
from hypothesis import given, settings, strategies as st

from tinkex_py.limits import ByteBudget


async def turns() -> None:
    """Lets everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


class Holder:
    """Holds so many bytes until it is let go."""

    def __init__(self, budget: ByteBudget, count: int) -> None:
        self.count = count
        self.inside = False
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._run(budget))

    async def _run(self, budget: ByteBudget) -> None:
        async with budget.hold(self.count):
            self.inside = True
            try:
                await self.go.wait()
            finally:
                self.inside = False


@pytest.mark.asyncio
async def test_first_come_first_served_and_large_ones_alone():
    budget = ByteBudget(10)
    holders = [Holder(budget, count) for count in (6, 4, 50, 1)]
    await turns()
    assert [holder.inside for holder in holders] == [True, True, False, False]
    holders[0].go.set()
    await turns()
    late = Holder(budget, 1)
    await turns()
    assert not holders[3].inside, "the small one does not overtake the large one"
    assert not late.inside, "nor does one that comes when there is room"
    holders[1].go.set()
    await turns()
    assert [holder.inside for holder in holders] == [False, False, True, False]
    holders[2].go.set()
    await turns()
    assert holders[3].inside
    assert late.inside
    for holder in (holders[3], late):
        holder.go.set()
    await asyncio.gather(*(holder.task for holder in (*holders, late)))
    assert budget.held == 0


@pytest.mark.asyncio
async def test_a_waiter_that_is_cancelled_lets_those_behind_it_pass():
    budget = ByteBudget(10)
    first, large, small = Holder(budget, 8), Holder(budget, 9), Holder(budget, 2)
    await turns()
    assert not small.inside
    large.task.cancel()
    await turns()
    assert small.inside
    for holder in (first, small):
        holder.go.set()
    await asyncio.wait([holder.task for holder in (first, large, small)])
    assert budget.held == 0


@pytest.mark.asyncio
async def test_a_turn_that_comes_together_with_a_cancellation_is_given_back():
    budget = ByteBudget(10)
    async with budget.hold(10):
        second = Holder(budget, 10)
        await turns()
    second.task.cancel()  # it has its turn now, but has not run yet
    await asyncio.wait([second.task])
    assert budget.held == 0
    third = Holder(budget, 10)
    await turns()
    assert third.inside
    third.go.set()
    await third.task


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 15), st.sampled_from(["end", "cancel"]), st.integers(0, 99)), max_size=20))
def test_the_budget_is_never_exceeded(steps):
    async def scenario() -> None:
        budget = ByteBudget(10)
        running: list[Holder] = []
        for count, way, choice in steps:
            running.append(Holder(budget, count))
            await turns()
            inside = [holder.count for holder in running if holder.inside]
            assert sum(inside) == budget.held
            assert budget.held <= 10 or len(inside) == 1
            chosen = running[choice % len(running)]
            chosen.go.set() if way == "end" else chosen.task.cancel()
        for holder in running:
            holder.go.set()
        if running:
            await asyncio.wait([holder.task for holder in running])
        assert budget.held == 0

    asyncio.run(scenario())
