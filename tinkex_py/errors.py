"""Every error this package raises, in one tree.

    TinkexError
      ConfigError                          a setting is missing or contradicts another
      InvalidData                          a datum, tensor or argument cannot be used
      MissingExtra                         an optional dependency is not installed
      TransportError
        ConnectionFailed                   nobody answered
        TimeoutExceeded                    somebody was too slow
        InvalidResponse                    the answer could not be understood
      APIStatusError                       the service answered with an error status
        BadRequest Authentication BillingRequired PermissionDenied NotFound Conflict
        Unprocessable RateLimited ServerError
      RequestFailed                        the service accepted the work and then failed it
        ResultLost                         the service does not know the request any more
        PartialFailure                     some chunks of a long call took effect and others did not
      ClientClosed                         the client was closed, or belongs to another event loop
      UnsupportedFeature                   this service cannot do it
      PrecedingRequestFailed               an earlier request of the same client failed; nothing was sent
      RequestInsideStep                    a term asked its own training client for something that must wait
      SequenceLost                         it is unknown whether a numbered request arrived
      SurrogateMismatch                    the surrogate of a custom step cannot carry the gradient exactly
      PipelineError
        DuplicateRegularizerNames InvalidSpec InvalidBaseLoss
        RegularizerError
          RegularizerTimeout NonFiniteLoss InPlaceMutation InvalidTermResult

All of them pickle with their fields. None of them ever stands in for a cancellation.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

RequestFailedCategory = Literal["user", "server", "unknown"]


def _restore(cls: type["TinkexError"], args: tuple[Any, ...], state: dict[str, Any]) -> "TinkexError":
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class TinkexError(Exception):
    """Base of every error of this package.

    `accumulated` is the number of backward passes that the training client has handed over since its last
    optim_step: the wire cannot undo them, so a caller who repeats a failed step must not send those again
    that the service took.
    """

    accumulated: int = 0

    def __str__(self) -> str:
        message = super().__str__()
        if not self.accumulated:
            return message
        return (
            f"{message} [{self.accumulated} backward pass(es) were handed over since the last optim_step. What the "
            "service took of them stays there: send only the missing micro-batches again, or make a new client from "
            "the last checkpoint]"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


class ConfigError(TinkexError, ValueError):
    """A setting is missing, malformed or contradicts another one."""


class InvalidData(TinkexError, ValueError):
    """A datum, tensor or argument cannot be used; the message names it and its value."""


class MissingExtra(TinkexError, ImportError):
    """An optional dependency is not installed; the message has the `pip install` line."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Run: pip install 'tinkex-py[{extra}]'")
        self.package = package
        self.extra = extra


class TransportError(TinkexError):
    """A request did not get a usable answer.

    `attempts` is how often it was sent.
    """

    attempts: int = 1


class ConnectionFailed(TransportError, ConnectionError):
    """No connection to the service, or it broke before the answer was complete."""


class TimeoutExceeded(TransportError, TimeoutError):
    """The service did not answer in time."""


class InvalidResponse(TransportError):
    """The service answered with something that is not part of the protocol."""


