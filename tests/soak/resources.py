"""Tasks, threads, descriptors and memory of the client and the service, and whether they return to their start values.

Counts must return to exactly what they were. Memory is judged by its trend after a warm-up, because allocators keep
pages: the median of the last third of the looks against that of the first third.
"""

import asyncio
import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from tests.soak.watch import SoakFailed
from tests.support.left_behind import PATIENCE, open_descriptors

MIB = 1 << 20
LEAST_LOOKS = 6
"""Looks after the warm-up that a trend needs."""
COUNTS = ("tasks", "threads", "descriptors", "service_threads", "service_descriptors")
MOST_SERVICE_THREADS = 4
"""The event loop's, the engine's, and two for its state, of which the second starts when both are needed at once."""


@dataclass(frozen=True)
class Look:
    """What the client's process and the service's process hold at one moment.

    Attributes:
        tasks: tasks of the event loop, without the one that looks.
        threads: threads of Python.
        descriptors: open files and sockets.
        rss: resident bytes.
        service_threads: threads of the operating system.
        service_descriptors: open files and sockets.
        service_rss: resident bytes.
    """

    tasks: int
    threads: int
    descriptors: int
    rss: int
    service_threads: int
    service_descriptors: int
    service_rss: int


def look(service: int) -> Look:
    """Looks at this process and at the one with this process id."""
    client, server = psutil.Process(), psutil.Process(service)
    return Look(
        tasks=len(_other_tasks()),
        threads=threading.active_count(),
        descriptors=client.num_fds(),
        rss=client.memory_info().rss,
        service_threads=server.num_threads(),
        service_descriptors=server.num_fds(),
        service_rss=server.memory_info().rss,
    )


async def settled_look(service: int, before: Look) -> Look:
    """Looks when all counts are as before, or after the time that they have for it."""
    deadline = time.monotonic() + PATIENCE
    release_memory()
    while differences(before, now := look(service)) and time.monotonic() < deadline:
        gc.collect()
        await asyncio.sleep(0.02)
    return now


def differences(before: Look, now: Look) -> list[str]:
    """Returns the counts that are higher than before. The service may hold less: it closes idle connections."""
    found: list[str] = []
    for name in COUNTS:
        limit, count = getattr(before, name), getattr(now, name)
        if name == "service_threads":
            limit = max(limit, MOST_SERVICE_THREADS)
        if count > limit:
            found.append(f"{name.replace('_', ' ')}: at most {limit}, {count} now")
    return found


def check_counts(before: Look, now: Look) -> None:
    """Raises SoakFailed if something is left behind, and lists it."""
    found = differences(before, now)
    if not found:
        return
    tasks = sorted(f"task {task.get_name()}: {task.get_coro()!r}" for task in _other_tasks())
    threads = sorted(thread.name for thread in threading.enumerate())
    descriptors = sorted(open_descriptors().values())
    raise SoakFailed(f"left behind: {'; '.join(found)}\n  {tasks}\n  {threads}\n  {descriptors}")


def growth(sizes: Sequence[int]) -> int | None:
    """Returns by how many bytes the sizes after the warm-up have grown; None if there are too few."""
    third = len(sizes) // 3
    if len(sizes) < LEAST_LOOKS:
        return None
    return int(statistics.median(sizes[-third:]) - statistics.median(sizes[:third]))


def check_growth(name: str, sizes: Sequence[int], bound: int) -> None:
    """Raises SoakFailed if the sizes have grown by more than the bound, in bytes."""
    grown = growth(sizes)
    if grown is not None and grown > bound:
        raise SoakFailed(
            f"{name} grows: {grown / MIB:.1f} MiB between the first and the last third of the run "
            f"after the warm-up, {bound / MIB:.1f} MiB are allowed"
        )


def release_memory() -> None:
    """Collects garbage, and returns free pages to the operating system if the C library can."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _other_tasks() -> set[asyncio.Task[object]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
