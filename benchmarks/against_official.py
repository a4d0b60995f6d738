"""(a) One custom step with only a negative log-likelihood: this client against the official SDK."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.batches import BATCHES, Batch, rounds_of
from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import Measured, alternate, replayed

SUBJECTS = {"official": "benchmarks.clients:official_step", "own": "benchmarks.clients:own_step"}
QUICK = (Batch(16, (32,)), Batch(8, (16, 4)))


@dataclass(frozen=True)
class Bounds:
    """Targets of one batch; None means no target."""

    cpu: float | None = None
    wall: float | None = None


BOUNDS = {BATCHES[1]: Bounds(cpu=1 / 5, wall=1 / 3), BATCHES[2]: Bounds(cpu=1 / 4, wall=1 / 2)}


def run(settings: Settings) -> list[Result]:
    """Measures all batches."""
    batches = QUICK if settings.quick else BATCHES
    measured = {batch: measure(batch, rounds_of(batch, settings)) for batch in batches}
    return [result for batch, clients in measured.items() for result in compared(batch, clients)]


def measure(batch: Batch, rounds: int) -> dict[str, Measured]:
    """Measures both clients on one batch, and checks that they send the same gradient."""
    with replayed(SUBJECTS, same=True, datums=batch.datums, shape=batch.shape) as services:
        return alternate(services.subjects, rounds=rounds)


def compared(batch: Batch, measured: Mapping[str, Measured]) -> list[Result]:
    """Returns the ratios of one batch."""
    own, official = measured["own"], measured["official"]
    bounds = BOUNDS.get(batch, Bounds())
    ratios = [
        ("client CPU", own.cpu / official.cpu, bounds.cpu),
        ("wall time", own.wall / official.wall, bounds.wall),
        ("peak memory", own.growth / official.growth, 1.0),
    ]
    facts = {f"{name}_{fact}": value for name, one in measured.items() for fact, value in one.facts().items()}
    return [
        Result(benchmark="a", what=f"{batch.name}: {what} / official SDK", measured=ratio, bound=bound, facts=facts)
        for what, ratio, bound in ratios
    ]


BENCHMARK = Benchmark("a", "one custom step against the official SDK", run)
