"""The order of a training client's requests, tested against a model of the service.

The model is independent of the implementation. It numbers what arrives, takes a repeated number for the same request,
and derives from the rules (which request had no effect, which requests follow it) how each must end.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tinkex_py.client.accumulation import Accumulation
from tinkex_py.client.ordering import Kind, Ordering, Turn
from tinkex_py.errors import (
    BadRequest,
    ConnectionFailed,
    NonFiniteLoss,
    PrecedingRequestFailed,
    RequestFailed,
    SequenceLost,
)
from tinkex_py.transport.api import Sent

KINDS = {"custom": Kind.GRADIENT, "gradient": Kind.GRADIENT, "update": Kind.UPDATE, "read": Kind.READ}
# Turns of the loop after which everything waits for the test.
TURNS = 25
BURSTS = st.lists(
    st.tuples(st.sampled_from(["custom", *sorted(KINDS)]), st.booleans(), st.integers(1, 2)), min_size=1, max_size=3
)
OWN_FAILURES = (BadRequest, NonFiniteLoss, RequestFailed)


@dataclass
class Request:
    """One request and its expected state.

    Attributes:
        happened: its last submission was handed over.
        broken: an earlier write had no effect when this one was handed over.
    """

    index: int
    kind: str
    early: bool
    chunks: int
    task: "asyncio.Task[None] | None" = None
    happened: bool = False
    accepted: bool = False
    refused: bool = False
    broken: bool = False
    left: bool = False
    cancelled: bool = False
    terms: "asyncio.Future[None] | None" = None
    result: "asyncio.Future[None] | None" = None

    @property
    def writes(self) -> bool:
        return self.kind != "read"


@dataclass
class Work:
    """One submission of a request."""

    machine: "Requests"
    request: Request
    part: str
    count: int = 1

    @property
    def is_last(self) -> bool:
        return self.part != "F"

    async def prepare(self) -> int:
        return self.count

    def handed_over(self) -> None:
        assert not self.request.broken, "a broken request was sent"
        self.request.happened = self.is_last

    async def submit(self, numbers: Sequence[int]) -> Sequence[Sent]:
        return await self.machine.deliver(self.request, self.part, numbers, last=self.is_last)

    def submitted(self, sent: Sequence[Sent]) -> None:
        pass

    async def result(self, sent: Sequence[Sent]) -> None:
        if sent[0].refusal is not None:
            raise sent[0].refusal
        if self.is_last:
            self.request.result = asyncio.get_running_loop().create_future()
            await self.request.result


@dataclass
class Service:
    """Checks what arrives: each number once, in order, one submission at a time."""

    log: list[tuple[int, int, str]] = field(default_factory=list)
    answer: "asyncio.Future[str] | None" = None

    def receive(self, number: int, index: int, part: str) -> None:
        known = next((entry for entry in self.log if entry[0] == number), None)
        if known is None:
            assert number == len(self.log) + 1, f"number {number} came after {len(self.log)}"
            self.log.append((number, index, part))
        assert known in (None, (number, index, part)), "two requests have one number"


class Requests(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.ordering: Ordering = self.run(self.make_ordering)
        self.service = Service()
        self.requests: list[Request] = []
        self.lost = False
        self.in_terms: list[int] = []

    def run(self, work: Callable[[], Awaitable[Any]]) -> Any:
        async def then_settle() -> Any:
            made = await work()
            for _ in range(TURNS):
                await asyncio.sleep(0)
            return made

        return self.loop.run_until_complete(then_settle())

    async def make_ordering(self) -> Ordering:
        return Ordering("model", Accumulation())

    # The client's side

    async def deliver(self, request: Request, part: str, numbers: Sequence[int], *, last: bool) -> Sequence[Sent]:
        before = [other for other in self.requests[: request.index] if not (other.happened or other.left)]
        assert len(before) <= (part == "F" and request.early), "it was sent before its turn"
        while True:
            assert self.service.answer is None, "two submissions on the wire"
            for number in numbers:
                self.service.receive(number, request.index, part)
            self.service.answer = asyncio.get_running_loop().create_future()
            try:
                outcome = await self.service.answer
            finally:
                self.service.answer = None
            if outcome == "again":  # the response was lost: the request is repeated with its number
                continue
            if outcome == "refused":
                request.refused = last
                if last and request.writes:
                    self.break_behind(request)
                return [Sent(number, refusal=BadRequest("refused", status=422)) for number in numbers]
            if outcome == "gone":
                self.lost = True
                raise ConnectionFailed("nothing answers any more")
            if last:
                request.accepted = True
            return [Sent(number, request_id=part) for number in numbers]

    async def work(self, request: Request) -> None:
        try:
            async with self.ordering.enter(KINDS[request.kind], request.kind) as turn:
                try:
                    if request.kind == "custom":
                        await turn.send(Work(self, request, "F"), last=False, early=request.early)
                        await self.run_terms(request, turn)
                        await turn.send(Work(self, request, "B"))
                    else:
                        await turn.send(Work(self, request, request.kind, request.chunks))
                finally:
                    request.left = True
                    if request.writes and not request.happened and not request.broken:
                        self.break_behind(request)
        except RequestFailed:
            if request.writes:
                self.break_behind(request)
            raise

    async def run_terms(self, request: Request, turn: Turn) -> None:
        async with turn.running_terms():
            self.in_terms.append(request.index)
            assert len(self.in_terms) == 1, "terms of two steps overlap"
            under_way = [r for r in self.requests[: request.index] if r.kind == "custom" and r.happened]
            assert all(r.accepted or r.broken or r.refused for r in under_way), "terms before an acceptance"
            request.terms = asyncio.get_running_loop().create_future()
            try:
                await request.terms
            finally:
                self.in_terms.remove(request.index)
                request.terms = None

    def break_behind(self, request: Request) -> None:
        for other in self.requests[request.index + 1 :]:
            other.broken = other.broken or not (other.happened or other.left)

    # Rules

    def waiting(self, what: str) -> list[Request]:
        found = [(request, getattr(request, what)) for request in self.requests]
        return [request for request, future in found if future is not None and not future.done()]

    def unfinished(self) -> list[Request]:
        return [request for request in self.requests if request.task is not None and not request.task.done()]

    @precondition(lambda self: len(self.unfinished()) < 8)
    @rule(burst=BURSTS)
    def submit_requests(self, burst: list[tuple[str, bool, int]]) -> None:
        for kind, early, chunks in burst:
            self.submit_a_request(kind, early, chunks)

    def submit_a_request(self, kind: str, early: bool, chunks: int) -> None:
        request = Request(len(self.requests), kind, early, chunks)
        self.requests.append(request)

        async def start() -> None:
            request.task = asyncio.get_running_loop().create_task(self.work(request))

        self.run(start)

    @precondition(lambda self: self.service.answer is not None and not self.service.answer.done())
    @rule(outcome=st.sampled_from(["fine"] * 12 + ["again"] * 4 + ["refused"] * 3 + ["gone"]))
    def answer_the_submission(self, outcome: str) -> None:
        async def answer() -> None:
            assert self.service.answer is not None
            self.service.answer.set_result(outcome)

        self.run(answer)

    @precondition(lambda self: self.waiting("terms"))
    @rule(fails=st.booleans())
    def end_terms(self, fails: bool) -> None:
        (request,) = self.waiting("terms")

        async def end() -> None:
            assert request.terms is not None
            if fails:
                request.terms.set_exception(NonFiniteLoss("nan", name="l1"))
            else:
                request.terms.set_result(None)

        self.run(end)

    @precondition(lambda self: self.waiting("result"))
    @rule(which=st.integers(0, 7), fails=st.sampled_from([False, False, True]))
    def give_a_result(self, which: int, fails: bool) -> None:
        candidates = self.waiting("result")
        request = candidates[which % len(candidates)]

        async def give() -> None:
            assert request.result is not None
            if fails:
                request.result.set_exception(RequestFailed("failed on the service"))
            else:
                request.result.set_result(None)

        self.run(give)

    @precondition(lambda self: self.unfinished())
    @rule(which=st.integers(0, 7))
    def cancel_a_request(self, which: int) -> None:
        candidates = self.unfinished()
        request = candidates[which % len(candidates)]

        async def cancel() -> None:
            assert request.task is not None
            request.cancelled = request.task.cancel()

        self.run(cancel)

    @rule(times=st.integers(1, 4))
    def continue_normally(self, times: int) -> None:
        """Continues without failures for some steps."""
        for _ in range(times):
            if self.service.answer is not None and not self.service.answer.done():
                self.answer_the_submission("fine")
            elif self.waiting("terms"):
                self.end_terms(False)

    # Invariants

    @invariant()
    def every_request_ends_as_the_rules_say(self) -> None:
        for request in self.requests:
            if request.task is None or not request.task.done():
                continue
            if request.task.cancelled():
                assert request.cancelled, "an unrequested cancellation"
                continue
            error = request.task.exception()
            if isinstance(error, PrecedingRequestFailed):
                assert request.broken, f"request {request.index} was broken without a cause"
            elif isinstance(error, SequenceLost):
                assert self.lost
            elif error is None:
                assert request.happened
                assert not request.broken
            else:
                assert isinstance(error, OWN_FAILURES), repr(error)

    @invariant()
    def the_service_receives_writes_in_the_order_of_the_calls(self) -> None:
        writes = [index for _, index, part in self.service.log if part not in ("F", "read")]
        assert writes == sorted(writes)

    @invariant()
    def no_update_without_every_gradient_before_it(self) -> None:
        for position, (_, index, part) in enumerate(self.service.log):
            if part == "update":
                before = {other for _, other, other_part in self.service.log[:position] if other_part != "F"}
                missing = [r for r in self.requests[:index] if KINDS[r.kind] is Kind.GRADIENT and r.index not in before]
                # A failed gradient breaks the requests behind it: only later calls may be sent.
                assert all(request.left and request.index not in before for request in missing)
                assert not self.requests[index].broken

    @invariant()
    def no_forward_pass_crosses_an_update(self) -> None:
        for position, (_, index, part) in enumerate(self.service.log):
            if part == "F":
                sent_later = {other for _, other, what in self.service.log[position:] if what == "update"}
                assert not any(other < index for other in sent_later)

    def teardown(self) -> None:
        """Checks that the remaining requests end when answered, and that the ordering still works."""
        for _ in range(100):
            self.continue_normally(2)
            if self.waiting("result"):
                self.give_a_result(0, False)
        left = self.unfinished()
        self.every_request_ends_as_the_rules_say()
        if not self.lost and not left:
            count = len(self.service.log)
            self.submit_a_request("update", False, 1)
            self.answer_the_submission("fine")
            self.give_a_result(0, False)
            assert self.service.log[count:] == [(count + 1, len(self.requests) - 1, "update")]
        is_empty = self.ordering.is_empty
        for request in left:
            assert request.task is not None
            request.task.cancel()
        self.run(self.make_ordering)
        self.loop.close()
        assert not left, f"requests that do not end: {left}"
        assert is_empty


class TestOrdering(Requests.TestCase):
    settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
