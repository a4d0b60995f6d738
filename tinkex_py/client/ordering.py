"""The order of one training client's requests, and their sequence numbers.

A request enters before its first suspension and sends when every earlier request has happened or left. Numbers are
assigned at the hand-over, never ahead, so a request that fails, is cancelled or times out before that leaves no gap. A
gradient or update that leaves without having happened breaks the requests behind it: they raise
PrecedingRequestFailed, because an optim_step must never apply the gradients of a step that did not happen. Requests
that enter after a break work normally.
"""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

from tinkex_py import telemetry
from tinkex_py.client.accumulation import Accumulation
from tinkex_py.errors import (
    ClientClosed,
    PrecedingRequestFailed,
    RequestFailed,
    RequestInsideStep,
    ResultLost,
    SequenceLost,
    TinkexError,
)
from tinkex_py.limits import running_loop
from tinkex_py.transport.api import Sent

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)

# The embedded service reports a missing number in these words.
_GAP = re.compile(r"seq_id \d{1,18} waits for seq_id (\d{1,18})")


class Kind(Enum):
    """The effect of a request on the model."""

    GRADIENT = auto()
    UPDATE = auto()
    READ = auto()


class Submission(ABC, Generic[Value_co]):
    """Requests that are submitted together, under consecutive sequence numbers."""

    @abstractmethod
    async def prepare(self) -> int:
        """Does everything that can fail before numbers are assigned; returns the count of numbers."""

    def handed_over(self) -> None:
        """Called when the numbers are assigned, before any other code can run."""

    @abstractmethod
    async def submit(self, numbers: Sequence[int]) -> Sequence[Sent]:
        """Sends the same bytes under these numbers until there is a final response to each.

        Raises:
            APIStatusError, TransportError: it is unknown whether a number arrived.
        """

    def submitted(self, sent: Sequence[Sent]) -> None:
        """Called with the final responses, even if the caller was cancelled."""

    @abstractmethod
    async def result(self, sent: Sequence[Sent]) -> Value_co:
        """Waits for the result."""


