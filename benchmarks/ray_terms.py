"""(k) Terms on a local Ray against threads. Without Ray there are no rows; `make ray` installs it into .ray."""

import importlib
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.composed import base_loss
from benchmarks.event_loop import watched_loop
from benchmarks.many_terms import Work
from benchmarks.results import Result, Unit, usable_cores
from benchmarks.subjects import Measured, alternate, subject
from benchmarks.ways import logprobs_of
from tinkex_py import Datum, ModelInput, Pipeline, RegularizerSpec

LOOPS, QUICK_LOOPS = 20_000_000, 100_000
SIZES, QUICK_SIZES = (1_000, 1_000_000), (1_000,)
DATUM = 1_000  # tokens
PLACES = ("thread", "task", "actor")


def slow(_data: Any, logprobs: torch.Tensor, loops: int) -> torch.Tensor:
    """Holds Python's lock, about one second for 20 million loops."""
    for _ in range(loops):
        pass
    return logprobs.square().mean()


class Slow:
    """The same as an object."""

    def compute(self, data: Any, logprobs: torch.Tensor, loops: int) -> torch.Tensor:
        return slow(data, logprobs, loops)


@asynccontextmanager
async def terms(place: str, count: int, loops: int, tokens: int) -> AsyncGenerator[Work]:
    """Terms in threads, as Ray tasks or on actors. Each run returns the longest gap of the event loop, in seconds."""
    ray = None if place == "thread" else importlib.import_module("ray")
    if ray is not None:
        ray.init(
            num_cpus=max(count, usable_cores()), include_dashboard=False, log_to_driver=False, logging_level="error"
        )
    specs = [
        RegularizerSpec(fn=_term(place), weight=0.01, name=f"term{number}", options={"loops": loops}, timeout=120.0)
        for number in range(count)
    ]
    pipeline = Pipeline(base_loss, specs)
    data = [_datum() for _ in range(tokens // DATUM)]
    logprobs = logprobs_of(tokens)

    async def work() -> float:
        with watched_loop() as gap:
            await pipeline.compute(data, logprobs)
        return gap.worst

    try:
        yield work
    finally:
        if ray is not None:
            ray.shutdown()


def _term(place: str) -> Any:
    if place == "thread":
        return slow
    from tinkex_py.integrations.ray import RayTerm

    return RayTerm(slow if place == "task" else Slow)


def _datum() -> Datum:
    tokens = list(range(DATUM))
    return Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs={"target_tokens": tokens})


def run(settings: Settings) -> list[Result]:
    """Measures two terms that hold Python's lock, and what Ray adds to one that does nothing."""
    if find_spec("ray") is None:
        return []
    loops = QUICK_LOOPS if settings.quick else LOOPS
    both = measured(settings, places=("thread", "task"), count=2, loops=loops, tokens=DATUM)
    ratio = both["task"].wall / both["thread"].wall
    results = [result(f"two terms of pure Python: Ray / threads, time on {usable_cores()} cores", ratio, both, "x")]
    for tokens in QUICK_SIZES if settings.quick else SIZES:
        each = measured(settings, places=PLACES, count=1, loops=0, tokens=tokens)
        for place in PLACES[1:]:
            extra = (each[place].wall - each["thread"].wall) * 1e3
            results.append(result(f"{tokens:,} tokens: a warm Ray {place} beyond a thread", extra, each))
        gap = median(each["task"].returned) * 1e3
        results.append(result(f"{tokens:,} tokens: event loop's longest gap with a Ray task", gap, each))
    return results


def measured(settings: Settings, *, places: tuple[str, ...], **arguments: Any) -> dict[str, Measured]:
    """Runs the places in turn."""
    with ExitStack() as stack:
        subjects = {
            place: stack.enter_context(subject("benchmarks.ray_terms:terms", {"place": place, **arguments}))
            for place in places
        }
        return alternate(subjects, rounds=settings.rounds, warm_up=3)


def result(what: str, number: float, each: dict[str, Measured], unit: Unit = "ms") -> Result:
    """Returns one row of the table."""
    facts = {f"{place}_{fact}": value for place, one in each.items() for fact, value in one.facts().items()}
    return Result(benchmark="k", what=what, measured=number, unit=unit, facts=facts)


BENCHMARK = Benchmark("k", "terms on Ray against threads", run)
