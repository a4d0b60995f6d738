"""A bounded number of places whose holders are known, given back from any thread."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from tinkex_py.errors import TinkexError


class SlotsAbandoned(TinkexError):
    """Every slot was held by abandoned terms for too long."""

    def __init__(self, holders: Sequence[str]) -> None:
        super().__init__(f"every thread is held by abandoned terms: {', '.join(holders)}")
        self.holders = tuple(holders)


@dataclass(eq=False)
class Slot:
    """One granted unit of `Slots`; released once, from any thread."""

    owner: "Slots"
    holder: str
    group: object = None
    abandoned: bool = False

    def release(self) -> None:
        """Gives the unit back; a second call does nothing."""
        self.owner.release(self)


@dataclass(eq=False)
class _Waiter:
    holder: str
    group: object
    group_limit: int
    loop: asyncio.AbstractEventLoop
    thread: int = field(default_factory=threading.get_ident)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    slot: Slot | None = None


class Slots:
    """A semaphore whose units can be released from any thread and know who holds them.

    Args:
        limit: units in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._held: list[Slot] = []
        self._waiters: list[_Waiter] = []

    async def acquire(
        self, holder: str, *, group: object = None, group_limit: int | None = None, patience: float | None = None
    ) -> Slot:
        """Waits for a unit.

        Args:
            holder: who asks, for messages.
            group: whoever the units are for; those of a group count against its own limit too.
            group_limit: most units that the group may hold; None is the limit of all.
            patience: seconds to wait while every held unit is abandoned; None waits for ever.

        Raises:
            SlotsAbandoned: patience ran out.
        """
        limit = group_limit or self.limit
        with self._lock:
            if not self._waiters and not self._in_the_way(group, limit):
                return self._hold(holder, group)
            waiter = _Waiter(holder, group, limit, asyncio.get_running_loop())
            self._waiters.append(waiter)
            self._grant()
        give_up_at: float | None = None
        try:
            while True:
                with self._lock:
                    waiter.changed.clear()
                    if waiter.slot is not None:
                        return waiter.slot
                    stalled = all(slot.abandoned for slot in self._in_the_way(waiter.group, waiter.group_limit))
                if not stalled or patience is None:
                    give_up_at = None
                elif give_up_at is None:
                    give_up_at = waiter.loop.time() + patience
                await self._wait(waiter, give_up_at)
        except BaseException:
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            if waiter.slot is not None:
                waiter.slot.release()
            raise

    async def _wait(self, waiter: _Waiter, give_up_at: float | None) -> None:
        try:
            async with asyncio.timeout_at(give_up_at):
                await waiter.changed.wait()
        except TimeoutError:
            raise SlotsAbandoned(self.holders()) from None

    def release(self, slot: Slot) -> None:
        """See `Slot.release`."""
        with self._lock:
            if slot in self._held:
                may_stall = any(held.abandoned for held in self._held)
                self._held.remove(slot)
                self._grant()
                if may_stall:
                    self._tell_waiters()

    def abandon(self, slot: Slot) -> None:
        """Marks a unit whose holder nobody waits for any more."""
        with self._lock:
            slot.abandoned = slot in self._held
            self._tell_waiters()

    def holders(self) -> list[str]:
        """Names of all holders."""
        with self._lock:
            return [slot.holder for slot in self._held]

    def abandoned(self) -> list[str]:
        """Names of the holders that were abandoned and still run."""
        with self._lock:
            return [slot.holder for slot in self._held if slot.abandoned]

    def _grant(self) -> None:
        for waiter in list(self._waiters):
            if self._in_the_way(waiter.group, waiter.group_limit):
                continue
            self._waiters.remove(waiter)
            waiter.slot = self._hold(waiter.holder, waiter.group)
            if not _wake(waiter):
                self._held.remove(waiter.slot)

    def _hold(self, holder: str, group: object) -> Slot:
        slot = Slot(self, holder, group)
        self._held.append(slot)
        return slot

    def _in_the_way(self, group: object, group_limit: int) -> list[Slot]:
        """The held units that keep one of a group waiting; none if it can be served."""
        if len(self._held) >= self.limit:
            return self._held
        if len(self._held) < group_limit:
            return []
        own = [slot for slot in self._held if slot.group is group]
        return own if len(own) >= group_limit else []

    def _tell_waiters(self) -> None:
        self._waiters = [waiter for waiter in self._waiters if _wake(waiter)]


def _wake(waiter: _Waiter) -> bool:
    if waiter.thread == threading.get_ident() and waiter.loop.is_running():
        waiter.changed.set()
        return True
    try:
        waiter.loop.call_soon_threadsafe(waiter.changed.set)
    except RuntimeError:  # the waiter's loop is closed: nobody waits there any more
        return False
    return True
