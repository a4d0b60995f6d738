"""Translates failures of an HTTP library to this package's errors."""

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
from tinkex_py.transport.bodies import BodyTooLarge
from tinkex_py.transport.connections import HandshakeFailed
from tinkex_py.transport.messages import too_large
from tinkex_py.transport.proxies import ProxyAddress

_BROKEN_CONNECTION = frozenset({"TransportError", "NetworkError", "ProtocolError", "OSError"})
_TIMEOUTS = frozenset({"TimeoutException", "TimeoutError"})
_CANNOT_BE_SENT = frozenset({"InvalidURL", "LocalProtocolError"})
# httpx has one class for a response that broke off and one that is not HTTP: only the text differs.
_TEXTS_OF_A_BROKEN_CONNECTION = ("disconnected", "peer closed", "peer unexpectedly closed")


def typed_failure(
    error: BaseException, request: str, seconds: float, proxy: ProxyAddress | None
) -> TransportError | InvalidData | None:
    """Returns the typed error for a failure of an HTTP library; None for any other failure.

    The failure does not become the cause: it may hold the request, whose headers contain the key. Classes are compared
    by name, because the user's client may belong to httpx2, which has its own classes.

    Args:
        error: the failure.
        request: method, path and host, for messages.
        seconds: the time limit of the exchange.
        proxy: the proxy of the connection.
    """
    if isinstance(error, TinkexError):
        return None
    failure = _typed(error, request, seconds, proxy)
    if proxy is None or failure is None or str(proxy) in str(failure) or isinstance(failure, InvalidData):
        return failure
    failure.args = (f"{failure}. The connection leads through {proxy}",)
    return failure


def _typed(
    error: BaseException, request: str, seconds: float, proxy: ProxyAddress | None
) -> TransportError | InvalidData | None:
    names = {cls.__name__ for cls in type(error).__mro__}
    failed = f"{request}: {type(error).__name__}"
    if "ConnectTimeout" in names and proxy is not None:
        return TimeoutExceeded(f"{failed}; {_no_connection_to(proxy)}")
    if names & _TIMEOUTS:
        return TimeoutExceeded(f"{failed}; the service did not respond within {seconds:g} s")
    if isinstance(error, BodyTooLarge):
        return too_large(f"{request}: the response has more than its limit of {error.limit} bytes after decompression")
    if "DecodingError" in names:
        return InvalidResponse(f"{failed}; the response could not be decompressed: {error}")
    if "RemoteProtocolError" in names and not any(text in str(error) for text in _TEXTS_OF_A_BROKEN_CONNECTION):
        return InvalidResponse(f"{failed}; the response is not HTTP. Is base_url the address of the service?")
    if "ProxyError" in names and proxy is not None:
        return ConnectionFailed(f"{failed}; {proxy} refused: {error}")
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
                f"the certificate of the service is not trusted: {error.verify_message}. If it is your own, set "
                "SSL_CERT_FILE to its file"
            )
        if isinstance(error, HandshakeFailed | ssl.SSLError):
            reason = error.reason if isinstance(error, ssl.SSLError) else str(error) or "the peer closed the connection"
            handshake = f"the TLS handshake failed ({reason}). Does the service use https there?"
        if isinstance(error, socket.gaierror) and proxy is None:
            return f"the host name cannot be resolved ({error.strerror}). Is base_url right?"
        error = error.__cause__ or error.__context__
    if handshake:
        return handshake
    if proxy is not None:
        return _no_connection_to(proxy)
    return "nothing answers there. Is the service running, and base_url right?"


def _no_connection_to(proxy: ProxyAddress) -> str:
    return f"no connection to {proxy}. Is it running? The service needs none if NO_PROXY names its host"
