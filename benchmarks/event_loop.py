"""Measures for how long an event loop was blocked."""

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

# Seconds between two callbacks of the probe.
_PERIOD = 0.001


@dataclass
class LoopGap:
    """The longest time beyond its period between two callbacks of the probe, in seconds."""

    worst: float = 0.0


@contextmanager
def watched_loop() -> Generator[LoopGap]:
    """Probes the running loop every millisecond during the block."""
    loop = asyncio.get_running_loop()
    gap = LoopGap()
    last = time.perf_counter()

    def look() -> None:
        nonlocal last, handle
        now = time.perf_counter()
        gap.worst = max(gap.worst, now - last - _PERIOD)
        last = now
        handle = loop.call_later(_PERIOD, look)

    handle = loop.call_later(_PERIOD, look)
    try:
        yield gap
    finally:
        handle.cancel()
        gap.worst = max(gap.worst, time.perf_counter() - last - _PERIOD)
