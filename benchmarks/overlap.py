"""(h) Eight micro-batches accumulated with one `asyncio.gather`, over a network with a long return path."""

from contextlib import ExitStack
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import BenchmarkError, Measured, alternate, served, subject

BATCHES = 8
SHAPE = (32, 128)
DELAY_SECONDS, TERM_SECONDS = 0.05, 0.03
QUICK_DELAY_SECONDS = 0.005
# The tiny model is too small for a second compute thread.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run(settings: Settings) -> list[Result]:
    """Runs both ways on one service."""
    delay = QUICK_DELAY_SECONDS if settings.quick else DELAY_SECONDS
    return [compared(measure(settings.rounds, batches=BATCHES, delay=delay, term=TERM_SECONDS), delay)]


def measure(rounds: int, *, batches: int, delay: float, term: float) -> dict[str, Measured]:
    """Runs all micro-batches together, and one after another; checks that the trained weights are equal."""
    with ExitStack() as stack:
        service = stack.enter_context(served("tinkex_py", "serve", "--model", "tiny", "--port", "0", **ONE_THREAD))
        proxy = stack.enter_context(served("benchmarks.delay_proxy", urlsplit(service).netloc, "--seconds", str(delay)))
        arguments: dict[str, Any] = {
            "base_url": proxy,
            "batches": batches,
            "shape": SHAPE,
            "term_seconds": term,
        }
        subjects = {
            name: stack.enter_context(
                subject("benchmarks.trainings:accumulated", {**arguments, "together": together}, **ONE_THREAD)
            )
            for name, together in (("together", True), ("in_turn", False))
        }
        measured = alternate(subjects, rounds=rounds)
    check_weights(measured)
    return measured


def check_weights(measured: dict[str, Measured]) -> None:
    """Checks that all runs trained the same weights.

    Raises:
        BenchmarkError: the weights are not the same, bit by bit.
    """
    digests = {result["weights"] for one in measured.values() for result in one.returned}
    if len(digests) != 1:
        raise BenchmarkError(f"eight steps together and in turn trained {len(digests)} different sets of weights")


def compared(measured: dict[str, Measured], delay: float) -> Result:
    """The ratio of the times."""
    seconds = {name: median(result["seconds"] for result in one.returned) for name, one in measured.items()}
    return Result(
        benchmark="h",
        what=f"{BATCHES} micro-batches together / one after another, answers {delay * 1e3:.0f} ms late: wall time",
        measured=seconds["together"] / seconds["in_turn"],
        bound=0.6,
        facts={f"{name}_wall_s": value for name, value in seconds.items()},
    )


BENCHMARK = Benchmark("h", "micro-batches accumulated at the same time", run)
