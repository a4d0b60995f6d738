"""One request's position in a training client's lane: what it waits for, and what it may do when its turn has come."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeVar

from tinkex_py.errors import ClientClosed, PrecedingRequestFailed, SequenceLost, TinkexError

if TYPE_CHECKING:
    from tinkex_py.transport.lane import Lane

Answer = TypeVar("Answer")
Send = Callable[[Sequence[int]], Awaitable[Answer]]


class Kind(Enum):
    """What a request does to the model."""

    GRADIENT = auto()
    UPDATE = auto()
    READ = auto()


@dataclass(eq=False)
class StepMark:
    """Marks code that runs inside the terms of a custom step; it dies with the step."""

    place: "Place"
    alive: bool = True


steps: ContextVar[tuple[StepMark, ...]] = ContextVar("tinkex_steps", default=())


class Place:
    """One request's position in a lane. Leave it exactly once, whatever happened; see `Lane.enter`.

    Attributes:
        happened: its last submission was handed over.
        left: the request is over.
        knows_logprobs: it is a custom step whose forward pass was answered.
        numbers: the sequence numbers it was given.
        changed: set when something in the lane has changed.
    """

    def __init__(self, lane: "Lane", kind: Kind, index: int) -> None:
        self.kind = kind
        self.index = index
        self.happened = False
        self.left = False
        self.knows_logprobs = False
        self.numbers: list[int] = []
        self._lane = lane
        self._broken: TinkexError | None = None
        self.changed = asyncio.Event()

    async def turn(self) -> None:
        """Waits until every earlier place has happened or left.

        Raises:
            PrecedingRequestFailed: an earlier gradient or update did not happen.
            SequenceLost: the lane cannot go on.
        """
        self.check()
        while not self._lane.has_turn(self):
            await self._lane.change(self)
            self.check()

    async def early_turn(self) -> None:
        """Waits for the turn, or to be the next behind a custom step that only awaits its terms; raises like `turn`.

        A forward pass changes nothing, so it gives the same logprobs before that step's backward pass as after it.
        """
        self.check()
        while not (self._lane.has_turn(self) or self._lane.is_next_behind_terms(self)):
            await self._lane.change(self)
            self.check()

    async def turn_of_terms(self) -> None:
        """Tells the lane that this step's forward pass was answered, and waits until the custom steps before it left.

        Raises:
            PrecedingRequestFailed, SequenceLost: as `turn`; no term is to be called.
        """
        self.knows_logprobs = True
        self._lane.wake_all()
        self.check()
        while self._lane.runs_step_before(self):
            await self._lane.change(self)
            self.check()

    async def quiet_turn(self) -> None:
        """Waits for the turn, and until all that was handed over before has been answered; raises like `turn`."""
        await self.turn()
        while self._lane.wire_is_taken:
            await self._lane.change(self)
            self.check()

    async def submit(
        self,
        count: int,
        send: Send[Answer],
        *,
        last: bool = True,
        early: bool = False,
        handed_over: Callable[[], None] | None = None,
    ) -> Answer:
        """Hands one submission over to the wire, when its turn has come, and waits until it is answered.

        Args:
            count: how many consecutive numbers it needs.
            send: sends it under these numbers until there is a final answer. It is run by the lane: once handed
                over, it goes on even if the caller is cancelled.
            last: this is the place's last submission; with it the request has happened.
            early: `early_turn` is enough.
            handed_over: called at hand-over, before anything else can run.

        Raises:
            PrecedingRequestFailed, SequenceLost: as `turn`; nothing was sent.
        """
        await (self.early_turn() if early else self.turn())
        task = await self._lane.hand_over(self, count, send, last=last, handed_over=handed_over)
        return await asyncio.shield(task)

    def check(self) -> None:
        """Raises what broke this place, if anything did."""
        if self._lane.lost is not None:
            raise again(self._lane.lost)
        if self._broken is not None:
            raise self._broken

    def fail_on_service(self) -> list[int]:
        """The service failed this request: breaks what is not handed over yet.

        Returns:
            Numbers of later requests that had already been handed over.
        """
        self._lane.break_behind(self)
        last = max(self.numbers, default=0)
        return list(range(last + 1, self._lane.next_number))

    @property
    def is_broken(self) -> bool:
        """True once an earlier request did not happen: nothing more of this one is sent."""
        return self._broken is not None

    def refused(self, numbers: Sequence[int]) -> None:
        """These numbers got a final refusal: they are spent, and the request has not taken effect as a whole."""
        self._lane.refused.update(numbers)
        if self.happened and self.kind is not Kind.READ:
            self._lane.break_behind(self)

    def forgotten(self) -> None:
        """The service does not know this request, though it was answered: it may never have reached it."""
        self._lane.refused.update(self.numbers)

    def stuck(self, seconds: float) -> TinkexError:
        """A part of this request was refused, and the rest got no result for so long; the error of it.

        Nothing more can be sent: somebody in between did not pass the refused number on.
        """
        return self._lane.end_behind(
            min(self._lane.refused.intersection(self.numbers)), f"nothing after it was executed within {seconds:g} s"
        )

    def break_with(self, error: TinkexError) -> None:
        """Ends this place; its owner learns it at its next step, and leaves."""
        self._broken = error
        self.changed.set()

    def leave(self) -> None:
        """The request is over. If it should have changed the model and did not happen, the lane breaks."""
        if not self.left:
            self.left = True
            self._lane.remove(self)

    @contextmanager
    def running_terms(self) -> Generator[None]:
        """Marks the code inside as part of this step: its forward passes run inside the turn the step holds."""
        mark = StepMark(self)
        token = steps.set((*steps.get(), mark))
        try:
            yield
        finally:
            mark.alive = False
            steps.reset(token)


class GuestPlace(Place):
    """A forward pass asked for by a term: it runs inside the turn that the step holds."""

    def __init__(self, lane: "Lane", mark: StepMark) -> None:
        super().__init__(lane, Kind.READ, mark.place.index)
        self._mark = mark

    async def turn(self) -> None:
        """The step has the turn already.

        Raises:
            PrecedingRequestFailed: the step has ended meanwhile.
        """
        self.check()

    def check(self) -> None:
        """Raises if the step has ended, or what broke it."""
        if not self._mark.alive or self._mark.place.left:
            raise PrecedingRequestFailed("the step whose term asked for this forward pass has ended; nothing was sent")
        self._mark.place.check()

    def leave(self) -> None:
        """A guest is in no line."""


def again(error: SequenceLost | ClientClosed) -> SequenceLost | ClientClosed:
    """A fresh exception with the same message: one object raised in many tasks would collect their tracebacks."""
    return type(error)(*error.args)
