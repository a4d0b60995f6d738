"""What a term is, and how a regularizer is put into a loss.

Source: the regularizers guide, "Core Concepts". A term turns `(data, logprobs)` into a loss, or into
`(loss, metrics)`; a regularizer is a term with a weight and a name.
"""

import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union, cast, runtime_checkable

from tenacity import AsyncRetrying

from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.checks import checked_number
from tinkex_py.losses.ready_made import ReadyMadeTerm
from tinkex_py.losses.weights import Weight, checked_weight
from tinkex_py.types import Datum

if TYPE_CHECKING:
    import torch

BASE_LOSS_NAME = "base_loss"

Metric = Union[bool, int, float, "torch.Tensor"]
TermResult = Union["torch.Tensor", tuple["torch.Tensor", Mapping[str, Metric]]]
TermFunction = Callable[..., TermResult | Awaitable[TermResult]]
OnError = Literal["raise", "skip"]


@runtime_checkable
class Regularizer(Protocol):
    """An object that can be a term; nothing to inherit from.

    A `name` attribute is optional and saves naming it in the spec.
    """

    @property
    def compute(self) -> TermFunction:
        """A method `compute(self, data, logprobs, **options)`, sync or async; options only if it takes any.

        `data` are the datums of this step, `logprobs` is packed, `[sum(T_i)]` or `[sum(T_i), K]`; the result is the
        loss, or `(loss, metrics)`.
        """
        ...


@dataclass(frozen=True)
class PerDatum:
    """A term that sees a list of tensors, one per datum, instead of the packed tensor; see `per_datum`."""

    fn: "Term"

    @property
    def name(self) -> str | None:
        """The wrapped term's own name, if it has one."""
        return term_name(self.fn)

    def __call__(self, data: Sequence[Datum], logprobs: "Sequence[torch.Tensor]", **options: Any) -> Any:
        """Calls the wrapped term directly, with tensors that are already per datum."""
        return term_function(self.fn)(data, logprobs, **options)


Term = TermFunction | Regularizer | ModuleType | PerDatum


def per_datum(fn: Term) -> PerDatum:
    """Marks a term that wants `list[Tensor]`: one view per datum, in data order.

    Loss functions written for the official SDK run unchanged under it.
    """
    return fn if isinstance(fn, PerDatum) else PerDatum(fn)


@dataclass(frozen=True)
class RegularizerSpec:
    """A regularizer with its weight, name, timeout and options.

    Args:
        fn: a function, coroutine function, partial, callable object, object or module with `compute`, or one
            of these under `per_datum`. Called as `fn(data, logprobs, **options)`.
        weight: finite and >= 0; multiplies the value and the gradient. Or a schedule, any callable `step -> weight`
            (see `tinkex_py.losses.schedules`), or a controller (see `tinkex_py.losses.controllers`).
        name: unique within a pipeline; default is `fn.name`.
        timeout: seconds for this term; None takes the pipeline's, `math.inf` is no limit.
        options: keyword arguments for `fn`.
        on_error: "skip" leaves a failing term out of the step instead of failing it.
        enabled: False leaves the term out altogether.
        is_async: True calls `fn` on the event loop and awaits it, False runs it in a worker thread, None detects.
        retry: for async terms: how often to call, or a `tenacity.AsyncRetrying` that says when to call again after
            a failure. Its timeout covers all attempts.
        max_grad_norm: scales the term's gradient down to this L2 norm, before the weight multiplies it. None does not.

    Raises:
        InvalidSpec: a value cannot be used; the message names it.
    """

    fn: Term
    weight: Weight
    name: str = None  # type: ignore[assignment]  # None asks for fn.name; after construction it is a str
    timeout: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    on_error: OnError = "raise"
    enabled: bool = True
    is_async: bool | None = None
    retry: int | AsyncRetrying | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        name = cast("object", self.name) if cast("object", self.name) is not None else term_name(self.fn)
        if name is None:
            raise InvalidSpec("this regularizer has no name: pass name=..., or give fn a `name` attribute")
        if not isinstance(name, str) or not name:
            raise InvalidSpec(f"name must be a non-empty str, got {name!r}")
        if name == BASE_LOSS_NAME:
            raise InvalidSpec(f"the name {BASE_LOSS_NAME!r} is reserved for the base loss")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "weight", checked_weight(self.weight, name))
        options = cast("object", self.options)
        if not isinstance(options, Mapping):
            raise InvalidSpec(f"regularizer {name!r}: options must be a mapping, got {options!r}")
        object.__setattr__(self, "options", dict(self.options))
        object.__setattr__(self, "timeout", _checked_timeout(self.timeout, name))
        for flag, allowed in (("enabled", (True, False)), ("is_async", (True, False, None))):
            if not any(getattr(self, flag) is value for value in allowed):
                raise InvalidSpec(f"regularizer {name!r}: {flag} must be one of {allowed}, got {getattr(self, flag)!r}")
        if self.on_error not in ("raise", "skip"):
            raise InvalidSpec(f"regularizer {name!r}: on_error must be 'raise' or 'skip', got {self.on_error!r}")
        problem = why_not_a_term(self.fn, self.options)
        if problem is not None:
            raise InvalidSpec(f"regularizer {name!r}: {problem}")
        if isinstance(self.fn, ReadyMadeTerm):
            self.fn.with_options(self.options)
        if self.retry is not None:
            _check_retry(self.retry, name, can_await=is_async_term(self.fn) or self.is_async is True)
        if self.max_grad_norm is not None:
            bound = checked_number(f"regularizer {name!r}", "max_grad_norm", self.max_grad_norm, above=0.0)
            object.__setattr__(self, "max_grad_norm", bound)

    @functools.cached_property
    def awaits(self) -> bool | None:
        """Whether `fn` is async: `is_async` if it was given, else what is seen; None if only a call can tell."""
        if self.is_async is not None:
            return self.is_async
        return True if is_async_term(self.fn) else None

    def _repr_html_(self) -> str:
        from tinkex_py.losses.notebook import spec_html

        return spec_html(self)


