"""What the failure of an HTTP library means, in this package's errors."""

import socket
import ssl

from tinkex_py.errors import (
    ConnectionFailed,
    InvalidData,
    InvalidResponse,
    TimeoutExceeded,
    TinkexError,
    TransportError,
)
from tinkex_py.transport.connections import HandshakeFailed
from tinkex_py.transport.proxies import ProxyAddress

_BROKEN_CONNECTION = frozenset({"TransportError", "NetworkError", "ProtocolError", "OSError"})
_TOO_SLOW = frozenset({"TimeoutException", "TimeoutError"})
_CANNOT_BE_SENT = frozenset({"InvalidURL", "LocalProtocolError"})
_SIGNS_OF_BREAKING_OFF = ("disconnected", "peer closed", "peer unexpectedly closed")


def typed_failure(
    error: Exception, request: str, seconds: float, proxy: ProxyAddress | None
) -> TransportError | InvalidData | None:
    """The typed error for a failure of an HTTP library; None if it is something else.

    The failure is not made its cause: it may hold the request, whose headers hold the key. Classes are known by their
    names, because a client given by the user may be httpx's continuation with classes of its own.

    Args:
        error: the failure.
        request: method, path and host, for messages.
        seconds: how long the exchange was allowed to take.
        proxy: what the request went through.
    """
    if isinstance(error, TinkexError):
        return None
    names = {cls.__name__ for cls in type(error).__mro__}
    failed = f"{request}: {type(error).__name__}"
    if names & _TOO_SLOW:
        return TimeoutExceeded(f"{failed}; the service did not respond within {seconds:g} s")
    if "DecodingError" in names:
        return InvalidResponse(f"{failed}; the response could not be decompressed")
    if "RemoteProtocolError" in names and not _broke_off(error):
        return InvalidResponse(f"{failed}; the response is not HTTP. Is base_url the address of the service?")
    if "ProxyError" in names and proxy is not None:
        return ConnectionFailed(f"{failed}; the proxy named by {proxy.variable} refused: {error}")
    if "ConnectError" in names:
        return ConnectionFailed(f"{failed}; {_why_no_connection(error, proxy)}")
    if names & _CANNOT_BE_SENT:
        return InvalidData(f"{failed}; the path or a header cannot be sent")
    if names & _BROKEN_CONNECTION:
        return ConnectionFailed(f"{failed}; the connection broke before the response was complete")
    if "AssertionError" in names:
        return InvalidResponse(f"{failed}; the service in this process ended without a response")
    return None


def _why_no_connection(failure: BaseException | None, proxy: ProxyAddress | None) -> str:
    error, handshake = failure, ""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"the certificate of the service is not trusted: {error.verify_message}. If it is your own, name it in "
                "SSL_CERT_FILE"
            )
        if isinstance(error, HandshakeFailed | ssl.SSLError):
            handshake = f"the TLS handshake failed ({_reason(error)}). Does the service speak https there?"
        if isinstance(error, socket.gaierror) and proxy is None:
            return f"the name of the host cannot be resolved ({error.strerror}). Is base_url right?"
        error = error.__cause__ or error.__context__
    if handshake:
        return handshake
    if proxy is not None:
        return f"no connection to the proxy {proxy.host!r}, which the environment variable {proxy.variable} names"
    return "nothing answers there. Is the service running, and base_url right?"


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, ssl.SSLError) else str(error) or "the peer closed the connection"


def _broke_off(error: Exception) -> bool:
    # The same class stands for "closed too early" and "not HTTP"; only the text tells them apart.
    return any(sign in str(error) for sign in _SIGNS_OF_BREAKING_OFF)
