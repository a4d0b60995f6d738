"""The options of a pipeline: declaration, documentation and checks. Imports no torch."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypedDict, TypeVar, cast, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinkex_py.errors import PipelineError
from tinkex_py.losses.checks import first_problem
from tinkex_py.values import Integer, Number

Combine = Literal["sum", "pcgrad", "upgrad", "mgda", "cagrad", "nash_mtl", "aligned_mtl"]
Count = Annotated[Integer, Field(ge=1)]

Function = TypeVar("Function", bound=Callable[..., Any])


class PipelineOptions(TypedDict, total=False):
    """How a pipeline evaluates its terms.

    Attributes:
        track_grad_norms: compute the L2 norm of every term's gradient and of the total. Default False.
        parallel: False runs the terms one after another, the base loss first, then in spec order. Default True.
        timeout: seconds per term, including the base loss; the timeout of a spec takes precedence. None means no
            limit. Default 30.0.
        cancel_grace: seconds for which a coroutine may go on after its cancellation, for example in a `finally` block;
            then it is closed, and the step goes on without it. Default 5.0.
        max_concurrency: maximum number of terms that run at once. Default 32.
        max_threads: maximum number of sync terms that run at once. At most `min(max_threads, max_concurrency)` term
            threads exist, including abandoned ones; in a client, `max_threads` of the service client is a further
            limit. Default None: only that limit applies, or, without a client, the number of usable CPUs.
        combine: "sum" computes the gradient of `loss_total`. "pcgrad" first removes from every term's weighted
            gradient the components that conflict with those of other terms (Yu et al. 2020). "upgrad", "mgda",
            "cagrad", "nash_mtl" and "aligned_mtl" balance the gradients of up to 8 terms. The result of all but "sum"
            is not the gradient of a single loss. Default "sum".
    """

    track_grad_norms: bool
    parallel: bool
    timeout: float | None
    cancel_grace: float
    max_concurrency: int
    max_threads: int | None
    combine: Combine


class OptionValues(BaseModel):
    """The values of `PipelineOptions`, checked."""

    model_config = ConfigDict(strict=True)

    track_grad_norms: bool = False
    parallel: bool = True
    timeout: Annotated[Number, Field(gt=0)] | None = 30.0
    cancel_grace: Annotated[Number, Field(ge=0, allow_inf_nan=False)] = 5.0
    max_concurrency: Count = 32
    max_threads: Count | None = None
    combine: Combine = "sum"


DEFAULTS: Mapping[str, Any] = MappingProxyType(OptionValues().model_dump())
"""Default values of all options."""

TERM_DEFAULTS: Mapping[str, Any] = MappingProxyType({name: DEFAULTS[name] for name in DEFAULTS if name != "combine"})
"""Default values of the options that apply without a total gradient."""


def checked_options(given: Mapping[str, Any], *, of: str, defaults: Mapping[str, Any] = DEFAULTS) -> Mapping[str, Any]:
    """Returns all options: the given ones, and the defaults of the others.

    Args:
        given: options by name.
        of: the function that received them, for error messages.
        defaults: the options that exist.

    Raises:
        TypeError: an option does not exist.
        PipelineError: a value is out of range.
    """
    for name in given:
        if name not in defaults:
            raise TypeError(f"{of} got an unexpected keyword argument {name!r}")
    try:
        return OptionValues(**given).model_dump()
    except ValidationError as error:
        raise PipelineError(f"option {first_problem(error)}") from None


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
