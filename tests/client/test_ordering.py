"""The order of one training client's requests."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from tinkex_py.client.accumulation import Accumulation
from tinkex_py.client.ordering import Kind, Ordering
from tinkex_py.errors import (
    APIStatusError,
    BadRequest,
    ConnectionFailed,
    NonFiniteLoss,
    PrecedingRequestFailed,
    RequestFailed,
    RequestInsideStep,
    SequenceLost,
    TinkexError,
)
from tinkex_py.transport.api import Sent

pytestmark = pytest.mark.asyncio


def new_ordering() -> Ordering:
    return Ordering("model", Accumulation())


@dataclass
class Work:
    """A submission of so many requests; its result is its label, unless the service fails it."""

    label: str
    deliver: Callable[[Sequence[int]], Awaitable[None]]
    count: int = 1
    failure: TinkexError | None = None
    result_comes: asyncio.Event | None = None

    async def prepare(self) -> int:
        await asyncio.sleep(0)
        return self.count

    def handed_over(self) -> None:
        pass

    async def submit(self, numbers: Sequence[int]) -> Sequence[Sent]:
        try:
            await self.deliver(numbers)
        except BadRequest as error:
            return [Sent(number, refusal=error) for number in numbers]
        return [Sent(number, request_id="f") for number in numbers]

    def submitted(self, sent: Sequence[Sent]) -> None:
        pass

    async def result(self, sent: Sequence[Sent]) -> str:
        if sent[0].refusal is not None:
            raise sent[0].refusal
        if self.result_comes is not None:
            await self.result_comes.wait()
        if self.failure is not None:
            raise self.failure
        return self.label


@dataclass
class Wire:
    """A service that records what reaches it, in the order it reaches it."""

    sent: list[tuple[int, str]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    fail_with: dict[str, APIStatusError | TinkexError] = field(default_factory=dict)
    fail_later: dict[str, TinkexError] = field(default_factory=dict)
    results: dict[str, asyncio.Event] = field(default_factory=dict)

    async def until_sent(self, count: int) -> None:
        while len(self.sent) < count:
            self.arrived.clear()
            await self.arrived.wait()

    def work(self, label: str, count: int = 1) -> Work:
        async def deliver(numbers: Sequence[int]) -> None:
            for number in numbers:
                self.sent.append((number, label))
            self.arrived.set()
            if self.gate is not None:
                await self.gate.wait()
            else:
                await asyncio.sleep(0)
            if label in self.fail_with:
                raise self.fail_with[label]

        return Work(label, deliver, count, self.fail_later.get(label), self.results.get(label))


async def single(ordering: Ordering, wire: Wire, kind: Kind, label: str, count: int = 1) -> str:
    async with ordering.enter(kind, label) as turn:
        return await turn.send(wire.work(label, count))


async def custom(ordering: Ordering, wire: Wire, label: str, terms=None, *, early: bool = False) -> str:
    async with ordering.enter(Kind.GRADIENT, label) as turn:
        await turn.send(wire.work(f"{label}.F"), last=False, early=early)
        async with turn.running_terms():
            if terms is not None:
                await terms()
        return await turn.send(wire.work(f"{label}.B"))


async def reference(ordering: Ordering, wire: Wire, label: str) -> str:
    async with ordering.enter(Kind.READ, label, forward_only=True) as turn:
        return await turn.send(wire.work(label))


async def test_the_order_of_gather_is_the_order_on_the_wire():
    ordering, wire = new_ordering(), Wire()
    await asyncio.gather(
        custom(ordering, wire, "a"), single(ordering, wire, Kind.UPDATE, "step"), custom(ordering, wire, "b"),
        single(ordering, wire, Kind.READ, "save"),
    )  # fmt: skip
    assert wire.sent == [(1, "a.F"), (2, "a.B"), (3, "step"), (4, "b.F"), (5, "b.B"), (6, "save")]
    assert ordering.is_empty


async def test_one_submission_is_on_the_wire_at_a_time():
    ordering, wire = new_ordering(), Wire(gate=asyncio.Event())
    tasks = [asyncio.create_task(single(ordering, wire, Kind.GRADIENT, name)) for name in "ab"]
    await wire.until_sent(1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert wire.sent == [(1, "a")]
    wire.gate.set()
    assert await asyncio.gather(*tasks) == ["a", "b"]


async def test_a_step_that_fails_before_its_gradient_breaks_what_is_behind_and_leaves_no_gap():
    ordering, wire = new_ordering(), Wire()

    async def bad_terms() -> None:
        raise NonFiniteLoss("nan", name="l1")

    results = await asyncio.gather(
        custom(ordering, wire, "a", bad_terms), single(ordering, wire, Kind.UPDATE, "step"), return_exceptions=True
    )
    assert isinstance(results[0], NonFiniteLoss)
    assert isinstance(results[1], PrecedingRequestFailed)
    assert await custom(ordering, wire, "b") == "b.B"
    assert await single(ordering, wire, Kind.UPDATE, "step") == "step"
    assert wire.sent == [(1, "a.F"), (2, "b.F"), (3, "b.B"), (4, "step")]
    assert ordering.is_empty


async def test_a_final_refusal_of_a_gradient_breaks_and_spends_its_number():
    ordering, wire = new_ordering(), Wire(fail_with={"a": BadRequest("no", status=400)})
    results = await asyncio.gather(
        single(ordering, wire, Kind.GRADIENT, "a"), single(ordering, wire, Kind.UPDATE, "step"), return_exceptions=True
    )
    assert isinstance(results[0], BadRequest)
    assert isinstance(results[1], PrecedingRequestFailed)
    assert await single(ordering, wire, Kind.GRADIENT, "b") == "b"
    assert wire.sent == [(1, "a"), (2, "b")]


async def test_a_request_cancelled_while_queued_breaks_what_is_behind():
    ordering, wire = new_ordering(), Wire(gate=asyncio.Event())
    first = asyncio.create_task(single(ordering, wire, Kind.GRADIENT, "a"))
    second = asyncio.create_task(single(ordering, wire, Kind.GRADIENT, "b"))
    third = asyncio.create_task(single(ordering, wire, Kind.UPDATE, "step"))
    await wire.until_sent(1)
    second.cancel()
    await asyncio.wait([second])
    wire.gate.set()
    assert await first == "a"
    with pytest.raises(PrecedingRequestFailed):
        await third
    assert wire.sent == [(1, "a")]
    assert ordering.is_empty


async def test_no_final_answer_loses_the_lane_with_a_way_out():
    ordering, wire = new_ordering(), Wire(fail_with={"a": ConnectionFailed("refused")})
    results = await asyncio.gather(
        single(ordering, wire, Kind.GRADIENT, "a"), single(ordering, wire, Kind.UPDATE, "step"), return_exceptions=True
    )
    assert all(isinstance(result, SequenceLost) for result in results)
    with pytest.raises(SequenceLost, match="create_training_client_from_state"):
        await single(ordering, wire, Kind.READ, "later")
    assert wire.sent == [(1, "a")]
    assert ordering.is_empty


async def test_a_failure_on_the_service_breaks_what_is_not_handed_over_and_lists_what_was():
    ordering, wire = new_ordering(), Wire(fail_later={"a": RequestFailed("no")}, results={"a": asyncio.Event()})
    failing = asyncio.create_task(single(ordering, wire, Kind.GRADIENT, "a"))
    await wire.until_sent(1)
    await single(ordering, wire, Kind.UPDATE, "step")
    wire.gate = asyncio.Event()
    blocked = asyncio.create_task(single(ordering, wire, Kind.GRADIENT, "b"))
    queued = asyncio.create_task(single(ordering, wire, Kind.UPDATE, "step2"))
    await wire.until_sent(3)
    wire.results["a"].set()
    with pytest.raises(RequestFailed) as caught:
        await failing
    assert caught.value.handed_over == (2, 3)
    wire.gate.set()
    assert await blocked == "b"
    with pytest.raises(PrecedingRequestFailed):
        await queued


async def test_terms_wait_for_the_acceptance_of_a_gradient_whose_caller_has_left():
    ordering, wire = new_ordering(), Wire()
    started = asyncio.Event()

    async def terms() -> None:
        started.set()

    async def until_the_forward_behind_is_out() -> None:
        await wire.until_sent(2)
        wire.gate = asyncio.Event()

    first = asyncio.create_task(custom(ordering, wire, "a", until_the_forward_behind_is_out, early=True))
    second = asyncio.create_task(custom(ordering, wire, "b", terms, early=True))
    await wire.until_sent(3)
    first.cancel()
    await asyncio.wait([first])
    for _ in range(20):
        await asyncio.sleep(0)
    assert not started.is_set()
    assert wire.gate is not None
    wire.gate.set()
    assert await second == "b.B"


async def test_anything_else_asked_for_by_a_term_is_refused_at_once():
    ordering, wire = new_ordering(), Wire()

    async def terms() -> None:
        await single(ordering, wire, Kind.UPDATE, "step")

    with pytest.raises(RequestInsideStep):
        await asyncio.wait_for(custom(ordering, wire, "a", terms), 5)
    assert wire.sent == [(1, "a.F")]


async def test_a_term_of_another_clients_step_does_not_hide_the_outer_step():
    ordering_a, ordering_b, wire = new_ordering(), new_ordering(), Wire()

    async def inner_terms() -> None:
        await reference(ordering_a, wire, "a.reference")

    async def outer_terms() -> None:
        await custom(ordering_b, wire, "b", inner_terms)

    await asyncio.wait_for(custom(ordering_a, wire, "a", outer_terms), 5)
    assert [label for _, label in wire.sent] == ["a.F", "b.F", "a.reference", "b.B", "a.B"]
