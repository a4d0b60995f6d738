"""(j) A thousand samples of four tokens at the same time: this client against the official SDK."""

from collections.abc import Mapping, Sequence

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import Measured, alternate, replayed

SAMPLES, PROMPT_TOKENS = 1000, 64
SUBJECTS = {"official": "benchmarks.samplers:official", "own": "benchmarks.samplers:own"}
SERVICES: Mapping[str, Sequence[str]] = {"polled one by one": (), "one poll for all": ("--retrieve-futures",)}


def run(settings: Settings) -> list[Result]:
    """Measures both ways to wait for samples."""
    samples = 20 if settings.quick else SAMPLES
    results: list[Result] = []
    for way, options in SERVICES.items():
        with replayed(
            SUBJECTS, same=False, service_options=options, samples=samples, prompt_tokens=PROMPT_TOKENS
        ) as services:
            measured = alternate(services.subjects, rounds=settings.rounds)
        results += compared(f"{samples:,} samples, {way}", samples, measured)
    return results


def compared(what: str, samples: int, measured: Mapping[str, Measured]) -> list[Result]:
    """Returns the ratios of one way to wait."""
    own, official = measured["own"], measured["official"]
    facts = {f"{name}_{fact}": value for name, one in measured.items() for fact, value in one.facts().items()}
    milliseconds = own.cpu / samples * 1e3
    return [
        Result(
            benchmark="j",
            what=f"{what}: client CPU / official SDK",
            measured=own.cpu / official.cpu,
            bound=1 / 4,
            facts=facts,
        ),
        Result(benchmark="j", what=f"{what}: wall time / official SDK", measured=own.wall / official.wall, facts=facts),
        Result(benchmark="j", what=f"{what}: client CPU per sample", measured=milliseconds, unit="ms", facts=facts),
    ]


BENCHMARK = Benchmark("j", "a thousand samples at once", run)
