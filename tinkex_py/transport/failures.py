"""What the failure of an HTTP client means, in our errors."""

import socket
import ssl

from tinkex_py.errors import ConnectionFailed, InvalidData, InvalidResponse, TimeoutExceeded, TransportError
from tinkex_py.transport.answer import HttpAnswer
from tinkex_py.transport.request import HttpRequest

_BROKEN_CONNECTION = frozenset({"TransportError", "BrokenResourceError", "ClosedResourceError", "OSError"})
_CANNOT_BE_SENT = frozenset({"InvalidURL", "LocalProtocolError"})
_SIGNS_OF_BREAKING_OFF = ("disconnected", "peer closed", "peer unexpectedly closed")


def typed_failure(error: Exception, request: HttpRequest) -> TransportError | InvalidData | None:
    """The typed error for a failure of the HTTP client, or None if it is something else.

    Told by class names, because a client given by the user may be httpx's continuation with classes of its own.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    told = f"{request.description}: {type(error).__name__}"
    if "TimeoutException" in names:
        return TimeoutExceeded(f"{told}; the service did not respond within {request.timeout:g} s")
    if "DecodingError" in names:
        return InvalidResponse(f"{told}; the answer could not be decompressed")
    if "RemoteProtocolError" in names and not _broke_off(error):
        return InvalidResponse(f"{told}; the answer is not HTTP. Is base_url the address of the service?")
    if "ConnectError" in names:
        return ConnectionFailed(f"{told}; {_why_no_connection(error)}")
    if names & _CANNOT_BE_SENT:
        return InvalidData(f"{told}; the path or a header cannot be sent")
    if names & _BROKEN_CONNECTION:
        return ConnectionFailed(f"{told}; the connection broke before the answer was complete")
    if "AssertionError" in names:
        return InvalidResponse(f"{told}; the service in this process ended without an answer")
    return None


def forget_request(error: BaseException | None) -> None:
    """Take the request out of a failure of the HTTP client and of its causes: its headers hold the key."""
    while error is not None:
        if hasattr(error, "_request"):
            error._request = None  # type: ignore[attr-defined]  # pyright: ignore
        error = error.__cause__ or error.__context__


def require_whole_body(answer: HttpAnswer, request: HttpRequest) -> None:
    """Raise ConnectionFailed for a cut-off answer.

    A service in this process that fails in the middle of an answer leaves it cut off without telling.
    """
    told = answer.headers.get("content-length")
    if request.method == "HEAD" or "content-encoding" in answer.headers or told is None:
        return
    if told != str(len(answer.body)):
        raise ConnectionFailed(f"{request.description}: the answer has {len(answer.body)} of {told} bytes")


def _why_no_connection(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"the certificate of the service is not trusted: {error.verify_message}. If it is your own, name it in "
                "SSL_CERT_FILE"
            )
        if isinstance(error, ssl.SSLError):
            return f"the TLS handshake failed ({error.reason}). Does the service speak https there?"
        if isinstance(error, socket.gaierror):
            return f"the name of the host cannot be resolved ({error.strerror}). Is base_url right?"
        error = error.__cause__ or error.__context__
    return "nobody answers there. Is the service running, and base_url right?"


def _broke_off(error: Exception) -> bool:
    # The same class stands for "closed too early" and "not HTTP"; only the text tells them apart.
    return any(sign in str(error) for sign in _SIGNS_OF_BREAKING_OFF)
