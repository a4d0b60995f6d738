"""Terms ready to run, and how they ended."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tenacity import AsyncRetrying, stop_after_attempt, wait_random_exponential

from tinkex_py.errors import InPlaceMutation, RegularizerError
from tinkex_py.losses.gradients import Evaluation
from tinkex_py.losses.spec import (
    BASE_LOSS_NAME,
    OnError,
    PerDatum,
    RegularizerSpec,
    Term,
    is_async_term,
    term_function,
)
from tinkex_py.losses.weights import weight_at

# Upper bounds of the random waits between the attempts of `retry=<number>`, in seconds.
_FIRST_WAIT = 0.1
_LONGEST_WAIT = 5.0


@dataclass(frozen=True)
class PreparedTerm:
    """A term, ready to run.

    Attributes:
        name: in errors, events and task names.
        function: what is called, as `function(data, logprobs, **options)`.
        options: its keyword arguments.
        is_async: True: called on the loop; False: called in a thread, must not return an awaitable; None: called
            in a thread, an awaitable it returns is awaited on the loop.
        per_datum: wants a list with one tensor per datum.
        timeout: seconds, None for no limit.
        weight: None for the base loss, which has none and emits no events of its own.
        on_error: whether a failure fails the step.
        needs_gradient: whether its gradient enters the total.
        max_grad_norm: its gradient is scaled down to this norm; None leaves it.
        retry: says when to call again after a failure; None never does.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    is_async: bool | None
    per_datum: bool
    timeout: float | None
    weight: float | None = None
    on_error: OnError = "raise"
    needs_gradient: bool = True
    max_grad_norm: float | None = None
    retry: AsyncRetrying | None = None


def prepare_base_loss(base_loss: Term, timeout: float | None) -> PreparedTerm:
    """The base loss as a term."""
    return PreparedTerm(
        name=BASE_LOSS_NAME,
        function=term_function(base_loss),
        options={},
        is_async=True if is_async_term(base_loss) else None,
        per_datum=isinstance(base_loss, PerDatum),
        timeout=_limit(timeout),
    )


def prepare_regularizer(spec: RegularizerSpec, timeout: float | None, *, step: int) -> PreparedTerm:
    """A regularizer as a term.

    Args:
        spec: the regularizer; its own timeout wins.
        timeout: seconds, or None.
        step: optimizer steps made before; the weight may depend on it.

    Raises:
        InvalidSpec: the schedule of the weight gave no finite number >= 0.
    """
    weight = weight_at(spec.weight, spec.name, step)
    return PreparedTerm(
        name=spec.name,
        function=term_function(spec.fn),
        options=spec.options,
        is_async=spec.awaits,
        per_datum=isinstance(spec.fn, PerDatum),
        timeout=_limit(timeout if spec.timeout is None else spec.timeout),
        weight=weight,
        on_error=spec.on_error,
        needs_gradient=weight > 0,
        max_grad_norm=spec.max_grad_norm,
        retry=_retrying(spec.retry),
    )


def _retrying(retry: int | AsyncRetrying | None) -> AsyncRetrying | None:
    if not isinstance(retry, int):
        return retry
    return AsyncRetrying(
        stop=stop_after_attempt(retry), wait=wait_random_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT)
    )


def _limit(timeout: float | None) -> float | None:
    return None if timeout is None or math.isinf(timeout) else timeout


@dataclass(frozen=True)
class Outcome:
    """How a term ended: with an evaluation, or with an error."""

    term: PreparedTerm
    evaluation: Evaluation | None = None
    error: RegularizerError | None = None
    fatal: BaseException | None = None  # KeyboardInterrupt, SystemExit and the like: raised unchanged

    @property
    def exception(self) -> BaseException:
        """What it failed with."""
        exception = self.error or self.fatal
        assert exception is not None, "asked for the exception of a term that did not fail"
        return exception

    @property
    def fails_step(self) -> bool:
        """Whether the step cannot go on. A change of the shared logprobs can never be skipped."""
        if self.error is None:
            return self.fatal is not None
        return self.term.on_error == "raise" or isinstance(self.error, InPlaceMutation)


def failed_with(term: PreparedTerm, cause: BaseException) -> RegularizerError:
    """The error that reports a term's own exception."""
    error = RegularizerError(f"term {term.name!r} failed with {described(cause)}", name=term.name)
    error.__cause__ = cause
    return error


def described(error: BaseException) -> str:
    """Class and message of an exception, whose message may itself be broken."""
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001  # user code: __str__ may raise anything
        message = f"<its message cannot be shown: {type(broken).__name__}>"
    return f"{type(error).__name__}: {message}"
