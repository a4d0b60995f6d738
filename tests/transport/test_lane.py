"""The order of one training client's requests."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from tinkex_py.errors import (
    BadRequest,
    ConnectionFailed,
    NonFiniteLoss,
    PrecedingRequestFailed,
    RequestInsideStep,
    SequenceLost,
    TinkexError,
)
from tinkex_py.transport.lane import Lane
from tinkex_py.transport.place import Kind, Place

pytestmark = pytest.mark.asyncio


@dataclass
class Wire:
    """A service that records what reaches it, in the order it reaches it."""

    sent: list[tuple[int, str]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    fail_with: dict[str, TinkexError] = field(default_factory=dict)

    async def until_sent(self, count: int) -> None:
        while len(self.sent) < count:
            self.arrived.clear()
            await self.arrived.wait()

    def send(self, label: str):
        async def send(numbers: Sequence[int]) -> str:
            for number in numbers:
                self.sent.append((number, label))
            self.arrived.set()
            if self.gate is not None:
                await self.gate.wait()
            else:
                await asyncio.sleep(0)
            if label in self.fail_with:
                raise self.fail_with[label]
            return label

        return send


async def single(lane: Lane, wire: Wire, kind: Kind, label: str, count: int = 1) -> str:
    place = lane.enter(kind)
    try:
        return await place.submit(count, wire.send(label))
    finally:
        place.leave()


async def custom(lane: Lane, wire: Wire, label: str, terms=None, *, early: bool = False) -> str:
    place = lane.enter(Kind.GRADIENT)
    try:
        await place.submit(1, wire.send(f"{label}.F"), last=False, early=early)
        await place.turn_of_terms()
        if terms is not None:
            with place.running_terms():
                await terms()
        return await place.submit(1, wire.send(f"{label}.B"))
    finally:
        place.leave()


async def test_the_order_of_gather_is_the_order_on_the_wire():
    lane, wire = Lane(), Wire()
    await asyncio.gather(
        custom(lane, wire, "a"), single(lane, wire, Kind.UPDATE, "step"), custom(lane, wire, "b"),
        single(lane, wire, Kind.READ, "save"),
    )  # fmt: skip
    assert wire.sent == [(1, "a.F"), (2, "a.B"), (3, "step"), (4, "b.F"), (5, "b.B"), (6, "save")]
    assert lane.is_empty


async def test_an_early_forward_goes_out_one_step_ahead_and_its_terms_wait():
    lane, wire = Lane(), Wire()
    called: list[str] = []

    def terms(label: str, until_sent: int):
        async def run() -> None:
            called.append(label)
            await wire.until_sent(until_sent)

        return run

    await asyncio.gather(
        custom(lane, wire, "a", terms("a", 2), early=True),
        custom(lane, wire, "b", terms("b", 4), early=True),
        custom(lane, wire, "c", terms("c", 5), early=True),
        single(lane, wire, Kind.UPDATE, "step"),
    )
    sent = [label for _, label in wire.sent]
    assert sent == ["a.F", "b.F", "a.B", "c.F", "b.B", "c.B", "step"]
    assert called == ["a", "b", "c"]


async def test_one_submission_is_on_the_wire_at_a_time():
    lane, wire = Lane(), Wire(gate=asyncio.Event())
    tasks = [asyncio.create_task(single(lane, wire, Kind.GRADIENT, name)) for name in "ab"]
    await wire.until_sent(1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert wire.sent == [(1, "a")]
    wire.gate.set()
    assert await asyncio.gather(*tasks) == ["a", "b"]


async def test_chunks_of_one_call_get_consecutive_numbers():
    lane, wire = Lane(), Wire()
    await asyncio.gather(single(lane, wire, Kind.GRADIENT, "a", count=3), single(lane, wire, Kind.UPDATE, "step"))
    assert wire.sent == [(1, "a"), (2, "a"), (3, "a"), (4, "step")]


async def test_a_step_that_fails_before_its_gradient_breaks_what_is_behind_and_leaves_no_gap():
    lane, wire = Lane(), Wire()

    async def bad_terms() -> None:
        raise NonFiniteLoss("nan", name="l1")

    results = await asyncio.gather(
        custom(lane, wire, "a", bad_terms), single(lane, wire, Kind.UPDATE, "step"), return_exceptions=True
    )
    assert isinstance(results[0], NonFiniteLoss)
    assert isinstance(results[1], PrecedingRequestFailed)
    assert await custom(lane, wire, "b") == "b.B"
    assert await single(lane, wire, Kind.UPDATE, "step") == "step"
    assert wire.sent == [(1, "a.F"), (2, "b.F"), (3, "b.B"), (4, "step")]
    assert lane.is_empty


async def test_a_read_that_fails_breaks_nothing():
    lane, wire = Lane(), Wire(fail_with={"save": BadRequest("no", status=400)})
    results = await asyncio.gather(
        single(lane, wire, Kind.READ, "save"), single(lane, wire, Kind.UPDATE, "step"), return_exceptions=True
    )
    assert isinstance(results[0], BadRequest)
    assert results[1] == "step"
    assert wire.sent == [(1, "save"), (2, "step")]


async def test_a_final_refusal_of_a_gradient_breaks_and_spends_its_number():
    lane, wire = Lane(), Wire(fail_with={"a": BadRequest("no", status=400)})
    results = await asyncio.gather(
        single(lane, wire, Kind.GRADIENT, "a"), single(lane, wire, Kind.UPDATE, "step"), return_exceptions=True
    )
    assert isinstance(results[0], BadRequest)
    assert isinstance(results[1], PrecedingRequestFailed)
    assert await single(lane, wire, Kind.GRADIENT, "b") == "b"
    assert wire.sent == [(1, "a"), (2, "b")]


async def test_a_request_cancelled_while_queued_breaks_what_is_behind():
    lane, wire = Lane(), Wire(gate=asyncio.Event())
    first = asyncio.create_task(single(lane, wire, Kind.GRADIENT, "a"))
    second = asyncio.create_task(single(lane, wire, Kind.GRADIENT, "b"))
    third = asyncio.create_task(single(lane, wire, Kind.UPDATE, "step"))
    await wire.until_sent(1)
    second.cancel()
    await asyncio.wait([second])
    wire.gate.set()
    assert await first == "a"
    with pytest.raises(PrecedingRequestFailed):
        await third
    assert wire.sent == [(1, "a")]
    assert lane.is_empty


async def test_a_caller_cancelled_after_hand_over_counts_as_happened_and_leaves_at_once():
    lane, wire = Lane(), Wire(gate=asyncio.Event())
    first = asyncio.create_task(single(lane, wire, Kind.GRADIENT, "a"))
    second = asyncio.create_task(single(lane, wire, Kind.UPDATE, "step"))
    await wire.until_sent(1)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    assert not lane.is_empty  # its submission still runs
    wire.gate.set()
    assert await second == "step"
    assert wire.sent == [(1, "a"), (2, "step")]
    await lane.drain(1.0)
    assert lane.is_empty


async def test_no_final_answer_loses_the_lane_with_a_way_out():
    lane, wire = Lane(), Wire(fail_with={"a": ConnectionFailed("refused")})
    results = await asyncio.gather(
        single(lane, wire, Kind.GRADIENT, "a"), single(lane, wire, Kind.UPDATE, "step"), return_exceptions=True
    )
    assert all(isinstance(result, SequenceLost) for result in results)
    with pytest.raises(SequenceLost, match="create_training_client_from_state"):
        await single(lane, wire, Kind.READ, "later")
    assert wire.sent == [(1, "a")]
    assert lane.is_empty


async def test_a_failure_on_the_service_breaks_what_is_not_handed_over_and_lists_what_was():
    lane, wire = Lane(), Wire()
    place = lane.enter(Kind.GRADIENT)
    await place.submit(1, wire.send("a"))
    await single(lane, wire, Kind.UPDATE, "step")
    wire.gate = asyncio.Event()
    blocked = asyncio.create_task(single(lane, wire, Kind.GRADIENT, "b"))
    queued = asyncio.create_task(single(lane, wire, Kind.UPDATE, "step2"))
    await wire.until_sent(3)
    assert place.fail_on_service() == [2, 3]
    place.leave()
    wire.gate.set()
    assert await blocked == "b"
    with pytest.raises(PrecedingRequestFailed):
        await queued


async def test_a_step_broken_while_its_terms_run_does_not_overlap_with_the_next():
    lane, wire = Lane(), Wire()
    events: list[str] = []
    running, go_on = asyncio.Event(), asyncio.Event()

    async def old_terms() -> None:
        running.set()
        await go_on.wait()
        with pytest.raises(RequestInsideStep):
            lane.enter(Kind.UPDATE)
        guest = lane.enter(Kind.READ, forward_only=True)
        with pytest.raises(PrecedingRequestFailed):
            await guest.submit(1, wire.send("old reference"))
        events.append("old step ended")

    async def new_terms() -> None:
        events.append("new step began")

    first = lane.enter(Kind.GRADIENT)
    await first.submit(1, wire.send("first"))
    old = asyncio.create_task(custom(lane, wire, "old", old_terms))
    await running.wait()
    first.fail_on_service()
    first.leave()
    new = asyncio.create_task(custom(lane, wire, "new", new_terms))
    for _ in range(10):
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(PrecedingRequestFailed):
        await old
    await new
    assert events == ["old step ended", "new step began"]
    assert wire.sent == [(1, "first"), (2, "old.F"), (3, "new.F"), (4, "new.B")]
    assert lane.is_empty


async def test_a_forward_pass_asked_for_by_a_term_runs_inside_the_step():
    lane, wire = Lane(), Wire()

    async def terms() -> None:
        guest = lane.enter(Kind.READ, forward_only=True)
        try:
            await guest.submit(1, wire.send("reference"))
        finally:
            guest.leave()

    await asyncio.wait_for(custom(lane, wire, "a", terms), 5)
    assert wire.sent == [(1, "a.F"), (2, "reference"), (3, "a.B")]
    assert lane.is_empty


async def test_anything_else_asked_for_by_a_term_is_refused_at_once():
    lane, wire = Lane(), Wire()

    async def terms() -> None:
        await single(lane, wire, Kind.UPDATE, "step")

    with pytest.raises(RequestInsideStep):
        await asyncio.wait_for(custom(lane, wire, "a", terms), 5)
    assert wire.sent == [(1, "a.F")]


async def test_the_mark_reaches_threads_and_dies_with_the_step():
    lane, wire = Lane(), Wire()
    later: list[asyncio.Task[str]] = []

    async def terms() -> None:
        def in_thread() -> str:
            with pytest.raises(RequestInsideStep):
                lane.enter(Kind.UPDATE)
            return "seen"

        assert await asyncio.to_thread(in_thread) == "seen"
        started = asyncio.Event()

        async def after_the_step() -> str:
            started.set()
            await step_over.wait()
            return await single(lane, wire, Kind.UPDATE, "step")

        later.append(asyncio.create_task(after_the_step()))
        await started.wait()

    step_over = asyncio.Event()
    await custom(lane, wire, "a", terms)
    step_over.set()
    assert await later[0] == "step"
    assert wire.sent == [(1, "a.F"), (2, "a.B"), (3, "step")]


async def test_a_term_of_another_clients_step_does_not_hide_the_outer_step():
    lane_a, lane_b, wire = Lane(), Lane(), Wire()

    async def inner_terms() -> None:
        guest = lane_a.enter(Kind.READ, forward_only=True)
        try:
            await guest.submit(1, wire.send("a.reference"))
        finally:
            guest.leave()

    async def outer_terms() -> None:
        await custom(lane_b, wire, "b", inner_terms)

    await asyncio.wait_for(custom(lane_a, wire, "a", outer_terms), 5)
    assert [label for _, label in wire.sent] == ["a.F", "b.F", "a.reference", "b.B", "a.B"]


@dataclass(frozen=True)
class Request:
    kind: str
    outcome: str
    delay: int
    cancel_after: int | None
    early: bool


requests = st.builds(
    Request,
    kind=st.sampled_from(["custom", "gradient", "update", "read"]),
    outcome=st.sampled_from(["fine", "fine", "fine", "bad_input", "refused", "term_fails", "service_fails"]),
    delay=st.integers(0, 3),
    cancel_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    early=st.booleans(),
)


class FuzzedService:
    """Answers after random suspensions; knows which submission was what."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.log: list[tuple[int, int, str]] = []
        self.payloads: dict[int, tuple[int, str]] = {}
        self.running_terms = 0
        self.sending = False

    def send(self, index: int, part: str, refuse: bool):
        async def send(numbers: Sequence[int]) -> str:
            assert not self.sending, "two submissions on the wire"
            self.sending = True
            try:
                return await deliver(numbers)
            finally:
                self.sending = False

        async def deliver(numbers: Sequence[int]) -> str:
            for number in numbers:
                assert self.payloads.setdefault(number, (index, part)) == (index, part)
                self.log.append((number, index, part))
            for _ in range(self.random.randrange(4)):
                await asyncio.sleep(0)
            if refuse:
                raise BadRequest("refused", status=422)
            return part

        return send


