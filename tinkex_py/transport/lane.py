"""The order of one training client's requests.

A request takes its place in the lane before its first suspension. The first place that has not yet happened
has the turn. Sequence numbers are taken at hand-over to the wire, never ahead, so a request that fails,
is cancelled or times out before that leaves no gap. A gradient or update that leaves without having happened
breaks the lane: the places behind it raise PrecedingRequestFailed, because an optim_step must never run on
the gradients of a step that did not happen. Requests made after a break work normally.
"""

import asyncio
from collections.abc import Callable, Sequence

from tinkex_py.errors import (
    APIStatusError,
    ClientClosed,
    PrecedingRequestFailed,
    RequestInsideStep,
    SequenceLost,
)
from tinkex_py.transport.place import Answer, GuestPlace, Kind, Place, Send, again, steps

# Statuses of a retried request that never got a final answer: whether the number arrived is unknown.
UNDECIDED_STATUSES = frozenset({408, 425, 429})


def is_undecided(error: APIStatusError) -> bool:
    """Whether the last answer to a retried request leaves open if its number arrived; else it is a final refusal."""
    return error.status >= 500 or error.status in UNDECIDED_STATUSES


class Lane:
    """The places of one training client, and its sequence numbers.

    Attributes:
        next_number: the number the next submission gets.
        lost: set once a number may truly be lost.
        accumulated: backward passes handed over since the last optimizer step.
        refused: numbers that got a final refusal, or whose result the service does not know. A service spends them too;
            somebody in between may not have told it.
    """

    def __init__(self) -> None:
        self.next_number = 1
        self.refused: set[int] = set()
        self.lost: SequenceLost | ClientClosed | None = None
        self.accumulated = 0
        self._places: list[Place] = []
        self._entered = 0
        self._loop = asyncio.get_running_loop()
        self._wire_is_taken = False
        self._waiting: dict[Place, None] = {}  # in the order in which they began to wait
        self._in_flight: set[asyncio.Task[object]] = set()

    def enter(self, kind: Kind, *, forward_only: bool = False) -> Place:
        """Takes a place; call it before the first suspension of a request.

        Raises:
            RequestInsideStep: called from inside a term of this client's running step, and not forward-only.
            SequenceLost: the lane cannot go on.
            ClientClosed: the client belongs to another event loop.
        """
        if self.lost is not None:
            raise again(self.lost)
        for mark in steps.get():
            if mark.alive and mark.place in self._places:
                if forward_only:
                    self.check_loop()
                    return GuestPlace(self, mark)
                raise RequestInsideStep(
                    "a term asked its own training client for something other than a forward pass, which would have "
                    "to wait for the step the term belongs to; do it after forward_backward_custom has returned"
                )
        self.check_loop()
        self._entered += 1
        place = Place(self, kind, self._entered)
        self._places.append(place)
        return place

    def check_loop(self) -> None:
        """Raises ClientClosed on an event loop that is not the lane's."""
        if asyncio.get_running_loop() is not self._loop:
            raise ClientClosed("this training client belongs to another event loop: make one client per loop")

    @property
    def wire_is_taken(self) -> bool:
        """True while a submission has not been answered."""
        return self._wire_is_taken

    @property
    def is_empty(self) -> bool:
        """True if no request is in the lane and nothing is in flight."""
        return not self._places and not self._in_flight

    @property
    def is_unused(self) -> bool:
        """True until the first number is taken or a request waits for one."""
        return self.next_number == 1 and not self._places

    def has_turn(self, place: Place) -> bool:
        """True if every earlier place has happened or left."""
        return all(other.happened or other.index >= place.index for other in self._places)

    def is_next_behind_terms(self, place: Place) -> bool:
        """True if all that has to happen before `place` is one custom step, whose forward pass was answered."""
        open_places = [other for other in self._places if other.index < place.index and not other.happened]
        return len(open_places) == 1 and open_places[0].knows_logprobs

    def runs_step_before(self, place: Place) -> bool:
        """True if a custom step before `place` has not left."""
        return any(other.index < place.index and other.knows_logprobs for other in self._places)

    async def hand_over(
        self,
        place: Place,
        count: int,
        send: Send[Answer],
        *,
        last: bool,
        handed_over: Callable[[], None] | None,
    ) -> asyncio.Task[Answer]:
        """Gives numbers to a submission and starts it; one submission is on the wire at a time."""
        while self._wire_is_taken:
            await self.change(place)
            place.check()
        self._wire_is_taken = True
        numbers = list(range(self.next_number, self.next_number + count))
        self.next_number += count
        place.numbers += numbers
        if last:
            place.happened = True
        if handed_over is not None:
            handed_over()
        task = asyncio.create_task(self._deliver(place, numbers, send), name="tinkex.submission")
        self._in_flight.add(task)
        task.add_done_callback(self._landed)
        self.wake_all()
        return task

    def give_back(self, place: Place) -> None:
        """The service did not count the place's last number: the next request takes it, unless a later one is out."""
        if place.numbers and place.numbers[-1] + 1 == self.next_number:
            self.next_number -= 1

    async def _deliver(self, place: Place, numbers: Sequence[int], send: Send[Answer]) -> Answer:
        try:
            return await send(numbers)
        except asyncio.CancelledError:
            if self.lost is None:
                raise
            raise again(self.lost) from None  # cut off by `drain`: its caller was not cancelled
        except APIStatusError as error:
            if is_undecided(error):
                raise self._lose(numbers, error) from error
            place.refused(numbers)
            raise
        except Exception as error:
            # Whatever it was: the number is taken, and nobody can say whether it arrived.
            raise self._lose(numbers, error) from error

    def _lose(self, numbers: Sequence[int], error: Exception) -> SequenceLost | ClientClosed:
        numbered = f"request {numbers[0]}" if len(numbers) == 1 else f"requests {numbers[0]} to {numbers[-1]}"
        self.end(
            SequenceLost(
                f"{numbered} got no final answer ({type(error).__name__}: {error}), so the order on the service is no "
                "longer known. Go on with service.create_training_client_from_state(path, with_optimizer=True)"
            )
        )
        assert self.lost is not None
        return again(self.lost)

    def check_gap(self, number: int) -> None:
        """The service waits for a number.

        Raises:
            SequenceLost: it will never come, because somebody in between refused it.
        """
        if number in self.refused:
            raise self.end_behind(number, "nothing after it is executed")

    def end_behind(self, number: int, consequence: str) -> SequenceLost | ClientClosed:
        """Ends the lane because a number will never reach the service; gives the error of it."""
        self.end(
            SequenceLost(
                f"the service waits for request {number}, which was answered on the way to it (by a proxy?) and will "
                f"never come, so {consequence}. Go on with "
                "service.create_training_client_from_state(path, with_optimizer=True)"
            )
        )
        assert self.lost is not None
        return again(self.lost)

    def end(self, error: SequenceLost | ClientClosed) -> None:
        """Nothing can be sent on this lane any more; the first reason stays."""
        self.lost = self.lost or error
        self.wake_all()

    def _landed(self, task: asyncio.Task[object]) -> None:
        self._in_flight.discard(task)
        self._wire_is_taken = False
        self.wake_all()
        if not task.cancelled():
            task.exception()  # retrieved here too: the caller may be gone

    def break_behind(self, place: Place) -> None:
        """Everything behind `place` that has not happened raises PrecedingRequestFailed.

        A broken place stays in the lane until it leaves: a step whose terms still run must not overlap with the next.
        """
        for other in self._places:
            if other.index <= place.index or other.happened or other.is_broken:
                continue
            other.break_with(
                PrecedingRequestFailed(
                    f"an earlier {place.kind.name.lower()} request of this training client did not take effect, so "
                    "this one was not sent; it is safe to call it again"
                )
            )
        self.wake_all()

    def remove(self, place: Place) -> None:
        """See `Place.leave`."""
        if place not in self._places:
            return
        if not (place.happened or place.is_broken or place.kind is Kind.READ):
            self.break_behind(place)
        self._places.remove(place)
        self.wake_all()

    async def drain(self, timeout: float) -> None:
        """Waits for what is in flight, at most `timeout` seconds, then cancels it.

        Raises:
            ClientClosed: called on another event loop.
        """
        self.check_loop()
        tasks = set(self._in_flight)
        if not tasks:
            return
        _, pending = await asyncio.wait(tasks, timeout=timeout)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)

    async def change(self, place: Place) -> None:
        """Waits until something in the lane has changed."""
        place.changed.clear()
        self._waiting[place] = None
        try:
            await place.changed.wait()
        finally:
            del self._waiting[place]

    def wake_all(self) -> None:
        """Lets everybody who waits look again."""
        for place in self._waiting:
            place.changed.set()
