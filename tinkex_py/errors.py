"""Every error this package raises, in one tree.

    TinkexError
      ConfigError                          a setting is missing or contradicts another
      InvalidData                          a datum, tensor or argument cannot be used
      MissingExtra                         an optional dependency is not installed
      TransportError
        ConnectionFailed                   no connection, or it broke
        TimeoutExceeded                    no response in time
        InvalidResponse                    the response does not follow the protocol
      APIStatusError                       the service returned an error status
        BadRequest Authentication BillingRequired PermissionDenied NotFound Conflict
        Unprocessable RateLimited ServerError
      RequestFailed                        the service accepted the work and then failed it
        ResultLost                         the service no longer has the result
        PartialFailure                     some chunks of a long call took effect and others did not
      ClientClosed                         the client was closed, or belongs to another event loop
      UnsupportedFeature                   the service does not support the feature
      PrecedingRequestFailed               an earlier request of the same client failed; nothing was sent
      RequestInsideStep                    a term called its own training client for more than a forward pass
      SequenceLost                         it is unknown whether a numbered request arrived
      SurrogateMismatch                    gradients are scaled for another number of datums than the service holds
      PipelineError
        DuplicateRegularizerNames InvalidSpec InvalidBaseLoss
        RegularizerError
          RegularizerTimeout NonFiniteLoss InPlaceMutation InvalidTermResult

All of them pickle with their fields. None of them replaces a cancellation.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, Literal

from tinkex_py.unicode import plain_text

RequestFailedCategory = Literal["user", "server", "unknown"]


def _restore(cls: type["TinkexError"], args: tuple[Any, ...], state: dict[str, Any]) -> "TinkexError":
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class TinkexError(Exception):
    """Base class of every error of this package.

    Attributes:
        accumulated: number of backward passes that the training client has sent since its last optim_step. They
            cannot be undone: to repeat a failed step, send only those that the service did not accept.
        was_sent: whether a part of the failed backward pass was sent. The message then says how to continue a step
            whose other passes the service holds; a pass that was refused before needs only its correction.
    """

    accumulated: int = 0
    was_sent: bool = False

    def __str__(self) -> str:
        message = plain_text(super().__str__())  # it may quote a service, or the name of a term
        if not (self.accumulated and self.was_sent):
            return message
        return (
            f"{message} [{self.accumulated} backward pass(es) were sent since the last optim_step, and the service "
            "keeps those that it accepted: send only the missing micro-batches again, or create a new client from the "
            "last checkpoint]"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


class ConfigError(TinkexError, ValueError):
    """A setting is missing, malformed or contradicts another one; the message names it and its value."""


class InvalidData(TinkexError, ValueError):
    """A datum, tensor or argument cannot be used; the message names it and its value."""


class MissingExtra(TinkexError, ImportError):
    """An optional dependency is not installed; the message contains the `pip install` command.

    Attributes:
        package: the missing package.
        extra: the extra of this package that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Run: pip install 'tinkex-py[{extra}]'")
        self.package = package
        self.extra = extra