async def fuzzed_request(lane: Lane, service: FuzzedService, index: int, request: Request) -> None:
    kind = {"custom": Kind.GRADIENT, "gradient": Kind.GRADIENT, "update": Kind.UPDATE, "read": Kind.READ}[request.kind]
    place = lane.enter(kind)
    try:
        if request.outcome == "bad_input":
            await asyncio.sleep(0)
            raise ValueError("bad input")
        for _ in range(request.delay):
            await asyncio.sleep(0)
        refuse = request.outcome == "refused"
        if request.kind == "custom":
            await place.submit(1, service.send(index, "F", False), last=False, early=request.early)
            await place.turn_of_terms()
            await fuzzed_terms(service, place, request)
            await place.submit(1, service.send(index, "B", refuse))
        else:
            await place.submit(1, service.send(index, request.kind, refuse))
        if request.outcome == "service_fails" and kind is not Kind.READ:
            place.fail_on_service()
            raise ValueError("failed on the service")
    finally:
        place.leave()


async def fuzzed_terms(service: FuzzedService, place: Place, request: Request) -> None:
    with place.running_terms():
        assert service.running_terms == 0, "terms of two steps overlap"
        service.running_terms += 1
        try:
            for _ in range(request.delay):
                await asyncio.sleep(0)
            if request.outcome == "term_fails":
                raise NonFiniteLoss("nan", name="l1")
        finally:
            service.running_terms -= 1


