"""Terms ready to run, and how they ended."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tenacity import AsyncRetrying

from tinkex_py.errors import InPlaceMutation, PipelineError, RegularizerError
from tinkex_py.losses.gradients import Evaluation
from tinkex_py.losses.output import BASE_LOSS_NAME
from tinkex_py.losses.spec import OnError, PerDatum, RegularizerSpec, Term, is_async_term, term_function
from tinkex_py.losses.weights import weight_at
from tinkex_py.retry import RetryPolicy


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
        timeout: seconds; infinity is no limit, None that of the pipeline.
        weight: None for the base loss, which has none and emits no events of its own.
        on_error: whether a failure fails the step.
        max_grad_norm: its gradient is scaled down to this norm; None leaves it.
        retry: says when to call again after a failure; None never does.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    is_async: bool | None
    per_datum: bool
    timeout: float | None = None
    weight: float | None = None
    on_error: OnError = "raise"
    max_grad_norm: float | None = None
    retry: RetryPolicy | AsyncRetrying | None = None


def prepare_base_loss(base_loss: Term) -> PreparedTerm:
    """The base loss as a term."""
    return PreparedTerm(
        name=BASE_LOSS_NAME,
        function=term_function(base_loss),
        options={},
        is_async=True if is_async_term(base_loss) else None,
        per_datum=isinstance(base_loss, PerDatum),
    )


def prepare_regularizer(spec: RegularizerSpec) -> PreparedTerm:
    """A regularizer as a term; a weight that moves is 0 until `with_weight_at` sets it."""
    return PreparedTerm(
        name=spec.name,
        function=term_function(spec.fn),
        options=spec.options,
        is_async=spec.awaits,
        per_datum=isinstance(spec.fn, PerDatum),
        timeout=spec.timeout,
        weight=spec.weight if isinstance(spec.weight, float) else 0.0,
        on_error=spec.on_error,
        max_grad_norm=spec.max_grad_norm,
        retry=_retry_policy(spec.retry),
    )


def with_weight_at(step: int, term: PreparedTerm, spec: RegularizerSpec) -> PreparedTerm:
    """The term of a spec with the weight that it has after so many optimizer steps.

    Raises:
        InvalidSpec: the schedule of the weight failed, or gave no finite number >= 0.
    """
    if isinstance(spec.weight, float):
        return term
    return replace(term, weight=weight_at(spec.weight, spec.name, step))


def _retry_policy(retry: int | AsyncRetrying | None) -> RetryPolicy | AsyncRetrying | None:
    if not isinstance(retry, int):
        return retry
    return RetryPolicy(deadline=math.inf, max_attempts=retry, initial_wait=0.1, max_wait=5.0)


def checked_step(step: int) -> int:
    """An int >= 0."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PipelineError(f"step must be an int >= 0, got {step!r}")
    return step


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
