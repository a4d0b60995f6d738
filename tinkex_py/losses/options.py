"""The options of a pipeline: declared, described and checked here and nowhere else. No torch."""

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
        parallel: False runs one term after another, the base loss first, then in spec order. Default True.
        timeout: seconds per term, the base loss included; a spec's own timeout wins. None is no limit. Default 30.0.
        max_concurrency: terms in flight at once. Default 32.
        max_threads: sync terms in threads at once. Live term threads never exceed `min(max_threads, max_concurrency)`,
            abandoned ones included; in a client the service client's `max_threads` bounds them too. Default None: no
            limit below that of the service client, or of a pipeline used alone, which is the usable CPU count.
        combine: "sum" gives the gradient of `loss_total`; "pcgrad" first frees every term's weighted gradient of what
            points against another term's (Yu et al. 2020), so that the result is the gradient of no single loss.
            Default "sum".
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
"""Every option, with the value it has when it is not given."""

TERM_DEFAULTS: Mapping[str, Any] = MappingProxyType({name: DEFAULTS[name] for name in DEFAULTS if name != "combine"})
"""The options that make sense without a gradient of the whole."""


def checked_options(given: Mapping[str, Any], *, of: str, defaults: Mapping[str, Any] = DEFAULTS) -> Mapping[str, Any]:
    """The options that were given, checked.

    Args:
        given: options by name.
        of: what they were given to, for the error.
        defaults: which options there are.

    Raises:
        TypeError: there is no such option.
        PipelineError: a value cannot be used.
    """
    for name, value in given.items():
        if name not in defaults:
            raise TypeError(f"{of} got an unexpected keyword argument {name!r}")
        _CHECKS[name](name, value)
    return given


def shows_options(options: type[Any], defaults: Mapping[str, Any]) -> Callable[[Function], Function]:
    """Makes `help()` show the real keywords of a function that takes `**options: Unpack[...]`.

    Args:
        options: the TypedDict that has their types.
        defaults: which options there are, with their defaults.
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