class Ordering:
    """The turns and sequence numbers of one training client.

    Args:
        model_id: id of the model.
        accumulation: the gradients that the service holds; errors report their number.

    Attributes:
        next_number: the sequence number of the next submission.
        lost: the reason why nothing more can be sent: a number may be lost, or the client is closed.
    """

    def __init__(self, model_id: str, accumulation: Accumulation) -> None:
        self.next_number = 1
        self.lost: SequenceLost | ClientClosed | None = None
        self._model_id = model_id
        self._accumulation = accumulation
        # Numbers that were refused, or whose result is lost. A service counts them, but a proxy that refuses a request
        # does not forward its number.
        self._refused: set[int] = set()
        self._turns: list[Turn] = []
        self._entered = 0
        self._loop = asyncio.get_running_loop()
        self._wire_is_taken = False
        self._waiting: dict[asyncio.Event, None] = {}  # in waiting order
        self._in_flight: set[asyncio.Task[Sequence[Sent]]] = set()

    @asynccontextmanager
    async def enter(self, kind: Kind, operation: str, *, forward_only: bool = False) -> "AsyncGenerator[Turn]":
        """Takes a turn for one request and adds the state of the service to its errors.

        Args:
            kind: the effect of the request on the model.
            operation: its name in events.
            forward_only: the request is allowed inside a term of the running step.

        Raises:
            RequestInsideStep: called inside a term of this client's running step, and not forward-only.
            SequenceLost: a sequence number may be lost.
            ClientClosed: the client is closed, or belongs to another event loop.
        """
        turn = self._new_turn(kind, forward_only=forward_only)
        try:
            with telemetry.lifecycle("tinkex.training", {"operation": operation, "model_id": self._model_id}):
                yield turn
        except Exception as error:
            if isinstance(error, TinkexError):
                self._explain(error, turn)
            if not turn.numbers:
                await asyncio.sleep(0)  # requests that start together with this one enter before it fails
            raise
        finally:
            self._leave(turn)

    def check_loop(self) -> None:
        """Raises ClientClosed on any other event loop than the first one."""
        if running_loop() is not self._loop:
            raise ClientClosed("this training client belongs to another event loop: create one client per loop")

    @property
    def is_unused(self) -> bool:
        """True until the first request enters."""
        return self.next_number == 1 and not self._turns

    @property
    def is_empty(self) -> bool:
        """True if no request has a turn and nothing is in flight."""
        return not self._turns and not self._in_flight

    def check_reason(self, reason: str) -> None:
        """Raises SequenceLost if the service waits for a number that a proxy refused.

        Args:
            reason: why the service has not started a request, in its own words.
        """
        gap = _GAP.search(reason)
        if gap is not None and int(gap[1]) in self._refused:
            raise self.end_behind(int(gap[1]), "nothing after it is executed")

    def end_behind(self, number: int, consequence: str) -> SequenceLost | ClientClosed:
        """Ends the ordering because a number will never reach the service; returns the error."""
        return self.end(
            SequenceLost(
                f"the service waits for request {number}, which a proxy answered without forwarding it, so "
                f"{consequence}. Continue with service.create_training_client_from_state(path, with_optimizer=True)"
            )
        )

    def end(self, error: SequenceLost | ClientClosed) -> SequenceLost | ClientClosed:
        """Ends the ordering: nothing more is sent. Returns the error of the first reason."""
        self.lost = self.lost or error
        self.wake_all()
        return _again(self.lost)

    async def drain(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for submissions in flight, then cancels them."""
        self.check_loop()
        if not self._in_flight:
            return
        _, pending = await asyncio.wait(set(self._in_flight), timeout=timeout)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)

    def _new_turn(self, kind: Kind, *, forward_only: bool) -> "Turn":
        if self.lost is not None:
            raise _again(self.lost)
        self.check_loop()
        host = self.step_around()
        if host is not None and not forward_only:
            raise RequestInsideStep(
                "a term may only call forward() of the training client that runs it: any other request would wait for "
                "the term's own step. Make this request after forward_backward_custom has returned"
            )
        if host is not None:
            return Turn(self, Kind.READ, host.turn.index, host=host)
        self._entered += 1
        turn = Turn(self, kind, self._entered)
        self._turns.append(turn)
        return turn

    def step_around(self) -> "_RunningStep | None":
        """Returns the custom step of this client whose terms run the caller, on any thread."""
        steps = (step for step in _steps.get() if step.is_running and step.turn in self._turns)
        return next(steps, None)

    def _leave(self, turn: "Turn") -> None:
        turn.left = True
        if turn in self._turns:
            if not (turn.happened or turn.broken is not None or turn.kind is Kind.READ):
                self.break_behind(turn)
            self._remove_if_over(turn)

    def _remove_if_over(self, turn: "Turn") -> None:
        if turn.left and not turn.in_flight and turn in self._turns:
            self._turns.remove(turn)
        self.wake_all()

    def has_turn(self, turn: "Turn") -> bool:
        """Returns whether every earlier request has happened or left."""
        return all(other.happened or other.left or other.index >= turn.index for other in self._turns)

    def is_next_behind_terms(self, turn: "Turn") -> bool:
        """Returns whether this only waits for one custom step, whose forward pass has its result."""
        ahead = [other for other in self._turns if other.index < turn.index and not (other.happened or other.left)]
        return len(ahead) == 1 and ahead[0].has_logprobs

    def may_start_terms(self, turn: "Turn") -> bool:
        """Returns whether the gradient of every earlier custom step was accepted, or will never be sent."""
        return not any(
            other.index < turn.index
            and other.has_logprobs
            and not other.accepted
            and (not other.left or other.in_flight)
            for other in self._turns
        )

    def break_behind(self, turn: "Turn") -> None:
        """Makes every later request that has not happened raise PrecedingRequestFailed.

        A broken request keeps its turn until it leaves, so that its terms do not overlap with those of the next step.
        """
        for other in self._turns:
            if other.index > turn.index and not other.happened and other.broken is None:
                other.broken = PrecedingRequestFailed(
                    f"an earlier {turn.kind.name.lower()} request of this training client did not take effect, so "
                    "this one was not sent; it is safe to call it again"
                )
        self.wake_all()

    async def hand_over(self, turn: "Turn", submission: Submission[Value], *, last: bool) -> Sequence[Sent]:
        """Assigns the numbers of a submission and sends it; one submission is on the wire at a time.

        A submission that was handed over is completed even if the caller is cancelled.
        """
        count = await submission.prepare()
        await self.until_answered(turn)
        turn.check()
        self._wire_is_taken = True
        numbers = range(self.next_number, self.next_number + count)
        self.next_number += count
        turn.numbers += numbers
        turn.happened = last
        turn.in_flight = True
        submission.handed_over()
        task = asyncio.create_task(self._deliver(turn, submission, numbers), name="tinkex.submission")
        self._in_flight.add(task)
        task.add_done_callback(self._landed)
        self.wake_all()
        return await asyncio.shield(task)

    async def until_answered(self, turn: "Turn") -> None:
        """Waits until every submission handed over before has a response."""
        while self._wire_is_taken:
            await self.change()
            turn.check()

    def give_back(self, turn: "Turn") -> None:
        """Reuses the turn's last number, which the service did not count, unless a later one is assigned."""
        if turn.numbers and turn.numbers[-1] + 1 == self.next_number:
            self.next_number -= 1

    async def _deliver(self, turn: "Turn", submission: Submission[Value], numbers: range) -> Sequence[Sent]:
        try:
            sent = await submission.submit(numbers)
            submission.submitted(sent)
        except asyncio.CancelledError:
            if self.lost is None:
                raise
            raise _again(self.lost) from None  # cut off by `drain`: its caller was not cancelled
        except Exception as error:
            # Any error: the numbers are assigned, and it is unknown whether they arrived.
            raise self._lose(numbers, error) from error
        finally:
            turn.in_flight = False
            self._wire_is_taken = False
            self._remove_if_over(turn)
        refused = [one.number for one in sent if one.refusal is not None]
        self._refused.update(refused)
        turn.accepted = turn.happened and len(refused) < len(sent)
        if refused and turn.happened and turn.kind is not Kind.READ:
            self.break_behind(turn)
        return sent

    def _landed(self, task: asyncio.Task[Sequence[Sent]]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here because the caller may have been cancelled

    def _lose(self, numbers: range, error: Exception) -> SequenceLost | ClientClosed:
        numbered = f"request {numbers[0]}" if len(numbers) == 1 else f"requests {numbers[0]} to {numbers[-1]}"
        return self.end(
            SequenceLost(
                f"{numbered} got no final response ({type(error).__name__}: {error}), so the state of the service is "
                "unknown. Continue with service.create_training_client_from_state(path, with_optimizer=True)"
            )
        )

    def _explain(self, error: TinkexError, turn: "Turn") -> None:
        """Adds the state of the service to an error, and breaks the requests behind one that failed there."""
        if turn.kind is not Kind.READ:
            error.accumulated = self._accumulation.count
            error.was_sent = turn.kind is Kind.GRADIENT and bool(turn.numbers)
        if isinstance(error, ResultLost):
            self._refused.update(turn.numbers)
        if isinstance(error, RequestFailed) and turn.kind is not Kind.READ:
            self.break_behind(turn)
            error.handed_over = tuple(range(max(turn.numbers, default=0) + 1, self.next_number))
            if error.handed_over:
                error.add_note(f"requests {list(error.handed_over)} were already handed over and may be executed")

    async def change(self) -> None:
        """Waits for the next change of this ordering."""
        changed = asyncio.Event()
        self._waiting[changed] = None
        try:
            await changed.wait()
        finally:
            del self._waiting[changed]

    def wake_all(self) -> None:
        """Wakes every `change()`."""
        for changed in self._waiting:
            changed.set()


class Turn:
    """The turn of one request.

    Attributes:
        happened: its last submission was handed over.
        accepted: the service accepted that submission.
        left: the request has ended.
        in_flight: one of its submissions has no final response yet.
        has_logprobs: it is a custom step whose forward pass has its result.
        numbers: its sequence numbers.
        broken: why nothing more of it may be sent.
    """

    def __init__(self, ordering: Ordering, kind: Kind, index: int, *, host: "_RunningStep | None" = None) -> None:
        self.kind = kind
        self.index = index
        self.happened = False
        self.accepted = False
        self.left = False
        self.in_flight = False
        self.has_logprobs = False
        self.numbers: list[int] = []
        self.broken: PrecedingRequestFailed | None = None
        self._ordering = ordering
        self._host = host

    async def reached(self, *, early: bool = False) -> None:
        """Waits until every earlier request has happened or left; the request of a term runs in its step's turn.

        Args:
            early: also return when the only earlier request is a custom step that awaits its terms. A forward pass
                changes nothing, so its logprobs are the same before and after that step's backward pass.

        Raises:
            PrecedingRequestFailed: an earlier gradient or update did not happen.
            SequenceLost, ClientClosed: nothing more can be sent.
        """
        ordering = self._ordering
        self.check()
        while not (
            self._host is not None or ordering.has_turn(self) or (early and ordering.is_next_behind_terms(self))
        ):
            await ordering.change()
            self.check()

    async def send(self, submission: Submission[Value], *, last: bool = True, early: bool = False) -> Value:
        """Hands a submission over when the turn is reached, and waits for its result; raises like `reached`.

        Args:
            submission: the requests.
            last: whether the request has happened with this submission.
            early: as for `reached`.
        """
        await self.reached(early=early)
        sent = await self._ordering.hand_over(self, submission, last=last)
        return await submission.result(sent)

    async def quiet(self) -> None:
        """Waits for the turn and for every submission handed over before; raises like `reached`."""
        await self.reached()
        await self._ordering.until_answered(self)

    @asynccontextmanager
    async def running_terms(self) -> AsyncGenerator[None]:
        """Waits until the earlier gradients are accepted; forward passes inside the block run in this turn.

        Raises like `reached`, before any term is called.
        """
        self.has_logprobs = True
        self._ordering.wake_all()
        self.check()
        while not self._ordering.may_start_terms(self):
            await self._ordering.change()
            self.check()
        step = _RunningStep(self)
        token = _steps.set((*_steps.get(), step))
        try:
            yield
        finally:
            step.is_running = False
            _steps.reset(token)

    def check(self) -> None:
        """Raises the reason, if there is one, why nothing more of this request may be sent."""
        if self._ordering.lost is not None:
            raise _again(self._ordering.lost)
        if self._host is not None:
            if not self._host.is_running or self._host.turn.left:
                raise PrecedingRequestFailed("the step whose term made this forward pass has ended; nothing was sent")
            self._host.turn.check()
        if self.broken is not None:
            raise self.broken


@dataclass(eq=False)
class _RunningStep:
    """Marks code that runs inside the terms of a custom step, until the step ends."""

    turn: Turn
    is_running: bool = True


_steps: ContextVar[tuple[_RunningStep, ...]] = ContextVar("tinkex_steps", default=())


def _again(error: SequenceLost | ClientClosed) -> SequenceLost | ClientClosed:
    """Returns a new exception with the same message: one object raised in many tasks collects their tracebacks."""
    return type(error)(*error.args)
