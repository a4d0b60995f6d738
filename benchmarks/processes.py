"""(k) Terms in worker processes against the same in threads: pure Python at once, and the overhead of crossing."""

from contextlib import ExitStack
from statistics import median
from typing import Any

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result, Unit
from benchmarks.subjects import Measured, alternate, subject

ROUNDS, QUICK_ROUNDS = 16_000_000, 200_000  # about 1 s, and too short for a verdict
STEPS = ((1_000_000, False, 15.0), (1_000_000, True, None), (1_000, True, 3.0))
QUICK_STEPS = ((2_000, False, 15.0), (1_000, True, 3.0))
LONGEST_GAP_MS = 10.0


def run(settings: Settings) -> list[Result]:
    """Measures both."""
    results = together(settings)
    for tokens, datums, bound in QUICK_STEPS if settings.quick else STEPS:
        results.append(overhead(settings, tokens, datums, bound))
    return results


def together(settings: Settings) -> list[Result]:
    """Two terms of pure Python, against one alone."""
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    subjects = {
        "alone": {"place": "process", "terms": 1, "rounds": rounds},
        "processes": {"place": "process", "terms": 2, "rounds": rounds},
        "threads": {"place": "thread", "terms": 2, "rounds": rounds},
    }
    measured = _measured("pure_python", subjects, settings)
    facts = _facts(measured)
    what = f"two terms of pure Python, {measured['alone'].wall:.1f} s each"
    return [
        _result(f"{what}: in processes / one alone", measured["processes"].wall / measured["alone"].wall, 1.2, facts),
        _result(f"{what}: in threads / one alone", measured["threads"].wall / measured["alone"].wall, None, facts),
        _result(f"{what}: in processes, longest gap", _gap_ms(measured["processes"]), LONGEST_GAP_MS, facts, "ms"),
        _result(f"{what}: in threads, longest gap", _gap_ms(measured["threads"]), None, facts, "ms"),
    ]


def overhead(settings: Settings, tokens: int, datums: bool, bound: float | None) -> Result:
    """What a step with a warm process takes beyond the same step with a thread."""
    subjects = {place: {"place": place, "tokens": tokens, "datums": datums} for place in ("process", "thread")}
    measured = _measured("one_term", subjects, settings)
    extra = (measured["process"].wall - measured["thread"].wall) * 1e3
    data = "with datums" if datums else "without datums"
    what = f"{tokens:,} tokens {data}: a term in a process, beyond one in a thread"
    return _result(what, extra, bound, _facts(measured), "ms")


def _measured(function: str, arguments: dict[str, dict[str, Any]], settings: Settings) -> dict[str, Measured]:
    with ExitStack() as stack:
        subjects = {
            name: stack.enter_context(subject(f"benchmarks.places:{function}", given))
            for name, given in arguments.items()
        }
        return alternate(subjects, rounds=settings.rounds, warm_up=2)


def _facts(measured: dict[str, Measured]) -> dict[str, float]:
    return {f"{name}_{fact}": value for name, one in measured.items() for fact, value in one.facts().items()}


def _gap_ms(one: Measured) -> float:
    return median(one.returned) * 1e3


def _result(what: str, number: float, bound: float | None, facts: dict[str, float], unit: Unit = "x") -> Result:
    return Result(benchmark="k", what=what, measured=number, bound=bound, unit=unit, facts=facts)


BENCHMARK = Benchmark("k", "terms in processes against threads", run)
