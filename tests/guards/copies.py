"""Copies of the package and its tests, in which a guard can be taken out, and pytest's word on them."""

import compileall
import json
import os
import py_compile
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.guards.entry import PACKAGE, Guard, Stale, without
from tests.guards.observer import NOT_THE_COPY, REPORT, WATCHED

COPIED = (PACKAGE, "tests", "pyproject.toml")
AS_IT_SHOULD = "fails as it should"
STILL_PASSES = "STILL PASSES"
STALE = "stale"
HANGS = "hangs"
ERROR = "error"
HANGS_AFTER = 40.0
"""Seconds; the tests that may hang take a few where they do not."""
_CODES = {2: "a collection error", 3: "pytest failed", 4: "no such test", 5: "nothing was run"}


@dataclass(frozen=True)
class Verdict:
    """What came of an entry.

    Attributes:
        word: what the table says.
        reasons: why each test failed, or what is wrong with the entry.
    """

    word: str
    reasons: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        return self.word == AS_IT_SHOULD


def make_copy(repository: Path, folder: Path) -> Path:
    """A copy of what the tests need, below a folder."""
    root = folder / "copy"
    for name in COPIED:
        source, target = repository / name, root / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    # By content and not by date: a guard is taken out and put back within the same second.
    compileall.compile_dir(root / PACKAGE, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return root


@contextmanager
def taken_out(entry: Guard, root: Path) -> Generator[None]:
    """The copy without a guard.

    Raises:
        Stale: the guard is not there.
    """
    path = root / PACKAGE / entry.file
    changed = without(entry, root)
    before = path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What pytest said.

    Attributes:
        code: its exit code; None if it did not end in time.
        failed: tests that failed, and why.
        broken: tests whose preparation failed already, and why.
        said: its last lines.
    """

    code: int | None
    failed: dict[str, str]
    broken: dict[str, str]
    said: str


def run_tests(root: Path, tests: Sequence[str], seconds: float | None) -> Outcome:
    """Runs tests of a copy.

    Args:
        root: the copy.
        tests: node ids.
        seconds: how long they may take; None for any time.
    """
    report = root / "report.json"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        REPORT: str(report),
        WATCHED: json.dumps(list(tests)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "tests.guards.observer", *tests]
    with (root / "output.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        output.seek(0)
        said = output.read()[-2000:]
    told: dict[str, dict[str, str]] = {"failed": {}, "broken": {}}
    if report.is_file():
        told = json.loads(report.read_text(encoding="utf-8"))
    return Outcome(code, told["failed"], told["broken"], said)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a run that still goes on, with the services that it has started: they are of one group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judge(entry: Guard, outcome: Outcome) -> Verdict:
    """What the outcome says of an entry."""
    if outcome.code is None:
        return Verdict(AS_IT_SHOULD if entry.may_hang else HANGS)
    if outcome.code == 0:
        return Verdict(STILL_PASSES, entry.tests)
    if outcome.code != 1:
        what = "another package was imported" if outcome.code == NOT_THE_COPY else _CODES.get(outcome.code, "")
        return Verdict(ERROR, (f"exit code {outcome.code}: {what}", outcome.said))
    if outcome.broken:
        return Verdict(ERROR, tuple(f"before {test}: {reason}" for test, reason in outcome.broken.items()))
    passed = tuple(test for test in entry.tests if test not in outcome.failed)
    return Verdict(STILL_PASSES, passed) if passed else Verdict(AS_IT_SHOULD, tuple(outcome.failed.values()))


def try_without(entry: Guard, root: Path, seconds: float) -> Verdict:
    """Takes a guard out of a copy, runs its tests, and puts it back."""
    try:
        with taken_out(entry, root):
            limit = min(seconds, HANGS_AFTER) if entry.may_hang else seconds
            return judge(entry, run_tests(root, entry.tests, limit))
    except Stale as error:
        return Verdict(STALE, (str(error),))
