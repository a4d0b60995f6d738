"""Finds threads and descriptors that did not exist before."""

import gc
import os
import threading
import time
from pathlib import Path

# Seconds that ending threads may take.
PATIENCE = 5.0
_DESCRIPTORS = Path("/proc/self/fd")
_FONT = ".ttf"  # matplotlib keeps used fonts open
_NO_LEAK = ("/dev/", "/proc/", "/sys/", "/memfd:", "anon_inode:inotify")


def threads_left(before: set[threading.Thread]) -> list[threading.Thread]:
    """Returns new threads that are alive; waits for those that are about to end."""

    def new() -> list[threading.Thread]:
        return [
            thread
            for thread in threading.enumerate()
            if thread not in before and thread.is_alive() and not isinstance(thread, threading._DummyThread)
        ]

    deadline = time.monotonic() + PATIENCE
    while (alive := new()) and time.monotonic() < deadline:
        # Idle workers of a pool end when the pool is collected. One that has just delivered its result may
        # still refer to the pool at first.
        gc.collect()
        alive[0].join(0.05)
    return new()


def open_descriptors() -> dict[int, str]:
    """Returns the number and target of every open descriptor; empty without /proc."""
    found: dict[int, str] = {}
    if not _DESCRIPTORS.is_dir():
        return found
    for entry in os.listdir(_DESCRIPTORS):  # noqa: PTH208  # a Path per descriptor costs more than the test
        try:
            found[int(entry)] = os.readlink(_DESCRIPTORS / entry)  # noqa: PTH115
        except OSError:  # the descriptor of this listing itself
            continue
    return found


def descriptors_left(before: dict[int, str]) -> list[tuple[int, str]]:
    """Returns open descriptors that did not exist before."""

    def new() -> list[tuple[int, str]]:
        return [
            (number, target)
            for number, target in open_descriptors().items()
            if before.get(number) != target and not target.startswith(_NO_LEAK) and not target.endswith(_FONT)
        ]

    if not new():
        return []
    gc.collect()  # an object in a reference cycle closes late, with a ResourceWarning, which is an error here
    return new()