@settings(max_examples=400)
@given(burst=st.lists(requests, min_size=1, max_size=9), seed=st.integers(0, 2**16))
async def test_invariants_hold_for_random_bursts(burst: list[Request], seed: int):
    lane, service = Lane(), FuzzedService(seed)
    tasks = [asyncio.create_task(fuzzed_request(lane, service, index, request)) for index, request in enumerate(burst)]

    async def cancel(task: asyncio.Task[None], after: int) -> None:
        for _ in range(after):
            await asyncio.sleep(0)
        task.cancel()

    cancels = [
        asyncio.create_task(cancel(task, request.cancel_after))
        for task, request in zip(tasks, burst, strict=True)
        if request.cancel_after is not None
    ]
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks, *cancels, return_exceptions=True)
    await lane.drain(5.0)
    assert lane.is_empty

    numbers = [number for number, _, _ in service.log]
    assert numbers == list(range(1, len(numbers) + 1)), "gap or disorder"
    applied = [(index, part) for _, index, part in service.log if part not in ("F", "read")]
    assert [index for index, _ in applied] == sorted(index for index, _ in applied), "order of places"
    sent = {index for index, _ in applied}
    for index, part in applied:
        if part == "update":
            earlier = [i for i in range(index) if burst[i].kind in ("custom", "gradient")]
            assert all(i in sent for i in earlier), "an update was sent though a gradient before it was not"
    for position, (_, index, part) in enumerate(service.log):
        if part == "F":
            before = {i for _, i, p in service.log[:position] if p not in ("F", "read")}
            updates_before_place = {i for i in range(index) if burst[i].kind == "update" and i in sent}
            assert updates_before_place <= before, "F crossed an update"
    # What follows a burst works normally.
    place = lane.enter(Kind.UPDATE)
    await place.submit(1, service.send(len(burst), "update", False))
    place.leave()
    assert service.log[-1][0] == len(numbers) + 1
