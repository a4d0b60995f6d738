"""Terms and regularizer specs.

A term maps `(data, logprobs)` to a loss, to `(loss, metrics)` or to `Scored`. A regularizer is a term with a weight
and a name. Source: the regularizers guide, "Core Concepts".
"""

import functools
import hashlib
import inspect
import math
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Union, cast, runtime_checkable

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from tenacity import AsyncRetrying

from tinkex_py.arguments import as_integer, shown
from tinkex_py.errors import DuplicateRegularizerNames, InvalidSpec, MissingExtra
from tinkex_py.html_table import html_facts
from tinkex_py.losses.checks import first_problem
from tinkex_py.losses.constraints import Constraint, DualAscent
from tinkex_py.losses.options import Place
from tinkex_py.losses.output import BASE_LOSS_NAME
from tinkex_py.losses.weights import Weight, WeightController, checked_weight
from tinkex_py.processes.crossing import pickled_by_value, unpickled
from tinkex_py.types import Datum
from tinkex_py.values import Number

if TYPE_CHECKING:
    import torch

    from tinkex_py.losses.known_gradient import Scored

Metric = Union[bool, int, float, "torch.Tensor"]
TermResult = Union["torch.Tensor", tuple["torch.Tensor", Mapping[str, Metric]], "Scored"]
TermFunction = Callable[..., TermResult | Awaitable[TermResult]]
OnError = Literal["raise", "skip"]
Crossing = tuple[bytes, bytes]


@runtime_checkable
class Regularizer(Protocol):
    """Protocol of objects that are terms. No base class is needed.

    An optional `name` attribute is the default name in a spec.
    """

    @property
    def compute(self) -> TermFunction:
        """A method `compute(self, data, logprobs, **options)`, sync or async.

        `data` are the datums of the step. `logprobs` is packed, `[sum(T_i)]` or `[sum(T_i), K]`. The method returns
        the loss, `(loss, metrics)` or `Scored`.
        """
        ...


@runtime_checkable
class ConfiguredTerm(Protocol):
    """Protocol of terms that are defined by their settings, such as the ready-made terms. They need packed logprobs."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises InvalidSpec if the options of a spec are not valid settings."""
        ...

    def settings(self) -> dict[str, Any]:
        """Returns the keyword arguments that create an equal object of the same class."""
        ...


@dataclass(frozen=True)
class PerDatum:
    """A term that receives a list of tensors, one per datum, instead of the packed tensor; see `per_datum`."""

    fn: "Term"

    @property
    def name(self) -> str | None:
        """Name of the wrapped term, if it has one."""
        return term_name(self.fn)

    def __call__(self, data: Sequence[Datum], logprobs: "Sequence[torch.Tensor]", **options: Any) -> Any:
        """Calls the wrapped term with one tensor per datum."""
        return term_function(self.fn)(data, logprobs, **options)


Term = TermFunction | Regularizer | ModuleType | PerDatum


def per_datum(fn: Term) -> PerDatum:
    """Marks a term that receives a list of tensors: one view per datum, in data order.

    Loss functions written for the official SDK work unchanged.
    """
    return fn if isinstance(fn, PerDatum) else PerDatum(fn)


def _copy(options: Mapping[str, Any]) -> dict[str, Any]:
    return dict(options)


