"""The order of one training client's requests, and their sequence numbers.

A request enters before its first suspension and then has a turn: the first one that has not yet happened. Numbers are
taken at hand-over to the wire, never ahead, so a request that fails, is cancelled or times out before that leaves no
gap. A gradient or update that leaves without having happened breaks what is behind it: those requests raise
PrecedingRequestFailed, because an optim_step must never run on the gradients of a step that did not happen. Requests
made after a break work normally.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from tinkex_py import telemetry
from tinkex_py.client.accumulation import Accumulation
from tinkex_py.client.submission import Submission
from tinkex_py.errors import (
    ClientClosed,
    PrecedingRequestFailed,
    RequestFailed,
    RequestInsideStep,
    ResultLost,
    SequenceLost,
    TinkexError,
)
from tinkex_py.transport.api import Sent

Value = TypeVar("Value")

# How the embedded service says that a number never came.
_GAP = re.compile(r"seq_id \d{1,18} waits for seq_id (\d{1,18})")


class Kind(Enum):
    """What a request does to the model."""

    GRADIENT = auto()
    UPDATE = auto()
    READ = auto()


class Ordering:
    """The turns of one training client, and its sequence numbers.

    Args:
        model_id: the model.
        accumulation: what the service holds; errors report it.

    Attributes:
        next_number: the number that the next submission gets.
        lost: set once a number may truly be lost.
    """

    def __init__(self, model_id: str, accumulation: Accumulation) -> None:
        self.next_number = 1
        self.lost: SequenceLost | ClientClosed | None = None
        self._model_id = model_id
        self._accumulation = accumulation
        # Numbers with a final refusal, or whose result the service does not know. A service spends them too, but a
        # proxy that answers by itself does not pass them on.
        self._refused: set[int] = set()
        self._turns: list[Turn] = []
        self._entered = 0
        self._loop = asyncio.get_running_loop()
        self._wire_is_taken = False
        self._waiting: dict[asyncio.Event, None] = {}  # in the order in which they began to wait
        self._in_flight: set[asyncio.Task[Sequence[Sent]]] = set()

    @asynccontextmanager
    async def enter(self, kind: Kind, operation: str, *, forward_only: bool = False) -> "AsyncGenerator[Turn]":
        """Takes a turn around one request; its errors say what the service already holds.

        Args:
            kind: what the request does to the model.
            operation: its name in events.
            forward_only: a term of the running step may ask for it.

        Raises:
            RequestInsideStep: called from inside a term of this client's running step, and not forward-only.
            SequenceLost: the ordering cannot go on.
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
                await asyncio.sleep(0)  # requests started together with this one enter before it fails
            raise
        finally:
            self._leave(turn)

    def check_loop(self) -> None:
        """Raises ClientClosed on an event loop that is not this ordering's."""
        if asyncio.get_running_loop() is not self._loop:
            raise ClientClosed("this training client belongs to another event loop: make one client per loop")

    @property
    def is_unused(self) -> bool:
        """True until the first number is taken or a request waits for one."""
        return self.next_number == 1 and not self._turns

    @property
    def is_empty(self) -> bool:
        """True if no request has a turn and nothing is in flight."""
        return not self._turns and not self._in_flight

    def check_reason(self, reason: str) -> None:
        """Reads why the service has not begun with a request.

        Raises:
            SequenceLost: it waits for a number that will never come, because something on the way refused it.
        """
        gap = _GAP.search(reason)
        if gap is not None and int(gap[1]) in self._refused:
            raise self.end_behind(int(gap[1]), "nothing after it is executed")

    def end_behind(self, number: int, consequence: str) -> SequenceLost | ClientClosed:
        """Ends the ordering because a number will never reach the service; gives the error of it."""
        return self.end(
            SequenceLost(
                f"the service waits for request {number}, which was answered on the way to it (by a proxy?) and will "
                f"never come, so {consequence}. Go on with "
                "service.create_training_client_from_state(path, with_optimizer=True)"
            )
        )

    def end(self, error: SequenceLost | ClientClosed) -> SequenceLost | ClientClosed:
        """Nothing can be sent any more; the first reason stays, and is given."""
        self.lost = self.lost or error
        self.wake_all()
        return _again(self.lost)

    async def drain(self, timeout: float) -> None:
        """Waits for what is in flight, at most `timeout` seconds, then cancels it.

        Raises:
            ClientClosed: called on another event loop.
        """
        self.check_loop()
        if not self._in_flight:
            return
        _, pending = await asyncio.wait(set(self._in_flight), timeout=timeout)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)

    # Turns

    def _new_turn(self, kind: Kind, *, forward_only: bool) -> "Turn":
        if self.lost is not None:
            raise _again(self.lost)
        self.check_loop()
        host = self.step_around()
        if host is not None and not forward_only:
            raise RequestInsideStep(
                "a term asked its own training client for something other than a forward pass, which would have to "
                "wait for the step the term belongs to; do it after forward_backward_custom has returned"
            )
        if host is not None:
            return Turn(self, Kind.READ, host.turn.index, host=host)
        self._entered += 1
        turn = Turn(self, kind, self._entered)
        self._turns.append(turn)
        return turn

    def step_around(self) -> "_RunningStep | None":
        """The custom step of this client inside whose terms the caller runs, on whatever thread."""
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
        """True if every earlier request has happened or left."""
        return all(other.happened or other.left or other.index >= turn.index for other in self._turns)

    def is_next_behind_terms(self, turn: "Turn") -> bool:
        """True if all that has to happen before this is one custom step whose forward pass is answered."""
        ahead = [other for other in self._turns if other.index < turn.index and not (other.happened or other.left)]
        return len(ahead) == 1 and ahead[0].has_logprobs

    def may_start_terms(self, turn: "Turn") -> bool:
        """True if the gradient of every custom step before this one was accepted, or will never be sent."""
        return not any(
            other.index < turn.index
            and other.has_logprobs
            and not other.accepted
            and (not other.left or other.in_flight)
            for other in self._turns
        )

    def break_behind(self, turn: "Turn") -> None:
        """Everything behind `turn` that has not happened raises PrecedingRequestFailed.

        A broken request keeps its turn until it leaves: a step whose terms still run must not overlap with the next.
        """
        for other in self._turns:
            if other.index > turn.index and not other.happened and other.broken is None:
                other.broken = PrecedingRequestFailed(
                    f"an earlier {turn.kind.name.lower()} request of this training client did not take effect, so "
                    "this one was not sent; it is safe to call it again"
                )
        self.wake_all()

    # The wire

    async def hand_over(self, turn: "Turn", submission: Submission[Value], *, last: bool) -> Sequence[Sent]:
        """Gives a submission its numbers and sends it; one submission is on the wire at a time.

        Once handed over it is sent to its end, even if the caller is cancelled.
        """
        count = await submission.prepare()
        while self._wire_is_taken:
            await self.change()
            turn.check()
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
        """Waits until all that was handed over before has been answered."""
        while self._wire_is_taken:
            await self.change()
            turn.check()

    def give_back(self, turn: "Turn") -> None:
        """The service did not count the turn's last number: the next request takes it, unless a later one is out."""
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
            # Whatever it was: the numbers are taken, and whether they arrived is unknown.
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
            task.exception()  # retrieved here too: the caller may be gone

    def _lose(self, numbers: range, error: Exception) -> SequenceLost | ClientClosed:
        numbered = f"request {numbers[0]}" if len(numbers) == 1 else f"requests {numbers[0]} to {numbers[-1]}"
        return self.end(
            SequenceLost(
                f"{numbered} got no final response ({type(error).__name__}: {error}), so the order on the service is "
                "no longer known. Go on with service.create_training_client_from_state(path, with_optimizer=True)"
            )
        )

    def _explain(self, error: TinkexError, turn: "Turn") -> None:
        """Adds to an error what the service holds, and breaks what is behind a request that it failed."""
        if turn.kind is not Kind.READ:
            error.accumulated = self._accumulation.count
        if isinstance(error, ResultLost):
            self._refused.update(turn.numbers)
        if isinstance(error, RequestFailed) and turn.kind is not Kind.READ:
            self.break_behind(turn)
            error.handed_over = tuple(range(max(turn.numbers, default=0) + 1, self.next_number))
            if error.handed_over:
                error.add_note(f"requests {list(error.handed_over)} had been handed over already and may be executed")

    async def change(self) -> None:
        """Waits until something in this ordering has changed."""
        changed = asyncio.Event()
        self._waiting[changed] = None
        try:
            await changed.wait()
        finally:
            del self._waiting[changed]

    def wake_all(self) -> None:
        """Lets everything that waits look again."""
        for changed in self._waiting:
            changed.set()


