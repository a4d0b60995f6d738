"""A benchmark: a letter, a title, and a function that returns results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.results import Result


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

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
