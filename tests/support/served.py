"""`tinkex-py serve` in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {**os.environ, "TINKER_TELEMETRY": "0", "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(*arguments: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address; ended at the end if it still runs."""
    command = [sys.executable, "-m", "tinkex_py", "serve", "--model", "tiny", "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        line = process.stdout.readline()
        assert line.startswith("Listening on http://127.0.0.1:"), line + process.stderr.read()
        yield process, line.removeprefix("Listening on ").strip()
    finally:
        process.terminate()  # a killed server would leave its private folder behind
        process.communicate(timeout=60)
