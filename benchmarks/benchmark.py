"""What a benchmark is: a letter, a title, and a function that gives results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.results import Result


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Attributes:
        rounds: runs of every subject that count.
        quick: small sizes.
    """

    rounds: int = 7
    quick: bool = False


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: its letter.
        title: what it measures.
        run: does it.
    """

    name: str
    title: str
    run: Callable[[Settings], Sequence[Result]]