def term_name(term: object) -> str | None:
    """The term's own `name`, or None; a module's `__name__` is not one."""
    return getattr(term, "name", None)


def term_function(term: Any) -> Callable[..., Any]:
    """What is called: `term.compute` where there is one, else the term itself."""
    if isinstance(term, PerDatum):
        return term_function(term.fn)
    compute = getattr(term, "compute", None)
    return compute if callable(compute) else term


def is_async_term(term: object) -> bool:
    """True if calling it is known to give an awaitable: coroutine functions, async `compute` or `__call__`."""
    function: Any = term_function(term)
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def why_not_a_term(term: object, options: Mapping[str, Any]) -> str | None:
    """What is wrong with a would-be term, or None."""
    inner: object = term.fn if isinstance(term, PerDatum) else term
    if isinstance(inner, type):
        return f"fn is the class {inner.__name__}: pass an instance, {inner.__name__}()"
    if isinstance(term, PerDatum) and isinstance(inner, ReadyMadeTerm):
        return f"{type(inner).__name__} takes packed logprobs: leave per_datum(...) out"
    function: object = term_function(inner)
    if not callable(function):
        return f"fn must be callable or have a compute method, got {inner!r} of type {type(inner).__name__}"
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # builtins without a signature are checked when they are called
        return None
    try:
        signature.bind(None, None, **options)
    except TypeError as error:
        given = f" with options {sorted(options)}" if options else ""
        return f"fn cannot be called as fn(data, logprobs){given}: {error}"
    return None


def _check_retry(retry: object, name: str, *, can_await: bool) -> None:
    usable = isinstance(retry, AsyncRetrying) or (isinstance(retry, int) and not isinstance(retry, bool) and retry >= 1)
    if not usable:
        raise InvalidSpec(
            f"regularizer {name!r}: retry must be a number of calls >= 1 or a tenacity.AsyncRetrying, got {retry!r}"
        )
    if not can_await:
        raise InvalidSpec(
            f"regularizer {name!r}: retry is for async terms; make fn a coroutine function, or pass is_async=True if "
            "it returns an awaitable"
        )


def _checked_timeout(timeout: object, name: str) -> float | None:
    if timeout is None:
        return None
    try:
        seconds = math.nan if isinstance(timeout, bool) else float(timeout)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not seconds > 0 or isinstance(timeout, str | bytes):
        raise InvalidSpec(f"regularizer {name!r}: timeout must be > 0 seconds or None, got {timeout!r}")
    return seconds
