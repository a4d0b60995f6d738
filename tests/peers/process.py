"""Starts and stops servers in their own processes."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 240.0
STOP_SECONDS = 30.0


class PeerError(Exception):
    """A peer could not be installed or started."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


@contextmanager
def running(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], is_ready: Callable[[], bool]
) -> Iterator[None]:
    """Runs a server in its own process group until the block ends; yields when it is ready."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, log, is_ready)
        yield
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        if _ended(process, 0.5):
            raise PeerError(f"the server ended while starting:\n{_end_of(log)}")
        if time.monotonic() > deadline:
            raise PeerError(f"the server was not ready after {START_SECONDS:g} s:\n{_end_of(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    _ended(process, STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its remaining children
    process.wait()


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