def require_modules(extra: str, *modules: str) -> None:
    """Checks that the modules of an extra are installed, without importing them.

    Raises:
        MissingExtra: one of them is not installed.
    """
    for module in modules:
        if find_spec(module) is None:
            raise MissingExtra(module, extra)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns a hint for messages, such as " (did you mean 'steps'?)"; empty if no known name is similar."""
    spelled = {one.casefold(): one for one in known}
    similar = get_close_matches(str(name).casefold(), spelled, n=1)
    return f" (did you mean {spelled[similar[0]]!r}?)" if similar else ""


class TransportError(TinkexError):
    """A request got no usable response.

    Attributes:
        attempts: how often the request was sent.
    """

    attempts: int = 1


class ConnectionFailed(TransportError, ConnectionError):
    """The connection to the service failed, or broke before the response was complete."""


class TimeoutExceeded(TransportError, TimeoutError):
    """The service did not respond in time.

    Attributes:
        response_began: whether the headers of a response had arrived.
    """

    response_began: bool = False


class InvalidResponse(TransportError):
    """The service returned something that is not part of the protocol.

    Attributes:
        is_too_large: whether the response exceeds `max_response_bytes` or a limit that follows from it. Such a result
            is not requested again.
    """

    is_too_large: bool = False


class APIStatusError(TinkexError):
    """The service returned an error status.

    Attributes:
        status: HTTP status code.
        code: error code in the body, or None.
        request_id: the service's id of the request, or None.
        body: parsed JSON body, or its text.
        retry_after: seconds that the service asks to wait, or None.
        attempts: how often the request was sent.
        should_retry: the header `x-should-retry`; None if the response has none.
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
        category: who caused the failure, according to the service: "user", "server" or "unknown".
        request_id: id of the future that failed.
        handed_over: sequence numbers of later requests of the same client that were already sent; the service may
            still execute them.
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
    """The service no longer has the result of a request (404 or 410).

    It is unknown whether the request took effect. A sample can be requested again. The state of a training client is
    unknown: replace it with `service.create_training_client_from_state(path, with_optimizer=True)`.
    """


class PartialFailure(RequestFailed):
    """Some chunks of one gradient call took effect, and others did not.

    The service holds the gradients of the datums in `applied` until the next optim_step. Send the datums in `missing`
    again before it, or create a new client from the last checkpoint. `__cause__` is the first failure.

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
    """The client is closed, or belongs to another event loop."""


class UnsupportedFeature(TinkexError):
    """This service or model does not support the requested feature."""


class MissingEndpoint(NotFound, UnsupportedFeature):
    """404 of a router: the service does not have this endpoint, so it does not support what was requested."""


class PrecedingRequestFailed(TinkexError):
    """An earlier gradient or update of the same training client did not take effect, so this request was not sent.

    Nothing of it reached the service, so it is safe to repeat.
    """


class RequestInsideStep(TinkexError, RuntimeError):
    """A term called its own training client for something that can only run after the step."""


class SequenceLost(TinkexError):
    """A numbered request got no final response, or never reached the service, which still waits for it.

    The client cannot continue: replace it with
    `service.create_training_client_from_state(path, with_optimizer=True)`.
    """


class SurrogateMismatch(TinkexError):
    """Gradients were scaled for another number of datums than the service divides by; optim_step was not sent.

    Send the missing datums with the same `sequences_per_step`, or create a new client from the last checkpoint.
    """


class PipelineError(TinkexError):
    """A custom loss could not be composed or evaluated."""


class DuplicateRegularizerNames(PipelineError, ValueError):
    """Two regularizers of one pipeline share a name.

    Attributes:
        names: the names that occur more than once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"Duplicate regularizer names: {list(names)}. Give each RegularizerSpec its own name=...")
        self.names = tuple(names)


class InvalidSpec(PipelineError, ValueError):
    """A RegularizerSpec or an option of a ready-made term is invalid."""


class InvalidBaseLoss(PipelineError, TypeError):
    """The base loss is not callable."""


class RegularizerError(PipelineError):
    """A term failed; `__cause__` is its own exception.

    Attributes:
        name: name of the term; "base_loss" for the base loss.
    """

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


class RegularizerTimeout(RegularizerError, TimeoutError):
    """A term did not end within its timeout.

    Attributes:
        timeout: seconds.
    """

    def __init__(self, message: str, *, name: str, timeout: float) -> None:
        super().__init__(message, name=name)
        self.timeout = timeout


class NonFiniteLoss(RegularizerError, ArithmeticError):
    """The loss or the gradient of a term is NaN or infinite."""


class InPlaceMutation(RegularizerError):
    """A term wrote into the logprobs that all terms share."""


class InvalidTermResult(RegularizerError, TypeError):
    """A term returned neither a loss nor `(loss, metrics)`, or changed torch's default dtype or device."""


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
    """Returns the class for an HTTP status; APIStatusError if no other class fits."""
    if status >= 500:
        return ServerError
    return STATUS_ERRORS.get(status, APIStatusError)
