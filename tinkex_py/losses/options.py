"""The options of a pipeline: declaration, documentation and checks. Imports no torch."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypedDict, TypeVar, cast, get_type_hints

from tinkex_py.errors import PipelineError
from tinkex_py.limits import is_seconds

Combine = Literal["sum", "pcgrad"]
COMBINES: tuple[Combine, ...] = ("sum", "pcgrad")

Function = TypeVar("Function", bound=Callable[..., Any])


class PipelineOptions(TypedDict, total=False):
    """How a pipeline evaluates its terms.

    Attributes:
        track_grad_norms: compute the L2 norm of every term's gradient and of the total. Default False.
        parallel: False runs the terms one after another, the base loss first, then in spec order. Default True.
        timeout: seconds per term, including the base loss; the timeout of a spec takes precedence. None means no
            limit. Default 30.0.
        max_concurrency: maximum number of terms that run at once. Default 32.
        max_threads: maximum number of sync terms that run at once. At most `min(max_threads, max_concurrency)` term
            threads exist, including abandoned ones; in a client, `max_threads` of the service client is a further
            limit. Default None: only that limit applies, or, without a client, the number of usable CPUs.
        combine: "sum" computes the gradient of `loss_total`. "pcgrad" first removes from every term's weighted
            gradient the components that conflict with those of other terms (Yu et al. 2020); the result is not the
            gradient of a single loss. Default "sum".
    """

    track_grad_norms: bool
    parallel: bool
    timeout: float | None
    max_concurrency: int
    max_threads: int | None
    combine: Combine


DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "track_grad_norms": False,
        "parallel": True,
        "timeout": 30.0,
        "max_concurrency": 32,
        "max_threads": None,
        "combine": "sum",
    }
)
"""Default values of all options."""

TERM_DEFAULTS: Mapping[str, Any] = MappingProxyType({name: DEFAULTS[name] for name in DEFAULTS if name != "combine"})
"""Default values of the options that apply without a total gradient."""


def checked_options(given: Mapping[str, Any], *, of: str, defaults: Mapping[str, Any] = DEFAULTS) -> Mapping[str, Any]:
    """Returns the given options if they are valid.

    Args:
        given: options by name.
        of: the function that received them, for error messages.
        defaults: the options that exist.

    Raises:
        TypeError: an option does not exist.
        PipelineError: a value is out of range.
    """
    for name, value in given.items():
        if name not in defaults:
            raise TypeError(f"{of} got an unexpected keyword argument {name!r}")
        _CHECKS[name](name, value)
    return given


def shows_options(options: type[Any], defaults: Mapping[str, Any]) -> Callable[[Function], Function]:
    """Makes `help()` list the keywords of a function declared with `**options: Unpack[...]`.

    Args:
        options: the TypedDict with their types.
        defaults: the options that exist, with their defaults.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        fixed = [
            parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD
        ]
        types = get_type_hints(options)
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
            for name, default in defaults.items()
        ]
        cast("Any", function).__signature__ = signature.replace(parameters=[*fixed, *keywords])
        return function

    return decorate


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise PipelineError(f"{name} must be True or False, got {value!r}")
    return value


def _seconds_or_none(name: str, value: object) -> float | None:
    if value is None or (is_seconds(value) and value > 0):
        return value
    raise PipelineError(f"{name} must be > 0 seconds or None, got {value!r}")


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PipelineError(f"{name} must be an int >= 1, got {value!r}")
    return value


def _count_or_none(name: str, value: object) -> int | None:
    return None if value is None else _count(name, value)


def _combine(name: str, value: object) -> object:
    if value not in COMBINES:
        raise PipelineError(f"{name} must be one of {', '.join(map(repr, COMBINES))}, got {value!r}")
    return value


_CHECKS: Mapping[str, Callable[[str, object], object]] = {
    "track_grad_norms": _flag,
    "parallel": _flag,
    "timeout": _seconds_or_none,
    "max_concurrency": _count,
    "max_threads": _count_or_none,
    "combine": _combine,
}
