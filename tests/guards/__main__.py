"""Shows that tests fail without what they are there for: `python -m tests.guards`, or `make guards`.

Each entry of the catalogue is taken out of a copy of the package, and its tests are run on that. Nothing is changed in
the repository. First the same tests are run on an untouched copy, where they must pass.
"""

import argparse
import queue
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.guards.catalogue import GUARDS
from tests.guards.copies import Verdict, make_copy, run_tests, try_without
from tests.guards.entry import Guard

REPOSITORY = Path(__file__).parents[2]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def row(entry: Guard, seconds: float, verdict: Verdict) -> str:
    """A line of the table; it is Markdown."""
    names = ", ".join(dict.fromkeys(test.partition("::")[2].partition("[")[0] for test in entry.tests))
    return f"| {entry.promise} | {entry.file} | {names} | {seconds:.1f} | {verdict.word} |"


def chosen(word: str) -> list[Guard]:
    """The entries that have a word in their promise, file or tests."""
    return [entry for entry in GUARDS if word in " ".join((entry.promise, entry.file, *entry.tests))]


def try_all(entries: Sequence[Guard], copies: Sequence[Path], seconds: float, *, verbose: bool) -> list[Verdict]:
    """Tries the entries, one at a time in each copy, and says what came of each."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def try_one(entry: Guard) -> Verdict:
        root = free.get()
        started = time.monotonic()
        try:
            verdict = try_without(entry, root, seconds)
        finally:
            free.put(root)
        say(row(entry, time.monotonic() - started, verdict))
        if verbose or not verdict.is_good:
            for reason in verdict.reasons:
                say(f"    {reason}")
        return verdict

    with ThreadPoolExecutor(len(copies)) as threads:
        return list(threads.map(try_one, entries))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.guards")
    parser.add_argument("-k", default="", metavar="WORD", help="only entries with this in promise, file or test")
    parser.add_argument("--timeout", type=float, default=100.0, help="seconds for the tests of one entry")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="entries at a time")
    parser.add_argument("--no-first-look", action="store_true", help="do not run the tests with all guards in place")
    parser.add_argument("--verbose", action="store_true", help="say why each test failed")
    given = parser.parse_args()
    entries = chosen(given.k)
    if not entries:
        sys.exit(f"no entry of the catalogue has {given.k!r} in it")
    with tempfile.TemporaryDirectory(prefix="guards-") as folder:
        copies = [make_copy(REPOSITORY, Path(folder) / str(number)) for number in range(given.jobs)]
        if not given.no_first_look:
            tests = sorted({test for entry in entries for test in entry.tests})
            started = time.monotonic()
            outcome = run_tests(copies[0], tests, None)
            if outcome.code != 0:
                sys.exit(f"the tests fail with all guards in place:\n{outcome.said}")
            say(f"With all guards in place {len(tests)} tests pass ({time.monotonic() - started:.0f} s).\n")
        say("| promise | guard | test | seconds | without it |\n| --- | --- | --- | --- | --- |")
        verdicts = try_all(entries, copies, given.timeout, verbose=given.verbose)
    bad = sum(not verdict.is_good for verdict in verdicts)
    say(f"\n{len(verdicts)} guards taken out: {len(verdicts) - bad} as it should be, {bad} not")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
