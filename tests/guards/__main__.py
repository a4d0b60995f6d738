"""Shows that tests fail without what they are there for: `python -m tests.guards`, or `make guards`.

Everything happens on a copy of the package and its tests. First the tests run there untouched, and must pass. Then one
guard after another is replaced, and each of its tests must fail. A test that hangs has failed, too.
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
        reason: why it did not pass.
    """

    outcome: Literal["passed", "failed", "broken"]
    reason: str = ""


def make_copy(repository: Path, root: Path) -> None:
    """Copies what the tests need."""
    for name in _COPIED:
        if (repository / name).is_dir():
            shutil.copytree(repository / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(repository / name, root / name)
    # Checked by content: a guard is replaced and put back within the granularity of file times.
    compileall.compile_dir(root / PACKAGE, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


@contextmanager
def replaced(guard: Guard, root: Path) -> Generator[None]:
    """The copy without a guard."""
    path = root / PACKAGE / guard.file
    original = path.read_text(encoding="utf-8")
    path.write_text(guard.without(original), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


def run(root: Path, tests: Sequence[str], seconds: float) -> Run:
    """Runs tests of a copy up to the first that fails.

    Args:
        root: the copy.
        tests: node ids.
        seconds: for each test; a run that does not end is killed after three times as many for each id.
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
                os.killpg(process.pid, signal.SIGKILL)  # with the services that the tests have started
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
    """Runs each test of a guard without that guard."""
    with replaced(guard, root):
        return [run(root, [test], seconds) for test in guard.tests]


def say(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Tries guards; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.guards")
    parser.add_argument("-k", default="", metavar="WORD", help="only guards with this in promise, file or test")
    parser.add_argument("--timeout", type=float, default=40.0, help="seconds for a test; it hangs after that")
    given = parser.parse_args()
    guards = [guard for guard in GUARDS if given.k in " ".join((guard.promise, guard.file, *guard.tests))]
    if not guards:
        parser.error(f"no guard has {given.k!r} in it")
    say(f"{len(guards)} guards; first their tests with all of them in place")
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
    say(f"{needed} of {len(guards)} guards are needed by all of their tests")
    return 0 if needed == len(guards) else 1


if __name__ == "__main__":
    sys.exit(main())
