"""Shows that tests fail without the lines that they protect: `python -m tests.guards`, or `make guards`.

It works on a copy of the package and its tests. First the tests run unchanged, and must pass. Then one guard at a time
is replaced, and each of its tests must fail. A test that hangs counts as failed.
"""

import argparse
import compileall
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.guards.catalogue import GUARDS, PACKAGE, Guard

REPOSITORY = Path(__file__).parents[2]
_COPIED = (PACKAGE, "tests", "pyproject.toml")


@dataclass(frozen=True)
class Run:
    """One run of pytest.

    Attributes:
        outcome: "failed" if a test failed or hung; "broken" if the tests could not be run.
        reason: the failure.
    """

    outcome: Literal["passed", "failed", "broken"]
    reason: str = ""


def make_copy(repository: Path, root: Path) -> None:
    """Copies the package, the tests and the settings."""
    for name in _COPIED:
        if (repository / name).is_dir():
            shutil.copytree(repository / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(repository / name, root / name)
    # Hashes instead of times: a guard is replaced and restored faster than file times can show.
    compileall.compile_dir(root / PACKAGE, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


@contextmanager
def replaced(guard: Guard, root: Path) -> Generator[None]:
    """Replaces a guard in the copy until the block ends."""
    path = root / PACKAGE / guard.file
    original = path.read_text(encoding="utf-8")
    path.write_text(guard.without(original), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


def run(root: Path, tests: Sequence[str], seconds: float) -> Run:
    """Runs tests in a copy until the first failure.

    Args:
        root: the copy.
        tests: node ids.
        seconds: timeout of each test; a run that does not end is killed after three times as many for each id.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", f"--timeout={seconds:g}"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(3 * seconds * len(tests))
        except subprocess.TimeoutExpired:
            return Run("failed", "the run did not end")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the services that the tests started
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    if code == 0:
        return Run("passed")
    failed = [line for line in lines if line.startswith("FAILED ")]
    if code == 1 and failed:
        return Run("failed", failed[0])
    return Run("broken", "\n".join([f"exit code {code}", *lines[-20:]]))


def try_without(guard: Guard, root: Path, seconds: float) -> list[Run]:
    """Runs each test of a guard while the guard is replaced."""
    with replaced(guard, root):
        return [run(root, [test], seconds) for test in guard.tests]


def say(line: str) -> None:
    """Prints a line and flushes it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Tries guards; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.guards")
    parser.add_argument(
        "-k", default="", metavar="WORD", help="only guards with this word in their promise, file or tests"
    )
    parser.add_argument("--timeout", type=float, default=40.0, help="seconds after which a test counts as hanging")
    given = parser.parse_args()
    guards = [guard for guard in GUARDS if given.k in " ".join((guard.promise, guard.file, *guard.tests))]
    if not guards:
        parser.error(f"no guard contains {given.k!r} in its promise, file or tests")
    say(f"{len(guards)} guards; first their tests, unchanged")
    with tempfile.TemporaryDirectory(prefix="guards-") as folder:
        root = Path(folder)
        make_copy(REPOSITORY, root)
        before = run(root, sorted({test for guard in guards for test in guard.tests}), given.timeout)
        if before.outcome != "passed":
            say(before.reason)
            return 1
        needed = 0
        for guard in guards:
            started = time.monotonic()
            runs = try_without(guard, root, given.timeout)
            is_needed = all(one.outcome == "failed" for one in runs)
            needed += is_needed
            say(f"{'ok ' if is_needed else 'BAD'} {time.monotonic() - started:5.1f} s  {guard.promise} ({guard.file})")
            for test, one in zip(guard.tests, runs, strict=True):
                say(f"      {one.outcome}: {one.reason or test}")
    say(f"without the guard, all of its tests fail: {needed} of {len(guards)} guards")
    return 0 if needed == len(guards) else 1


if __name__ == "__main__":
    sys.exit(main())
