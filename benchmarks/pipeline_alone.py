"""(c) The pipeline alone, without any service: against a fused total and a naive loop in plain torch."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import Measured, alternate, check_equal, subject

WAYS = ("pipeline", "pipeline_on_cpus", "fused", "naive", "naive_threads")
TINY_WAYS = ("pipeline", "terms_alone")
TERMS = 9  # the base loss and eight regularizers
TOKENS, QUICK_TOKENS = 1_000_000, 2_000
TINY_TOKENS = 16
REPEAT, QUICK_REPEAT = 50, 5


def run(settings: Settings) -> list[Result]:
    """Measures at 10^6 tokens, and the overhead per term on tiny tensors."""
    tokens = QUICK_TOKENS if settings.quick else TOKENS
    repeat = QUICK_REPEAT if settings.quick else REPEAT
    large = measure(WAYS, settings.rounds, tokens=tokens)
    tiny = measure(TINY_WAYS, settings.rounds, tokens=TINY_TOKENS, repeat=repeat)
    return [*compared(tokens, large), overhead(tiny, repeat)]


def measure(ways: Sequence[str], rounds: int, **arguments: Any) -> dict[str, Measured]:
    """Runs the ways in turn, and checks that they compute the same gradient."""
    with tempfile.TemporaryDirectory(prefix="tinkex-bench-") as name, ExitStack() as stack:
        files = {way: Path(name) / f"{way}.npy" for way in ways}
        subjects = {
            way: stack.enter_context(subject(f"benchmarks.ways:{way}", {"gradient_to": str(file), **arguments}))
            for way, file in files.items()
        }
        measured = alternate(subjects, rounds=rounds)
        check_equal({way: np.load(file) for way, file in files.items()})
    return measured


def compared(tokens: int, measured: Mapping[str, Measured]) -> list[Result]:
    """Compares the pipeline with norms with the others."""
    facts = {f"{way}_{fact}": value for way, one in measured.items() for fact, value in one.facts().items()}
    pipeline = measured["pipeline"].wall
    ratios: list[tuple[str, float, float | None, str]] = [
        ("pipeline with norms / fused total, time", pipeline / measured["fused"].wall, 1.5, "at most"),
        ("naive way / pipeline, time", measured["naive"].wall / pipeline, 2.0, "at least"),
        ("naive way in fresh threads / pipeline, time", measured["naive_threads"].wall / pipeline, 2.0, "at least"),
        (
            "pipeline with norms, its threads kept on their CPUs / fused total, time",
            measured["pipeline_on_cpus"].wall / measured["fused"].wall,
            None,
            "at most",
        ),
        ("pipeline with norms / fused total, CPU", measured["pipeline"].cpu / measured["fused"].cpu, None, "at most"),
    ]
    return [
        Result.model_validate(
            {
                "benchmark": "c",
                "what": f"{tokens:,} tokens, 8 terms: {what}",
                "measured": ratio,
                "bound": bound,
                "target": target,
                "facts": facts,
            }
        )
        for what, ratio, bound, target in ratios
    ]


def overhead(measured: Mapping[str, Measured], repeat: int) -> Result:
    """Measures what the pipeline adds to the torch work of a term."""
    facts = {f"{way}_{fact}": value for way, one in measured.items() for fact, value in one.facts().items()}
    extra = measured["pipeline"].wall - measured["terms_alone"].wall
    return Result(
        benchmark="c",
        what=f"{TINY_TOKENS} tokens: overhead beyond a term's own torch work",
        measured=extra / repeat / TERMS * 1e6,
        unit="us",
        bound=300,
        facts={**facts, "repeat": repeat, "terms": TERMS},
    )


BENCHMARK = Benchmark("c", "the pipeline against plain torch", run)