class Turn:
    """One request's turn.

    Attributes:
        happened: its last submission was handed over.
        accepted: the service accepted that submission.
        left: the request is over.
        in_flight: a submission of it has no final response yet.
        has_logprobs: it is a custom step whose forward pass was answered.
        numbers: the sequence numbers it was given.
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
        """Waits until every earlier request has happened or left; a term's request runs inside its step's turn.

        Args:
            early: being the next behind a custom step that only awaits its terms is enough. A forward pass changes
                nothing, so it gives the same logprobs before that step's backward pass as after it.

        Raises:
            PrecedingRequestFailed: an earlier gradient or update did not happen, so this must not either.
            SequenceLost, ClientClosed: the ordering cannot go on.
        """
        ordering = self._ordering
        self.check()
        while not (
            self._host is not None or ordering.has_turn(self) or (early and ordering.is_next_behind_terms(self))
        ):
            await ordering.change()
            self.check()

    async def send(self, submission: Submission[Value], *, last: bool = True, early: bool = False) -> Value:
        """Hands a submission over when the turn is reached, and waits for its result.

        Args:
            submission: what is sent.
            last: with it the request has happened.
            early: as for `reached`.

        Raises:
            PrecedingRequestFailed, SequenceLost, ClientClosed: as `reached`; nothing was sent.
        """
        await self.reached(early=early)
        sent = await self._ordering.hand_over(self, submission, last=last)
        return await submission.result(sent)

    async def quiet(self) -> None:
        """Waits for the turn, and until all that was handed over before has been answered; raises like `reached`."""
        await self.reached()
        await self._ordering.until_answered(self)

    @asynccontextmanager
    async def running_terms(self) -> AsyncGenerator[None]:
        """The terms of a custom step, once its forward pass is answered and the steps before it are accepted.

        Their forward passes run inside this turn. Raises like `reached`; then no term is to be called.
        """
        self.has_logprobs = True
        self._ordering.wake_all()
        self.check()
        while not self._ordering.may_start_terms(self):
            await self._ordering.change()
            self.check()
        with _running(self):
            yield

    def check(self) -> None:
        """Raises why nothing of this request may be sent, if there is a reason."""
        if self._ordering.lost is not None:
            raise _again(self._ordering.lost)
        if self._host is not None:
            if not self._host.is_running or self._host.turn.left:
                raise PrecedingRequestFailed(
                    "the step whose term asked for this forward pass has ended; nothing was sent"
                )
            self._host.turn.check()
        if self.broken is not None:
            raise self.broken


@dataclass(eq=False)
class _RunningStep:
    """Marks code that runs inside the terms of a custom step; it ends with the step."""

    turn: Turn
    is_running: bool = True


_steps: ContextVar[tuple[_RunningStep, ...]] = ContextVar("tinkex_steps", default=())


@contextmanager
def _running(turn: Turn) -> Generator[None]:
    step = _RunningStep(turn)
    token = _steps.set((*_steps.get(), step))
    try:
        yield
    finally:
        step.is_running = False
        _steps.reset(token)


def _again(error: SequenceLost | ClientClosed) -> SequenceLost | ClientClosed:
    """A fresh exception with the same message: one object raised in many tasks would collect their tracebacks."""
    return type(error)(*error.args)