class _PlainFields(BaseModel):
    """Checks the fields of `RegularizerSpec` that do not depend on each other."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(min_length=1)]
    timeout: Annotated[Number, Field(gt=0)] | None
    options: Annotated[Mapping[str, Any], AfterValidator(_copy)]
    on_error: OnError
    enabled: bool
    is_async: bool | None
    max_grad_norm: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None
    runs_in: Place | None
    at_most: Annotated[Number, Field(allow_inf_nan=False)] | None
    at_least: Annotated[Number, Field(allow_inf_nan=False)] | None


@dataclass(frozen=True)
class RegularizerSpec:
    """A regularizer with its weight or bound, name, timeout and options.

    Args:
        fn: a function, coroutine function, partial, callable object, object or module with `compute`, or one
            of these under `per_datum`. Called as `fn(data, logprobs, **options)`.
        weight: multiplies the value and the gradient; finite and >= 0. Or a schedule, which is any callable
            `step -> weight` (see `tinkex_py.losses.schedules`), or a controller (see `tinkex_py.losses.controllers`).
            Exactly one of `weight`, `at_most` and `at_least` is required; with a bound, `weight` becomes the controller
            of its multiplier, so that one spec belongs to one run.
        name: unique within a pipeline. Default is `fn.name`, or the `__name__` of a function, also inside of
            `functools.partial` or `per_datum`. Lambdas and other objects need a name.
        timeout: seconds for this term; None uses the timeout of the pipeline, `math.inf` means no limit.
        options: keyword arguments for `fn`.
        on_error: "skip" leaves a failed term out of the step, "raise" fails the step.
        enabled: False leaves the term out of the loss.
        is_async: True calls `fn` on the event loop and awaits it, False runs it in a worker thread, None detects.
        retry: for async terms: the maximum number of calls, or a `tenacity.AsyncRetrying`. The timeout covers all
            attempts.
        max_grad_norm: largest L2 norm of the term's gradient, before the weight; a larger gradient is scaled down.
            None means no limit.
        runs_in: "loop" calls an async `fn` on the event loop, "thread" runs a sync one in a worker thread, "process" in
            a worker process, which a timeout or cancellation kills. `fn` and its options cross to the process as they
            are when the spec is made. None is "loop" or "thread".
        at_most: upper bound of the value, which must be a mean: minimizes the base loss subject to `value <= at_most`,
            with `controllers.DualAscent(at_most=...)`. Pass a controller as `weight` for other settings.
        at_least: lower bound of the value, likewise.

    Raises:
        InvalidSpec: a value is invalid, or `fn` cannot cross to another process.
        MissingExtra: `runs_in="process"` without the extra `processes`.
    """

    fn: Term
    weight: Weight = None  # type: ignore[assignment]  # None is replaced by the controller of a bound
    name: str = None  # type: ignore[assignment]  # None is replaced by the name of fn
    timeout: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    on_error: OnError = "raise"
    enabled: bool = True
    is_async: bool | None = None
    retry: int | AsyncRetrying | None = None
    max_grad_norm: float | None = None
    runs_in: Place | None = None
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        name = cast("object", self.name) if cast("object", self.name) is not None else term_name(self.fn)
        if name is None:
            problem = _why_not_callable(self.fn)
            raise InvalidSpec(
                f"the regularizer {described_term(self.fn)} has no name: pass name=..., or set a `name` attribute on it"
                + (f"; and {problem}" if problem else "")
            )
        if isinstance(name, str) and name == BASE_LOSS_NAME:
            raise InvalidSpec(f"regularizer: the name {name!r} is reserved for the base loss: pass another name=...")
        object.__setattr__(self, "name", name)
        try:
            checked = _PlainFields.model_validate(vars(self))
        except ValidationError as error:
            raise InvalidSpec(f"regularizer {shown(name)}: {first_problem(error)}") from None
        for field_name, value in checked:
            object.__setattr__(self, field_name, value)
        name = self.name
        object.__setattr__(self, "weight", self._weight_or_bound())
        problem = why_not_a_term(self.fn, self.options)
        if problem is not None:
            raise InvalidSpec(f"regularizer {name!r}: {problem}")
        if isinstance(self.fn, ConfiguredTerm):
            self.fn.check_options(self.options)
        _ = self.crossing  # refused here, not in a step
        if isinstance(self.weight, Constraint) and reduction_of(self) == "sum":
            raise InvalidSpec(
                f"regularizer {name!r}: a bound is for a mean, and reduction='sum' grows with the batch: pass "
                f"options={{'reduction': 'token-mean'}} or another mean; a term that only has a sum needs a weight"
            )
        if self.retry is not None:
            retry = _checked_retry(self.retry, name, can_await=is_async_term(self.fn) or self.is_async is True)
            object.__setattr__(self, "retry", retry)

    def _weight_or_bound(self) -> Weight:
        weight = cast("Weight | None", self.weight)
        if self.at_most is None and self.at_least is None:
            if weight is None:
                raise InvalidSpec(
                    f"regularizer {self.name!r}: weight=None, and there is no bound: pass weight=..., or one of "
                    "at_most=... and at_least=..."
                )
            return checked_weight(weight, self.name)
        if weight is None:
            if self.at_most is not None and self.at_least is not None:
                raise InvalidSpec(
                    f"regularizer {self.name!r}: at_most={self.at_most!r} and at_least={self.at_least!r} exclude each "
                    "other: for a range, use two regularizers with different names"
                )
            return DualAscent(at_most=self.at_most, at_least=self.at_least)
        # A copy by dataclasses.replace has both.
        if isinstance(weight, Constraint) and (weight.at_most, weight.at_least) == (self.at_most, self.at_least):
            return weight
        raise InvalidSpec(
            f"regularizer {self.name!r}: weight and a bound exclude each other, got weight={shown(weight)}, "
            f"at_most={self.at_most!r} and at_least={self.at_least!r}: pass one of them; for other settings of the "
            "multiplier pass only weight=controllers.DualAscent(at_most=..., ...)"
        )

    @functools.cached_property
    def awaits(self) -> bool | None:
        """Whether `fn` is async: `is_async` if it is set, else detected; None if only a call shows it."""
        if self.is_async is not None:
            return self.is_async
        if self.runs_in is not None:
            return self.runs_in == "loop"
        return True if is_async_term(self.fn) else None

    @functools.cached_property
    def crossing(self) -> Crossing | None:
        """Key and pickle of function and options, if they run in a process."""
        if self.runs_in is None:
            return None
        is_async = is_async_term(self.fn) if self.is_async is None else self.is_async
        place = f"runs_in={self.runs_in!r}"
        return crossing_to(self.runs_in, self.fn, self.options, is_async, f"regularizer {self.name!r}: {place}")

    def facts(self) -> dict[str, object]:
        """Returns the settings in short form for tables; None stands for a default."""
        timeout = self.timeout
        return {
            "fn": described_term(self.fn),
            "weight": self._described_weight(),
            "timeout": None if timeout is None else "no limit" if math.isinf(timeout) else f"{timeout:g} s",
            "options": dict(self.options) or None,
            "runs in": self.runs_in,
            "on error": None if self.on_error == "raise" else self.on_error,
            "enabled": None if self.enabled else False,
            "max_grad_norm": self.max_grad_norm,
            "retry": type(self.retry).__name__ if isinstance(self.retry, AsyncRetrying) else self.retry,
        }

    def _described_weight(self) -> object:
        weight = self.weight
        if isinstance(weight, WeightController):
            now = f"now {weight.weights.get(self.name, weight.initial):.5g}"
            return f"{weight if isinstance(weight, Constraint) else type(weight).__name__}, {now}"
        return float(weight) if isinstance(weight, int | float) else described_term(weight)

    def _repr_html_(self) -> str:
        return html_facts(f"Regularizer {self.name}", self.facts())


def checked_specs(regularizers: Sequence[RegularizerSpec]) -> tuple[RegularizerSpec, ...]:
    """Returns the specs if all are RegularizerSpec and have unique names.

    Raises:
        InvalidSpec: an element is not a RegularizerSpec.
        DuplicateRegularizerNames: two specs have the same name.
    """
    given = cast("object", regularizers)
    if isinstance(given, RegularizerSpec) or not isinstance(given, Iterable):
        raise InvalidSpec(f"regularizers must be a list of RegularizerSpec, got a {type(given).__name__}")
    specs = tuple(regularizers)
    for index, spec in enumerate(specs):
        if not isinstance(spec, RegularizerSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidSpec(f"regularizers[{index}] must be a RegularizerSpec, got a {type(spec).__name__}")
    names = [spec.name for spec in specs]
    duplicates = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if duplicates:
        raise DuplicateRegularizerNames(duplicates)
    return specs


def described_term(term: object) -> str:
    """Returns a readable name of a term or schedule, without its memory address."""
    if isinstance(term, PerDatum):
        return f"per_datum({described_term(term.fn)})"
    if isinstance(term, functools.partial):
        return f"partial({described_term(term.func)})"
    if is_dataclass(term):
        return textwrap.shorten(repr(term), 120, placeholder=" ...")
    named: Any = term if hasattr(term, "__qualname__") or hasattr(term, "__name__") else type(term)
    return str(getattr(named, "__qualname__", named.__name__))


def term_name(term: object) -> str | None:
    """Returns the `name` of a term, else the `__name__` of a function that is not a lambda, else None."""
    name = getattr(term, "name", None)
    if name is not None:
        return name
    if isinstance(term, functools.partial):
        return term_name(term.func)
    return term.__name__ if inspect.isfunction(term) and term.__name__ != "<lambda>" else None


def reduction_of(spec: RegularizerSpec) -> object:
    """Returns the setting `reduction` of a term; None if it has none, such as a plain function."""
    return spec.options.get("reduction", getattr(spec.fn, "reduction", None))


def term_function(term: Any) -> Callable[..., Any]:
    """Returns the callable of a term: `term.compute` if it exists, else the term."""
    if isinstance(term, PerDatum):
        return term_function(term.fn)
    compute = getattr(term, "compute", None)
    return compute if callable(compute) else term


def is_async_term(term: object) -> bool:
    """Returns True for coroutine functions and objects with an async `compute` or `__call__`."""
    function: Any = term_function(term)
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def why_not_a_term(term: object, options: Mapping[str, Any]) -> str | None:
    """Returns why an object cannot be a term, or None if it can."""
    problem = _why_not_callable(term)
    if problem is not None:
        return problem
    inner: object = term.fn if isinstance(term, PerDatum) else term
    function: Any = term_function(inner)
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a builtin without a signature; a wrong one fails when it is called
        return None
    try:
        signature.bind(None, None, **options)
    except TypeError as error:
        given = f" with options {sorted(options)}" if options else ""
        return f"fn must accept the arguments (data, logprobs){given}: {error}"
    return None


def _why_not_callable(term: object) -> str | None:
    inner: object = term.fn if isinstance(term, PerDatum) else term
    if isinstance(inner, type):
        return f"fn is the class {inner.__name__}: pass an instance, {inner.__name__}()"
    if isinstance(term, PerDatum) and isinstance(inner, ConfiguredTerm):
        return f"{type(inner).__name__} expects packed logprobs: remove per_datum(...)"
    if not callable(term_function(inner)):
        return f"fn must be callable or have a compute method, got {shown(inner)} of type {type(inner).__name__}"
    return None


def crossing_to(
    place: Place,
    fn: Term,
    options: Mapping[str, Any],
    is_async: bool,
    whose: str,
) -> Crossing | None:
    """Returns what a term needs to run in a place: key and pickle for a process, None elsewhere.

    Args:
        place: where it is to run.
        fn: the term.
        options: its keyword arguments.
        is_async: whether it is async.
        whose: start of messages: the term, and the argument that says where it runs.

    Raises:
        InvalidSpec: it cannot run there.
        MissingExtra: it cannot run in processes without the extra `processes`.
    """
    if is_async != (place == "loop"):
        kind = "async: it can run in the 'loop'" if is_async else "sync: it can run in a 'thread' or 'process'"
        raise InvalidSpec(f"{whose} does not fit the function, which is {kind}")
    if place != "process":
        return None
    if sys.platform == "win32":
        raise InvalidSpec(f"{whose} needs Linux or macOS: use 'thread'")
    try:
        pickled = pickled_by_value((term_function(fn), dict(options)))
        unpickled(pickled)
    except MissingExtra:
        raise
    except Exception as error:  # objects of the user
        raise InvalidSpec(
            f"{whose}, but the function or its options cannot cross to another process ({type(error).__name__}: "
            f"{error}): open files, locks and connections inside of the function, or use 'thread'"
        ) from error
    return hashlib.sha256(pickled).digest(), pickled


def _checked_retry(given: object, name: str, *, can_await: bool) -> int | AsyncRetrying:
    retry = given if isinstance(given, AsyncRetrying) else as_integer(given)
    if retry is None or (isinstance(retry, int) and retry < 1):
        raise InvalidSpec(
            f"regularizer {name!r}: retry must be an int >= 1 or a tenacity.AsyncRetrying, got {shown(given)}"
        )
    if not can_await:
        raise InvalidSpec(
            f"regularizer {name!r}: retry is only supported for async terms: make fn a coroutine function, or pass "
            "is_async=True if it returns an awaitable"
        )
    return retry
