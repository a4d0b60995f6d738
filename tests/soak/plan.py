"""The plan of a soak, drawn from its seed before anything runs, so that a twin without faults can repeat it.

The outcome of every call is independent of time. Failures are planned: a term that raises or hangs, a caller that
leaves while a term waits, a datum that the service refuses. Only calls without effect are cancelled at any moment, and
calls of the wanderer, whose weights are not compared.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Fate = Literal["fine", "raises", "hangs", "waits"]
Leaving = Literal["stays", "at once", "inside a term", "deadline"]
Container = Literal["list", "numpy", "torch"]

CHUNK = 2
"""The maximum number of datums in one request."""
SHAPES = ("squares", "absolute", "spread", "weighted", "by numpy", "per datum", "with metrics", "ready-made L1")
TRACEABLE = ("squares", "absolute")
BASES = ("nll", "weighted nll", "ready-made NLL")


@dataclass(frozen=True)
class TermPlan:
    """One regularizer.

    Attributes:
        name: unique in its step.
        shape: its function, a key of `terms.FUNCTIONS`.
        weight: the weight; the first one if it is scheduled.
        scheduled: whether the weight depends on the step.
        is_async: whether it is a coroutine function; otherwise it runs in a worker thread.
        slow: whether it takes some milliseconds.
        fate: "waits" lasts until its caller leaves.
        skipped: whether a failure only skips the term.
    """

    name: str
    shape: str
    weight: float
    scheduled: bool
    is_async: bool
    slow: bool
    fate: Fate = "fine"
    skipped: bool = False


@dataclass(frozen=True)
class DataPlan:
    """Datums: their lengths, and the candidates of each position (None means one target)."""

    seed: int
    lengths: tuple[int, ...]
    candidates: int | None
    container: Container


@dataclass(frozen=True)
class Custom:
    """forward_backward_custom."""

    data: DataPlan
    base: str
    terms: tuple[TermPlan, ...]
    norms: bool
    parallel: bool
    overlap: bool
    on_service: bool
    leaving: Leaving = "stays"

    @property
    def failure(self) -> str | None:
        """The class of its planned error."""
        if self.leaving != "stays":
            return "TimeoutExceeded" if self.leaving == "deadline" else "CancelledError"
        classes = {"raises": "RegularizerError", "hangs": "RegularizerTimeout"}
        failing = [classes[term.fate] for term in self.terms if term.fate in classes and not term.skipped]
        return failing[0] if failing else None


@dataclass(frozen=True)
class BuiltIn:
    """forward_backward, with a last datum that the service refuses if `refused`."""

    data: DataPlan
    refused: bool = False

    @property
    def failure(self) -> str | None:
        """The class of its planned error; with more than two datums, another request takes effect."""
        if not self.refused:
            return None
        return "RequestFailed" if len(self.data.lengths) + 1 <= CHUNK else "PartialFailure"


@dataclass(frozen=True)
class Forward:
    """forward; its caller leaves after some seconds unless the call has ended."""

    data: DataPlan
    leaves_after: float | None = None
    failure: None = None


@dataclass(frozen=True)
class Optim:
    """optim_step."""

    learning_rate: float
    failure: None = None


@dataclass(frozen=True)
class Save:
    """save_state."""

    failure: None = None


@dataclass(frozen=True)
class Samples:
    """A sampling client for the current weights, and samples from it; some callers leave."""

    seed: int
    leave_after: tuple[float | None, ...]
    failure: None = None


Call = Custom | BuiltIn | Forward | Optim | Save | Samples


@dataclass(frozen=True)
class Burst:
    """Calls of one training client, started together or one after another."""

    calls: tuple[Call, ...]
    gathered: bool

    def failures(self) -> tuple[str | None, ...]:
        """Returns the class of each planned error. In a gathered burst, a failure also fails the calls behind it."""
        own = [call.failure for call in self.calls]
        if not self.gathered or not any(own):
            return tuple(own)
        first = next(index for index, failure in enumerate(own) if failure)
        return (*own[: first + 1], *["PrecedingRequestFailed"] * (len(own) - first - 1))


@dataclass(frozen=True)
class Reopen:
    """Saves, closes the training client, and continues with a new one from the checkpoint."""


@dataclass(frozen=True)
class Trainer:
    """The moves of one training client; `fresh` is the seed of a new adapter, None continues with the last one."""

    fresh: int | None
    moves: tuple[Burst | Reopen, ...]


@dataclass(frozen=True)
class Wandering:
    """A gathered burst whose callers leave after some seconds; meanwhile the client is closed if `closes`."""

    calls: tuple[Call, ...]
    leave_after: tuple[float | None, ...]
    closes: bool


@dataclass(frozen=True)
class SegmentPlan:
    """The plan between two checks of the resources: the trainers and the wanderer run concurrently."""

    trainers: tuple[Trainer, ...]
    wanderings: tuple[Wandering, ...]


# Drawing


def draw_segment(seed: int, index: int, *, trainers: int, moves: int) -> SegmentPlan:
    """Draws one segment; equal arguments give equal segments."""
    dice = random.Random(f"{seed}/{index}")

    def fresh(number: int) -> int | None:
        return 1000 * index + number if index == 0 or dice.random() < 0.2 else None

    return SegmentPlan(
        trainers=tuple(
            Trainer(fresh(number), tuple(_draw_move(dice) for _ in range(moves))) for number in range(trainers)
        ),
        wanderings=tuple(_draw_wandering(dice) for _ in range(moves)),
    )


def bursts(plan: SegmentPlan) -> Iterator[Burst]:
    """Yields the bursts of the trainers."""
    for trainer in plan.trainers:
        yield from (move for move in trainer.moves if isinstance(move, Burst))


def planned_failures(plan: SegmentPlan) -> Counter[str]:
    """Counts the planned failures by error class; "skipped" counts skipped terms."""
    planned: Counter[str] = Counter()
    for burst in bursts(plan):
        for call, failure in zip(burst.calls, burst.failures(), strict=True):
            at_any_moment = isinstance(call, Forward) and call.leaves_after is not None
            if failure is not None and not at_any_moment:
                planned[failure] += 1
            elif isinstance(call, Custom) and failure is None:
                planned["skipped"] += sum(term.fate != "fine" and term.skipped for term in call.terms)
    return +planned


def planned_leavers(plan: SegmentPlan) -> int:
    """Counts the callers that leave at any moment, unless their call ends earlier."""
    of_wanderings = sum(moment is not None for wandering in plan.wanderings for moment in wandering.leave_after)
    calls = [call for burst in bursts(plan) for call in burst.calls]
    of_forwards = sum(isinstance(call, Forward) and call.leaves_after is not None for call in calls)
    of_samples = sum(moment is not None for call in calls if isinstance(call, Samples) for moment in call.leave_after)
    return of_wanderings + of_forwards + of_samples


def _draw_move(dice: random.Random) -> Burst | Reopen:
    kind = dice.choices(
        ("step", "accumulated", "burst", "fails", "sample", "reopen"), weights=(8, 4, 4, 5, 1.5, 0.5), k=1
    )[0]
    if kind == "reopen":
        return Reopen()
    if kind == "sample":
        moments = tuple(dice.choice((None, None, _moment(dice))) for _ in range(dice.randint(1, 5)))
        return Burst((Samples(dice.randrange(1000), moments),), gathered=False)
    if kind == "fails":
        return _draw_failing(dice)
    gathered = dice.random() < 0.6
    if kind == "step":
        return Burst((_draw_gradient(dice), _draw_optim(dice)), gathered)
    if kind == "accumulated":
        passes = [_draw_gradient(dice) for _ in range(dice.randint(2, 4))]
        return Burst((*passes, _draw_optim(dice)), gathered)
    return Burst(tuple(_draw_any(dice) for _ in range(dice.randint(3, 6))), gathered=True)


def _draw_failing(dice: random.Random) -> Burst:
    if dice.random() < 0.2:
        return Burst((BuiltIn(_draw_data(dice), refused=True),), gathered=False)
    failing = _draw_custom(dice)
    chosen = dice.choice(("raises", "hangs", "at once", "inside a term", "deadline"))
    term = _draw_term(dice, "fails")
    if chosen in ("raises", "hangs"):
        term = replace(term, fate=chosen, skipped=dice.random() < 0.4)
        failing = replace(failing, terms=(*failing.terms, term), on_service=False)
    else:
        term = replace(term, fate="waits")
        failing = replace(failing, terms=(*failing.terms, term), on_service=False, parallel=True, leaving=chosen)
    before = [_draw_gradient(dice) for _ in range(dice.randint(0, 2))]
    behind = dice.choice([(_draw_optim(dice),), (_draw_gradient(dice), _draw_optim(dice)), ()])
    return Burst((*before, failing, *behind), gathered=dice.random() < 0.6)


def _draw_any(dice: random.Random) -> Call:
    kind = dice.choice(("gradient", "gradient", "optim", "forward", "save"))
    if kind == "gradient":
        return _draw_gradient(dice)
    if kind == "optim":
        return _draw_optim(dice)
    if kind == "save":
        return Save()
    return Forward(_draw_data(dice), dice.choice((None, _moment(dice))))


def _draw_gradient(dice: random.Random) -> Custom | BuiltIn:
    return BuiltIn(_draw_data(dice)) if dice.random() < 0.25 else _draw_custom(dice)


def _draw_custom(dice: random.Random) -> Custom:
    on_service = dice.random() < 0.1
    terms = tuple(_draw_term(dice, f"term{number}", traceable=on_service) for number in range(dice.randint(0, 4)))
    data = _draw_data(dice)
    if on_service:
        data = replace(data, candidates=None)
    return Custom(
        data=data,
        base=dice.choice(BASES[:1] if on_service else BASES),
        terms=terms,
        norms=not on_service and dice.random() < 0.3,
        parallel=dice.random() < 0.8,
        overlap=dice.random() < 0.7,
        on_service=on_service,
    )


def _draw_term(dice: random.Random, name: str, *, traceable: bool = False) -> TermPlan:
    return TermPlan(
        name=name,
        shape=dice.choice(TRACEABLE if traceable else SHAPES),
        weight=round(dice.uniform(0.01, 0.5), 3),
        scheduled=dice.random() < 0.2,
        is_async=not traceable and dice.random() < 0.5,
        slow=not traceable and dice.random() < 0.2,
    )


def _draw_data(dice: random.Random) -> DataPlan:
    return DataPlan(
        seed=dice.randrange(10_000),
        lengths=tuple(dice.randint(2, 10) for _ in range(dice.randint(1, 4))),
        candidates=dice.choice((None, None, None, 3)),
        container=dice.choice(("list", "numpy", "torch")),
    )


def _draw_optim(dice: random.Random) -> Optim:
    return Optim(dice.choice((1e-3, 3e-3, 5e-3)))


def _moment(dice: random.Random) -> float:
    """Draws seconds; half of them are only a few turns of the loop."""
    return dice.choice((0.0, 0.001, dice.uniform(0.0, 0.03), dice.uniform(0.0, 0.1)))


def _draw_wandering(dice: random.Random) -> Wandering:
    calls = tuple(_draw_any(dice) for _ in range(dice.randint(1, 5)))
    moments = tuple(dice.choice((None, _moment(dice))) for _ in calls)
    return Wandering(calls, moments, closes=dice.random() < 0.15)
