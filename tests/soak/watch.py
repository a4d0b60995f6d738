"""What is watched during a soak: telemetry, warnings, unhandled errors and the duration of calls."""

import asyncio
import gc
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog

from tinkex_py import telemetry
from tinkex_py.telemetry import Event

T = TypeVar("T")

CALL_BOUND = 30.0
"""Seconds that a call may take: the retry deadline of 20 s, and the wait for its turn."""


class SoakFailed(AssertionError):
    """A promise does not hold."""


class Ledger:
    """Checks that every start event has exactly one end, and that every event is one structlog line.

    Attributes:
        events: counts of events, by name.
        lines: counts of log lines, by name.
        open: started units of work that have not ended, with their event prefix.
        wrong: ends without a start, and second starts.
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.open: dict[int, str] = {}
        self.wrong: list[str] = []

    def note(self, event: Event) -> None:
        """Records one event."""
        self.events[event.name] += 1
        if event.unit is None:
            return
        prefix, _, phase = event.name.rpartition(".")
        if phase == "start":
            if event.unit in self.open:
                self.wrong.append(f"{event.name} came twice for unit {event.unit}")
            self.open[event.unit] = prefix
        elif self.open.pop(event.unit, None) != prefix:
            self.wrong.append(f"{event.name} for unit {event.unit}, which is not open")

    def write(self, _logger: object, _method: str, line: Mapping[str, Any]) -> Any:
        """Counts a log line and drops it; a structlog processor."""
        self.lines[str(line["event"])] += 1
        raise structlog.DropEvent

    @property
    def units(self) -> int:
        """How many units of work were started."""
        return sum(count for name, count in self.events.items() if name.endswith(".start"))

    def check(self) -> None:
        """Raises SoakFailed if something is wrong; call it while nothing is in flight."""
        if self.wrong:
            raise SoakFailed(f"telemetry: {self.wrong[0]}")
        if self.open:
            unit, prefix = next(iter(self.open.items()))
            raise SoakFailed(f"telemetry: {prefix}.start of unit {unit} has no end ({len(self.open)} such)")
        if self.events != self.lines:
            raise SoakFailed(f"telemetry: events and lines differ: {(self.events - self.lines) or self.lines}")

    @contextmanager
    def listening(self) -> Generator[None]:
        """Records all events of the block, with its own structlog configuration."""
        before = structlog.get_config() if structlog.is_configured() else None
        structlog.configure(processors=[self.write])
        handler = telemetry.attach(self.note)
        try:
            yield
        finally:
            telemetry.detach(handler)
            structlog.reset_defaults()
            if before is not None:
                structlog.configure(**before)


class Complaints:
    """Collects warnings, and unhandled errors of tasks, futures, threads and finalizers."""

    def __init__(self) -> None:
        self._errors: list[str] = []
        self._warnings: list[warnings.WarningMessage] = []

    def check(self) -> None:
        """Raises SoakFailed if there are any; collects garbage first, which reveals some."""
        gc.collect()
        found = [*self._errors, *(f"{item.category.__name__}: {item.message}" for item in self._warnings)]
        if found:
            raise SoakFailed(f"{len(found)} complaint(s), the first: {found[0]}")

    @contextmanager
    def listening(self) -> Generator[None]:
        """Collects during the block; needs a running loop."""
        loop = asyncio.get_running_loop()
        handler, of_threads, unraisable = loop.get_exception_handler(), threading.excepthook, sys.unraisablehook
        loop.set_exception_handler(lambda _loop, context: self._errors.append(_of_loop(context)))
        threading.excepthook = lambda given: self._errors.append(
            f"thread: {given.exc_type.__name__}: {given.exc_value}"
        )
        sys.unraisablehook = lambda given: self._errors.append(f"unraisable: {given.err_msg or ''} {given.exc_value!r}")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self._warnings = caught
                yield
        finally:
            loop.set_exception_handler(handler)
            threading.excepthook, sys.unraisablehook = of_threads, unraisable


def _of_loop(context: dict[str, Any]) -> str:
    error = context.get("exception")
    about = context.get("task") or context.get("future") or context.get("handle") or ""
    return f"loop: {context.get('message')} {error!r} {about!r}"


@dataclass
class Clock:
    """Counts calls, and records the slowest of each kind in seconds and those over the bound."""

    calls: Counter[str] = field(default_factory=Counter[str])
    slowest: dict[str, float] = field(default_factory=dict[str, float])
    bound: float = CALL_BOUND
    late: list[str] = field(default_factory=list[str])

    async def timed(self, kind: str, call: Callable[[], Awaitable[T]]) -> T:
        """Awaits a call; cancels and records it if it exceeds the bound."""
        started = time.monotonic()
        scope = asyncio.timeout(self.bound)
        try:
            async with scope:
                return await call()
        finally:
            self.calls[kind] += 1
            self.slowest[kind] = max(self.slowest.get(kind, 0.0), time.monotonic() - started)
            if scope.expired():
                self.late.append(kind)

    def check(self) -> None:
        """Raises SoakFailed if a call exceeded the bound."""
        if self.late:
            raise SoakFailed(f"{self.late[0]} took longer than {self.bound:g} s")


@dataclass
class Watch:
    """The ledger, the complaints and the clock."""

    ledger: Ledger = field(default_factory=Ledger)
    complaints: Complaints = field(default_factory=Complaints)
    clock: Clock = field(default_factory=Clock)

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watches the block; needs a running loop."""
        with self.ledger.listening(), self.complaints.listening():
            yield

    def check(self) -> None:
        """Raises SoakFailed if something is wrong; call it while nothing is in flight."""
        self.ledger.check()
        self.clock.check()
        self.complaints.check()
