"""A limit on how many run at once, whose permits know their holders and can be given back from any thread."""

import asyncio
import threading
from collections.abc import Sequence

from tinkex_py.timeouts import time_limit


class Permit:
    """A unit of a `Limiter`, waited for or held.

    Attributes:
        abandoned: its holder still runs, although its caller has left.
    """

    def __init__(self, limiter: "Limiter", holder: str, group: object, group_limit: int) -> None:
        self.abandoned = False
        self.holder = holder
        self.group = group
        self.group_limit = group_limit
        self._limiter = limiter
        self._waiting: tuple[asyncio.AbstractEventLoop, int, asyncio.Event] | None = None

    def release(self) -> None:
        """Gives it back, from any thread; a second call does nothing."""
        self._limiter.release(self)

    def abandon(self) -> None:
        """Marks it as abandoned, unless it was given back already."""
        self._limiter.abandon(self)

    def wait(self) -> asyncio.Event:
        """Makes the event that `wake` sets, on the loop that waits."""
        changed = asyncio.Event()
        self._waiting = asyncio.get_running_loop(), threading.get_ident(), changed
        return changed

    def wake(self) -> bool:
        """Sets that event, from any thread; False if its loop is closed."""
        assert self._waiting is not None, "only a permit that is waited for is woken"
        loop, thread, changed = self._waiting
        if thread == threading.get_ident() and loop.is_running():
            changed.set()
            return True
        try:
            loop.call_soon_threadsafe(changed.set)
        except RuntimeError:
            return False
        return True


class Limiter:
    """A semaphore whose permits can be released from any thread, and which knows who holds them.

    Args:
        limit: permits in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._held: list[Permit] = []
        self._queue: list[Permit] = []

    async def acquire(
        self, holder: str, *, group: object = None, group_limit: int | None = None, patience: float | None = None
    ) -> Permit:
        """Waits for a permit.

        Args:
            holder: who asks, for messages.
            group: what the permit is for; those of a group count against its own limit too.
            group_limit: most permits that the group may hold; None is the limit of all.
            patience: seconds to wait while every permit in the way is abandoned; None waits for ever.

        Raises:
            TimeoutError: patience ran out.
        """
        permit = Permit(self, holder, group, group_limit or self.limit)
        with self._lock:
            if not self._queue and not self._in_the_way(permit):
                self._held.append(permit)
                return permit
            changed = permit.wait()
            self._queue.append(permit)
            self._look_again(permit)
        try:
            await self._granted(permit, changed, patience)
        except BaseException:
            permit.release()
            raise
        return permit

    async def _granted(self, permit: Permit, changed: asyncio.Event, patience: float | None) -> None:
        loop = asyncio.get_running_loop()
        give_up_at: float | None = None
        while True:
            changed.clear()
            with self._lock:
                if permit in self._held:
                    return
                stalled = all(held.abandoned for held in self._in_the_way(permit))
            if not stalled or patience is None:
                give_up_at = None
                await changed.wait()
                continue
            give_up_at = give_up_at or loop.time() + patience
            async with time_limit(give_up_at - loop.time(), TimeoutError):
                await changed.wait()

    def release(self, permit: Permit) -> None:
        """See `Permit.release`."""
        with self._lock:
            for permits in (self._held, self._queue):
                if permit in permits:
                    permits.remove(permit)
            if self._queue:
                self._look_again(permit)

    def abandon(self, permit: Permit) -> None:
        """See `Permit.abandon`."""
        with self._lock:
            permit.abandoned = permit in self._held
            self._look_again(permit)

    def holders(self) -> list[str]:
        """Names of all holders."""
        with self._lock:
            return [permit.holder for permit in self._held]

    def abandoned(self) -> list[str]:
        """Names of the holders that were abandoned and still run."""
        with self._lock:
            return [permit.holder for permit in self._held if permit.abandoned]

    def _look_again(self, changed: Permit) -> None:
        """Hands out what is free. Where permits are abandoned, those that still wait look whether that stalls them."""
        for permit in list(self._queue):
            if len(self._held) >= self.limit:
                break
            if not self._in_the_way(permit):
                self._queue.remove(permit)
                if permit.wake():
                    self._held.append(permit)
        if any(permit.abandoned for permit in (*self._held, changed)):
            self._queue = [permit for permit in self._queue if permit.wake()]

    def _in_the_way(self, permit: Permit) -> Sequence[Permit]:
        """The held permits that keep this one waiting."""
        if len(self._held) >= self.limit:
            return self._held
        if len(self._held) < permit.group_limit:
            return ()
        own = [held for held in self._held if held.group is permit.group]
        return own if len(own) >= permit.group_limit else ()
