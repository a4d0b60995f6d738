"""One term alone, as the rules see it: its value and gradient on any case, and what it reads."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tinkex_py.errors import NonFiniteLoss, RegularizerError
from tinkex_py.lint.cases import Case
from tinkex_py.losses.executor import TermRun
from tinkex_py.losses.gradients import norm
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.outcomes import PreparedTerm, prepare_base_loss, prepare_regularizer
from tinkex_py.losses.output import BASE_LOSS_NAME
from tinkex_py.losses.pipeline import Pipeline
from tinkex_py.losses.spec import PerDatum, RegularizerSpec, per_datum
from tinkex_py.losses.torch_modes import with_grad_on_while_suspended
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.terms.ready_made import ReadyMadeTerm
from tinkex_py.terms.reduction import DefaultMask, ReducedTerm
from tinkex_py.types.tensors import Array

_CUSTOM_MASKS = ("weights", "mask")


@dataclass(frozen=True)
class Evaluated:
    """A term on a case.

    Attributes:
        value: the loss; not finite if the loss or its gradient is not.
        gradient: of each datum, in the shape of its logprobs.
        differentiable: False if the loss does not depend on the logprobs.
    """

    value: float
    gradient: Sequence[torch.Tensor]
    differentiable: bool

    @property
    def finite(self) -> bool:
        """Whether the loss and its gradient are finite."""
        return bool(np.isfinite(self.value))

    @functools.cached_property
    def flat(self) -> torch.Tensor:
        """The gradient as one vector."""
        return torch.cat([part.reshape(-1) for part in self.gradient])

    @property
    def norm(self) -> float:
        """L2 norm of the gradient."""
        return norm(self.flat)

    def equals(self, other: "Evaluated") -> bool:
        """Whether value and gradient are the same, up to rounding."""
        return self.same_value(other) and self.same_gradient(other)

    def same_value(self, other: "Evaluated") -> bool:
        """Whether the values are the same, up to rounding."""
        return abs(self.value - other.value) <= 1e-5 * max(abs(self.value), abs(other.value)) + 1e-12

    def same_gradient(self, other: "Evaluated") -> bool:
        """Whether the gradients are the same, up to rounding."""
        return norm(self.flat - other.flat) <= 1e-5 * max(self.norm, other.norm) + 1e-12


@dataclass(frozen=True)
class Influence:
    """Whether a changed field changes the value and the gradient of a term."""

    value: bool
    gradient: bool


@dataclass(frozen=True)
class Alone:
    """A term that is ready to run by itself, with threads for its calls, and the limits of its pipeline in seconds."""

    term: PreparedTerm
    workers: WorkerPool
    timeout: float | None
    cancel_grace: float

    def with_option(self, name: str, value: object) -> "Alone":
        """Returns the term with another option."""
        return replace(self, term=replace(self.term, options={**self.term.options, name: value}))


@dataclass(frozen=True)
class Subject:
    """A term that is checked.

    Attributes:
        name: its name in the pipeline.
        term: the term itself, with the options of its spec if it is ready-made.
        alone: what runs it.
        case: the datums, and the logprobs in the precision that the term accepts.
        at: the term on this case.
        given: whether the logprobs are those of a model, instead of invented ones.
        accumulate: number of calls that the datums of an optimizer step are sent in; None if unknown.
        influences: of the fields of logprobs and of the advantages.
        preference: whether it prefers the chosen answers of pairs, see `preference_of`; None if it knows no pairs.
    """

    name: str
    term: object
    alone: Alone
    case: Case
    at: Evaluated
    given: bool = False
    accumulate: int | None = None
    influences: Mapping[str, Influence] = field(default_factory=dict[str, Influence])
    preference: int | None = None

    @property
    def is_base(self) -> bool:
        """Whether it is the base loss."""
        return self.name == BASE_LOSS_NAME

    @property
    def ready_made(self) -> ReadyMadeTerm | None:
        """The term, if it is ready-made."""
        return self.term if isinstance(self.term, ReadyMadeTerm) else None

    @property
    def surrogate(self) -> str | None:
        """Why the gradient is not the derivative of the value, if the term says so."""
        return getattr(self.term, "surrogate", None)

    @property
    def coupling(self) -> str | None:
        """Why the datums of a call belong together, if the term says so."""
        return getattr(self.term, "coupling", None)

    @property
    def shards(self) -> int:
        """The number of shards into which the term cuts its datums."""
        return getattr(self.term, "shards", 1)

    @property
    def mask(self) -> str | None:
        """The field that is the mask."""
        term = getattr(self.term, "policy", self.term)
        if isinstance(term, ReducedTerm):
            return term.mask.value if isinstance(term.mask, DefaultMask) else term.mask
        if isinstance(term, ReadyMadeTerm):
            return None
        return next((name for name in _CUSTOM_MASKS if self.case.values(name) is not None), None)

    @property
    def advantages(self) -> str:
        """The field with the advantages."""
        return getattr(getattr(self.term, "policy", self.term), "advantages_field", "advantages")

    @property
    def reads_advantages(self) -> bool:
        """Whether the advantages change the gradient."""
        found = self.influences.get(self.advantages)
        return found is not None and found.gradient

    async def measured(self, case: Case, *, alone: Alone | None = None) -> Evaluated | None:
        """Evaluates the term; None if it refuses the case."""
        try:
            return await measure(alone or self.alone, case)
        except NonFiniteLoss:
            return Evaluated(float("nan"), [], differentiable=True)
        except RegularizerError:
            return None


async def measure(alone: Alone, case: Case) -> Evaluated:
    """Evaluates one term.

    Raises:
        RegularizerError: the term failed.
    """
    own = Logprobs.from_tensors(list(case.logprobs), case.data)
    run = TermRun(case.data, own, alone.workers, 1, False, timeout=alone.timeout, cancel_grace=alone.cancel_grace)
    try:
        (outcome,) = await with_grad_on_while_suspended(run.all([alone.term], parallel=False))
        own.check_unchanged()
    finally:
        own.release_leaves()
    found = outcome.evaluation
    assert found is not None, "a failed term raises"
    gradient = torch.zeros_like(own.buffer) if found.gradient is None else found.gradient
    return Evaluated(found.value, own.views(gradient, case.data), found.differentiable)


def alone_in(pipeline: Pipeline, spec: RegularizerSpec | None, workers: WorkerPool) -> Alone:
    """Returns the base loss, or the regularizer of a spec, without its weight."""
    if spec is None:
        prepared = prepare_base_loss(_unsharded(pipeline.base_loss))
    else:
        # Without a weight, it emits no events.
        whole = prepare_regularizer(replace(spec, fn=_unsharded(spec.fn)))
        prepared = replace(whole, weight=None, on_error="raise", max_grad_norm=None)
    return Alone(prepared, workers, pipeline.timeout, pipeline.cancel_grace)


def _unsharded(term: Any) -> Any:
    """Returns a term that cuts its datums into shards without them: the rules compare parts with the whole."""
    if isinstance(term, PerDatum):
        return per_datum(_unsharded(term.fn))
    return getattr(term, "unsharded", term)


def term_of(pipeline: Pipeline, spec: RegularizerSpec | None) -> object:
    """Returns the base loss, or the term of a spec, without `per_datum` and with its options."""
    term: object = pipeline.base_loss if spec is None else spec.fn
    if isinstance(term, PerDatum):
        return term.fn
    return term.with_options(spec.options) if spec is not None and isinstance(term, ReadyMadeTerm) else term


async def influences_of(subject: Subject) -> dict[str, Influence]:
    """Returns what the fields of logprobs, turned around the model's, and the negated advantages change."""
    case, found = subject.case, dict[str, Influence]()
    changes: dict[str, Callable[[Array, int], Array]] = {
        name: lambda own, index: np.minimum(2.0 * case.logprobs[index].numpy() - own, -1e-3)
        for name in case.logprob_fields()
    }
    changes[subject.advantages] = lambda own, _: -own
    for name, change in changes.items():
        values = case.values(name)
        if values is None:
            continue
        changed = case.with_values(name, [change(own, index) for index, own in enumerate(values)])
        other = await subject.measured(changed)
        if other is None or not other.finite:
            found[name] = Influence(value=True, gradient=True)
        else:
            found[name] = Influence(not subject.at.same_value(other), not subject.at.same_gradient(other))
    return found


