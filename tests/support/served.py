"""Runs `tinkex-py serve` in its own process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

ENVIRONMENT = {**os.environ, "TINKER_TELEMETRY": "0", "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(
    *arguments: str, port: int = 0, log: IO[str] | None = None, own_session: bool = False
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yields the process and its address; ends the process at the end if it still runs.

    Args:
        arguments: further arguments of the command.
        port: 0 means a free one.
        log: receives stderr. Without it, stderr goes to a pipe that is read at the end, so it must be short.
        own_session: whether Ctrl-C in the terminal does not reach it.
    """
    command = [sys.executable, "-m", "tinkex_py", "serve", "--model", "tiny", "--port", str(port), *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if log is None else log,
        text=True,
        env=ENVIRONMENT,
        start_new_session=own_session,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("Listening on http://127.0.0.1:"), line + (
            process.stderr.read() if process.stderr else ""
        )
        yield process, line.removeprefix("Listening on ").strip()
    finally:
        process.terminate()  # a killed server would leave its private folder behind
        process.communicate(timeout=60)
