"""(g) Fifty training clients of one session on one loop, with all their steps at the same time."""

from statistics import median

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import Measured, alternate, replayed

CLIENTS, STEPS = 50, 4
DATUMS, SHAPE = 16, (256,)
SUBJECTS = {
    "together": "benchmarks.clients:own_together",
    "frozen": "benchmarks.clients:own_together_frozen",
    "alone": "benchmarks.clients:own_one_by_one",
    "official": "benchmarks.clients:official_together",
}


def run(settings: Settings) -> list[Result]:
    """Measures steps of a custom step and an optimizer step each."""
    clients = 3 if settings.quick else CLIENTS
    with replayed(SUBJECTS, same=False, clients=clients, steps=STEPS, datums=DATUMS, shape=SHAPE) as services:
        measured = alternate(services.subjects, rounds=settings.rounds)
    together, frozen, alone, official = (measured[name] for name in SUBJECTS)
    facts = {f"{name}_{fact}": value for name, one in measured.items() for fact, value in one.facts().items()}
    facts |= {"clients": clients, "steps": STEPS}
    what = f"{clients} clients x {STEPS} steps of {DATUMS} x {SHAPE[0]}"

    def result(text: str, number: float) -> Result:
        return Result(benchmark="g", what=f"{what}: {text}", measured=number, facts=facts)

    return [
        result("client CPU / official SDK", together.cpu / official.cpu),
        result("wall time / official SDK", together.wall / official.wall),
        result("client CPU / the same steps one by one", together.cpu / alone.cpu),
        result("wall time / the same steps one by one", together.wall / alone.wall),
        longest_gap(f"{what}: event loop's longest gap", together),
        longest_gap(f"{what}: event loop's longest gap after gc.freeze()", frozen),
    ]


def longest_gap(what: str, one: Measured) -> Result:
    """Returns the longest gap of a run, as the median over the runs."""
    worst = {"worst_gap_s": max(one.returned)}
    return Result(benchmark="g", what=what, measured=median(one.returned) * 1e3, unit="ms", facts=worst)


BENCHMARK = Benchmark("g", "fifty training clients on one loop", run)
