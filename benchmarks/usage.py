"""Measures wall time, CPU time of all threads and peak memory of some work in this process."""

import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# proc(5): writing 5 sets VmHWM to the current resident size.
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Usage:
    """The resources of one run.

    Attributes:
        wall: seconds.
        cpu: seconds of user and system time, over all threads.
        peak: most resident bytes at any time during the run.
    """

    wall: float
    cpu: float
    peak: int


def resident() -> int:
    """Returns the resident bytes of this process."""
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}: peak memory can only be measured on Linux")


def _forget_peak() -> None:
    _CLEAR.write_text(_RESET_PEAK)


async def used_by(work: Callable[[], Awaitable[object]]) -> Usage:
    """Runs the work once, after a garbage collection."""
    gc.collect()
    _forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    await work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Usage(wall, cpu, _status("VmHWM"))
