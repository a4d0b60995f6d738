"""(b) The custom step of (a) with eight regularizers and gradient norms, against a bare step of the official SDK."""

from benchmarks.against_official import QUICK, SUBJECTS
from benchmarks.batches import BATCHES, Batch, rounds_of
from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import alternate, replayed

COMPOSED = {"official": SUBJECTS["official"], "own": "benchmarks.clients:own_composed_step"}


def run(settings: Settings) -> list[Result]:
    """Measures all batches."""
    batches = QUICK if settings.quick else BATCHES
    return [result for batch in batches for result in results_of(batch, rounds_of(batch, settings))]


def results_of(batch: Batch, rounds: int) -> list[Result]:
    """Returns the CPU and wall time of one batch. The gradients differ: the official SDK has no regularizers."""
    with replayed(COMPOSED, same=False, datums=batch.datums, shape=batch.shape) as services:
        measured = alternate(services.subjects, rounds=rounds)
    own, official = measured["own"], measured["official"]
    facts = {f"{name}_{fact}": value for name, one in measured.items() for fact, value in one.facts().items()}
    what = f"{batch.name}, 8 terms + norms"
    return [
        Result(
            benchmark="b",
            what=f"{what}: client CPU / official SDK's bare step",
            measured=own.cpu / official.cpu,
            bound=1 / 2,
            facts=facts,
        ),
        Result(
            benchmark="b",
            what=f"{what}: wall time / official SDK's bare step",
            measured=own.wall / official.wall,
            facts=facts,
        ),
    ]


BENCHMARK = Benchmark("b", "the same with eight regularizers and norms", run)