async def preference_of(subject: Subject) -> int | None:
    """Returns whether a term prefers the chosen answers of pairs (1), the rejected ones (-1), or mixes them (0).

    The chosen answers are those with a positive number in the term's `pair_field`, its `label_field` or `label`;
    without such a field every second datum, the first one included. Both sides change places: where that does not
    change the gradient, the term knows no pairs, and the result is None.
    """
    case = subject.case
    here = list(range(len(case.data)))
    names = [getattr(subject.term, name, None) for name in ("pair_field", "label_field")]
    labels = next((given for name in (*names, "label") if name and (given := _labels(case, name))), None)
    found: int | None = None
    if labels is not None:
        name, numbers = labels
        negated = case.with_values(name, [np.array([-number]) for number in numbers])
        found = await _preference(subject, negated, here, numbers)
    if found is None and len(case.data) % 2 == 0 and not subject.reads_advantages and await _is_same_for_pairs(subject):
        signs = [1.0 - 2.0 * (index % 2) for index in here]
        if labels is not None and all(one * two < 0 for one, two in zip(labels[1][::2], labels[1][1::2], strict=True)):
            signs = labels[1]
        partners = [index ^ 1 for index in here]
        found = await _preference(subject, case.picked(partners), partners, signs)
    return found


async def _is_same_for_pairs(subject: Subject) -> bool:
    """Returns whether the order of the pairs does not matter, as it would if a term depends on the place of a datum."""
    order = [*range(2, len(subject.case.data)), 0, 1]
    other = await subject.measured(subject.case.picked(order))
    if other is None or not other.finite:
        return False
    here = Evaluated(subject.at.value, [subject.at.gradient[index] for index in order], differentiable=True)
    return here.same_gradient(other)


async def _preference(subject: Subject, swapped: Case, places: Sequence[int], signs: Sequence[float]) -> int | None:
    """Compares with a case in which both sides changed places; `places` are those of the datums in it."""
    other = await subject.measured(swapped)
    if other is None or not other.finite:
        return None
    moves = [subject.at.gradient[at] - other.gradient[place] for at, place in enumerate(places)]
    smallest = 1e-6 * subject.at.norm
    if not any(norm(move) > smallest for move in moves):
        return None
    # A step goes against the gradient.
    towards = [-float(move.sum()) * sign for move, sign in zip(moves, signs, strict=True) if sign]
    if all(one > smallest for one in towards):
        return 1
    return -1 if all(one < -smallest for one in towards) else 0


def _labels(case: Case, name: str) -> tuple[str, list[float]] | None:
    values = case.values(name)
    if values is None or any(own.size != 1 for own in values):
        return None
    numbers = [float(own.reshape(-1)[0]) for own in values]
    return (name, numbers) if min(numbers) < 0 < max(numbers) else None