class APIStatusError(TinkexError):
    """The service answered with an error status.

    Attributes:
        status: HTTP status code.
        code: error code from the body, if it had one.
        request_id: the service's id of the request, if it told one.
        body: parsed JSON body, or its text.
        retry_after: seconds the service asked to wait, if it did.
        attempts: how often the request was sent.
        should_retry: what the service says about sending it again (`x-should-retry`); None is nothing.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        request_id: str | None = None,
        body: object = None,
        retry_after: float | None = None,
        attempts: int = 1,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.request_id = request_id
        self.body = body
        self.retry_after = retry_after
        self.attempts = attempts
        self.should_retry = should_retry


class BadRequest(APIStatusError):
    """400."""


class Authentication(APIStatusError):
    """401: the key is missing or wrong."""


class BillingRequired(APIStatusError):
    """402."""


class PermissionDenied(APIStatusError, PermissionError):
    """403."""


class NotFound(APIStatusError, LookupError):
    """404."""


class Conflict(APIStatusError):
    """409."""


class Unprocessable(APIStatusError):
    """422."""


class RateLimited(APIStatusError):
    """429."""


class ServerError(APIStatusError):
    """500 and above."""


class RequestFailed(TinkexError):
    """The service accepted the work and then failed it.

    Attributes:
        category: who is to blame according to the service: "user", "server" or "unknown".
        request_id: the future that failed.
        handed_over: sequence numbers of the same client that had been sent after it; they may still be executed.
    """

    def __init__(
        self,
        message: str,
        *,
        category: RequestFailedCategory = "unknown",
        request_id: str | None = None,
        handed_over: Sequence[int] = (),
    ) -> None:
        super().__init__(message)
        self.category: RequestFailedCategory = category
        self.request_id = request_id
        self.handed_over = tuple(handed_over)


class ResultLost(RequestFailed):
    """The service does not know the request any more (404 or 410 when asked for its result).

    Whether it took effect is not known. A sample can be asked for again. A training client has an unknown state; way
    out: `service.create_training_client_from_state(path, with_optimizer=True)`.
    """


class PartialFailure(RequestFailed):
    """Some chunks of one gradient call took effect, and others did not.

    The service holds the gradients of the datums in `applied` until the next optim_step. Ways out: send the datums in
    `missing` again, then step; or make a new client from the last checkpoint. `__cause__` is the first failure.

    Attributes:
        applied: datums `[start, stop)` of the call whose gradients the service holds.
        missing: datums `[start, stop)` whose gradients it does not hold.
    """

    def __init__(
        self,
        message: str,
        *,
        applied: Sequence[tuple[int, int]],
        missing: Sequence[tuple[int, int]],
        category: RequestFailedCategory = "unknown",
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, category=category, request_id=request_id)
        self.applied = tuple(applied)
        self.missing = tuple(missing)


class ClientClosed(TinkexError, RuntimeError):
    """The client was closed, or is used on an event loop that it does not belong to."""


class UnsupportedFeature(TinkexError):
    """This service or model cannot do what was asked."""


class PrecedingRequestFailed(TinkexError):
    """An earlier gradient or update of the same training client did not happen, so this request was not sent.

    Nothing of it reached the service; it is safe to call again.
    """


class RequestInsideStep(TinkexError, RuntimeError):
    """A term asked its own training client for something that can only run after the step."""


class SequenceLost(TinkexError):
    """A numbered request stayed without an answer, or never reached the service, which now waits for it.

    Way out: `service.create_training_client_from_state(path, with_optimizer=True)`.
    """


class SurrogateMismatch(TinkexError):
    """Gradients were scaled for another number of datums than the service will divide by; optim_step was not sent.

    Ways out: send the missing datums with the same `sequences_per_step`; or make a new client from the last checkpoint.
    """


class PipelineError(TinkexError):
    """Composing or evaluating a custom loss failed."""


class DuplicateRegularizerNames(PipelineError, ValueError):
    """Two regularizers of one pipeline share a name."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"Duplicate regularizer names: {list(names)}. Give each RegularizerSpec its own name=...")
        self.names = tuple(names)


class InvalidSpec(PipelineError, ValueError):
    """A RegularizerSpec or an option of a ready-made term cannot be used."""


class InvalidBaseLoss(PipelineError, TypeError):
    """The base loss is not callable."""


class RegularizerError(PipelineError):
    """A term failed; `name` says which ("base_loss" for the base loss), `__cause__` holds its own exception."""

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


class RegularizerTimeout(RegularizerError, TimeoutError):
    """A term did not end within its timeout (seconds)."""

    def __init__(self, message: str, *, name: str, timeout: float) -> None:
        super().__init__(message, name=name)
        self.timeout = timeout


class NonFiniteLoss(RegularizerError, ArithmeticError):
    """The loss or the gradient of a term is NaN or infinite."""


class InPlaceMutation(RegularizerError):
    """A term wrote into the logprobs that all terms share."""


class InvalidTermResult(RegularizerError, TypeError):
    """A term returned something that is not a loss or `(loss, metrics)`."""


STATUS_ERRORS: Mapping[int, type[APIStatusError]] = {
    400: BadRequest,
    401: Authentication,
    402: BillingRequired,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    422: Unprocessable,
    429: RateLimited,
}


def status_error_class(status: int) -> type[APIStatusError]:
    """The class for an HTTP status; APIStatusError itself where no class fits better."""
    if status >= 500:
        return ServerError
    return STATUS_ERRORS.get(status, APIStatusError)
