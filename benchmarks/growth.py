"""(e) How time and memory grow with the data: one custom step from 10^4 to 10^7 tokens."""

from dataclasses import dataclass

from benchmarks.batches import Batch
from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import Measured, alternate, replayed, sent_bytes

LENGTH, QUICK_LENGTH = 1_000, 10
DATUMS = (10, 100, 1_000, 10_000)
# Below this, fixed costs dominate the time of a step.
LEAST_TOKENS = 100_000
MOST_ROUNDS = 5


@dataclass(frozen=True)
class Size:
    """The measurements of one size.

    Attributes:
        tokens: in all.
        own: the client.
        sent: bytes of the backward request.
    """

    tokens: int
    own: Measured
    sent: int

    @property
    def time_per_token(self) -> float:
        """Seconds per step."""
        return self.own.wall / self.tokens

    @property
    def memory(self) -> float:
        """Peak growth in multiples of the backward request."""
        return self.own.growth / self.sent


def run(settings: Settings) -> list[Result]:
    """Measures all sizes; those of 10^5 tokens and more have targets."""
    length = QUICK_LENGTH if settings.quick else LENGTH
    sizes = [measure(Batch(datums, (length,)), min(settings.rounds, MOST_ROUNDS)) for datums in DATUMS]
    judged = [size for size in sizes if settings.quick or size.tokens >= LEAST_TOKENS]
    times = [size.time_per_token for size in judged]
    facts = {f"{size.tokens}_{fact}": value for size in sizes for fact, value in size.own.facts().items()}
    told = [
        Result(
            benchmark="e",
            what=f"{size.tokens:,} tokens: time per 1,000 tokens",
            measured=size.time_per_token * 1e9,
            unit="us",
        )
        for size in sizes
    ]
    spread = Result(
        benchmark="e",
        what=f"time per token, dearest / cheapest of {judged[0].tokens:,} to {judged[-1].tokens:,} tokens",
        measured=max(times) / min(times),
        bound=3.0,
        facts=facts,
    )
    return [*told, spread, *(memory(size, judged=size in judged) for size in sizes)]


def memory(size: Size, *, judged: bool) -> Result:
    """Returns the peak memory of one size."""
    return Result(
        benchmark="e",
        what=f"{size.tokens:,} tokens: peak memory / bytes of the backward request",
        measured=size.memory,
        bound=4.0 if judged else None,
        facts={**size.own.facts(), "sent_bytes": size.sent},
    )


def measure(batch: Batch, rounds: int) -> Size:
    """Measures one size."""
    functions = {"own": "benchmarks.clients:own_step"}
    with replayed(functions, same=True, datums=batch.datums, shape=batch.shape) as service:
        own = alternate(service.subjects, rounds=rounds)["own"]
        return Size(batch.logprobs, own, sent_bytes(service.urls["own"]))


BENCHMARK = Benchmark("e", "growth with the data", run)
