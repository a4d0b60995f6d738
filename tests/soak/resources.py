"""What a process holds: tasks, threads, sockets, descriptors and memory; and whether it comes back to what it was.

Counts come back to exactly what they were. Memory is judged by its trend after a warm-up, since allocators keep what
they once had: the median of the last third of the looks against that of the first third.
"""

import asyncio
import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.watch import SoakFailed
from tests.support.left_behind import PATIENCE, open_descriptors

MIB = 1 << 20
LEAST_LOOKS = 6
"""Looks after the warm-up, below which a trend says nothing."""


@dataclass(frozen=True)
class Look:
    """What two processes held at one moment; None where the system does not tell.

    Attributes:
        tasks: of the event loop, beside the one that looks.
        threads: of Python.
        rss: bytes.
        service_threads: of the system.
    """

    tasks: int
    threads: int
    sockets: int
    descriptors: int
    rss: int | None
    service_threads: int | None
    service_sockets: int | None
    service_descriptors: int | None
    service_rss: int | None


COUNTS = ("tasks", "threads", "sockets", "descriptors")
MOST_SERVICE_THREADS = 4
"""The event loop's, the engine's, and two for its state, of which the second is made when both are needed at once."""
SERVICE_COUNTS = ("service_sockets", "service_descriptors", "service_threads")


def look(service: int) -> Look:
    """Looks at this process and at that of a service."""
    own = _targets(os.getpid())
    of_service = _targets(service)
    return Look(
        tasks=len(_other_tasks()),
        threads=threading.active_count(),
        sockets=_sockets(own),
        descriptors=len(own) if own is not None else 0,
        rss=_rss(os.getpid()),
        service_threads=_count(Path(f"/proc/{service}/task")),
        service_sockets=None if of_service is None else _sockets(of_service),
        service_descriptors=None if of_service is None else len(of_service),
        service_rss=_rss(service),
    )


async def settled_look(service: int, before: Look) -> Look:
    """Looks when everything is as before, or when it had its time to become so."""
    deadline = time.monotonic() + PATIENCE
    release_memory()
    while differences(before, now := look(service)) and time.monotonic() < deadline:
        gc.collect()
        await asyncio.sleep(0.02)
    return now


def differences(before: Look, now: Look) -> list[str]:
    """Counts that are higher than before, by name. Those of the service may be lower: it closes what is idle."""
    found: list[str] = []
    for name in (*COUNTS, *SERVICE_COUNTS):
        was, became = getattr(before, name), getattr(now, name)
        if name == "service_threads" and was is not None:
            was = max(was, MOST_SERVICE_THREADS)
        if was is not None and became is not None and became > was:
            found.append(f"{name.replace('_', ' ')}: at most {was}, {became} now")
    return found


def check_counts(before: Look, now: Look) -> None:
    """Nothing is left behind; tells what it is."""
    found = differences(before, now)
    if not found:
        return
    tasks = sorted(f"task {task.get_name()}: {task.get_coro()!r}" for task in _other_tasks())
    threads = sorted(thread.name for thread in threading.enumerate())
    descriptors = sorted(open_descriptors().values())
    raise SoakFailed(f"left behind: {'; '.join(found)}\n  {tasks}\n  {threads}\n  {descriptors}")


@dataclass(frozen=True)
class Growth:
    """Memory over the looks after the warm-up, in bytes; `grown` is None if there were too few."""

    name: str
    first: int
    last: int
    grown: int | None
    bound: int

    def check(self) -> None:
        """It has not grown by more than its bound."""
        if self.grown is not None and self.grown > self.bound:
            raise SoakFailed(
                f"{self.name} grows: {self.grown / MIB:.1f} MiB between the first and the last third of the run "
                f"after the warm-up, {self.bound / MIB:.1f} MiB are allowed"
            )


def growth(name: str, sizes: Sequence[int], bound: int) -> Growth:
    """How much the size of something has grown.

    Args:
        name: of it.
        sizes: at the looks after the warm-up, in bytes.
        bound: bytes.
    """
    third = len(sizes) // 3
    grown = None
    if len(sizes) >= LEAST_LOOKS:
        grown = int(statistics.median(sizes[-third:]) - statistics.median(sizes[:third]))
    return Growth(name, sizes[0] if sizes else 0, sizes[-1] if sizes else 0, grown, bound)


@dataclass
class Memory:
    """Sizes at all looks after the warm-up, in bytes."""

    client: list[int] = field(default_factory=list[int])
    service: list[int] = field(default_factory=list[int])

    def add(self, now: Look) -> None:
        """One look."""
        if now.rss is not None and now.service_rss is not None:
            self.client.append(now.rss)
            self.service.append(now.service_rss)


def release_memory() -> None:
    """Collects garbage, and gives free pages back to the system where the C library can."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _other_tasks() -> set[asyncio.Task[object]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


def _targets(process: int) -> list[str] | None:
    folder = Path(f"/proc/{process}/fd")
    if not folder.is_dir():
        return None
    targets: list[str] = []
    for entry in folder.iterdir():
        try:
            targets.append(str(entry.readlink()))
        except OSError:  # closed meanwhile, as the descriptor of this listing is
            continue
    return targets


def _sockets(targets: Sequence[str] | None) -> int:
    return sum(target.startswith("socket:") for target in targets or ())


def _rss(process: int) -> int | None:
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _count(folder: Path) -> int | None:
    return len(list(folder.iterdir())) if folder.is_dir() else None
