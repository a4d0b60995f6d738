"""(d) 64 async terms that wait, and 16 sync terms that compute: wall time against the ideal, gaps of the event loop."""

from contextlib import ExitStack
from statistics import median
from typing import Any

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result, Unit, usable_cores
from benchmarks.subjects import Measured, alternate, subject

WAITING = {"terms": 64, "seconds": 0.05, "tokens": 1_000, "max_concurrency": 65}
BUSY = {"terms": 16, "tokens": 200_000}
QUICK_BUSY = {"terms": 4, "tokens": 5_000}
LONGEST_GAP_MS = 10.0


def run(settings: Settings) -> list[Result]:
    """Measures both kinds of terms."""
    return [*waiting(settings), *busy(settings)]


def waiting(settings: Settings) -> list[Result]:
    """Terms that wait 50 ms each; ideally all wait at the same time."""
    one = measured({"waiting": WAITING}, settings)["waiting"]
    facts = {**one.facts(), "worst_gap_s": max(one.returned)}
    ideal = WAITING["seconds"]
    return [
        result("64 async terms of 50 ms: wall time / 50 ms", one.wall / ideal, 1.6, facts),
        result("64 async terms of 50 ms: event loop's longest gap", gap_ms(one), None, facts, "ms"),
    ]


def busy(settings: Settings) -> list[Result]:
    """Terms that compute; ideally their torch work alone, spread evenly over the cores."""
    arguments = QUICK_BUSY if settings.quick else BUSY
    both = measured({"busy": arguments, "busy_alone": arguments}, settings)
    own, alone = both["busy"], both["busy_alone"]
    ideal = alone.cpu / usable_cores()
    facts = {f"{name}_{fact}": value for name, one in both.items() for fact, value in one.facts().items()}
    facts |= {"ideal_s": ideal, "gap_ms": gap_ms(own), "gap_alone_ms": gap_ms(alone), "worst_gap_s": max(own.returned)}
    what = f"{arguments['terms']} busy sync terms"
    return [
        result(f"{what}: wall time / ideal on {usable_cores()} cores", own.wall / ideal, None, facts),
        result(f"{what}: event loop's longest gap", gap_ms(own), LONGEST_GAP_MS, facts, "ms"),
        result("the same torch work in one plain thread: longest gap", gap_ms(alone), None, facts, "ms"),
    ]


def measured(arguments: dict[str, dict[str, Any]], settings: Settings) -> dict[str, Measured]:
    """Runs the subjects in turn."""
    with ExitStack() as stack:
        subjects = {
            name: stack.enter_context(subject(f"benchmarks.many_terms:{name}", given))
            for name, given in arguments.items()
        }
        return alternate(subjects, rounds=settings.rounds)


def gap_ms(one: Measured) -> float:
    """Returns the longest gap of a run, as the median over the runs, in milliseconds."""
    return median(one.returned) * 1e3


def result(what: str, number: float, bound: float | None, facts: dict[str, float], unit: Unit = "x") -> Result:
    """Returns one row of the table."""
    return Result(benchmark="d", what=what, measured=number, bound=bound, unit=unit, facts=facts)


BENCHMARK = Benchmark("d", "many terms at once", run)
