"""Shared by the tests of worker processes."""

from pathlib import Path
from typing import Any

import psutil

from tests.losses.support import datum
from tinkex_py import RegularizerSpec

DATA = [datum(2), datum(3)]


def workers() -> list[psutil.Process]:
    """The worker processes of this program, zombies included."""
    return [child for child in psutil.Process().children(recursive=True) if is_worker(child)]


def is_worker(child: psutil.Process) -> bool:
    try:
        return child.status() == psutil.STATUS_ZOMBIE or "tinkex_py.processes.worker" in child.cmdline()
    except psutil.NoSuchProcess:  # it was just reaped
        return False


def step_files() -> int:
    """The number of files of steps that this program has open."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += entry.readlink().name.startswith("memfd:tinkex")
        except FileNotFoundError:  # the descriptor of this listing
            continue
    return found


def process_spec(fn: Any, **settings: Any) -> RegularizerSpec:
    return RegularizerSpec(fn, 0.5, "own", runs_in="process", **settings)
