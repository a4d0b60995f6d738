"""Terms that a service of the user evaluates, over HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from pydantic_core import to_json

from tinkex_py.arguments import as_number, check_kind, check_text, shown
from tinkex_py.errors import ConfigError, InvalidData, InvalidResponse, status_error_class
from tinkex_py.losses.known_gradient import Scored
from tinkex_py.losses.logprobs import split
from tinkex_py.threads import in_own_thread
from tinkex_py.transport.http import HttpClient
from tinkex_py.transport.messages import JSON, NO_HEADERS, Response, checked_base_url, merged_headers, request
from tinkex_py.types import Datum
from tinkex_py.types.response_model import ResponseModel

__all__ = ["http_term"]

# The longest response: the gradient, of 40 bytes per number as text and 8 times as much when it is parsed, and metrics.
_BYTES_PER_NUMBER = 8 * 40
_BYTES_OF_METRICS = 1 << 20


def http_term(
    url: str, *, name: str = "http_term", headers: Mapping[str, str] = NO_HEADERS, timeout: float = 60.0
) -> "_HttpTerm":
    """Returns a term whose value and gradient come from a service of yours.

    Each call is one POST of JSON, `{"logprobs": [[...], ...], "data": [...]}`: the logprobs of every datum, and the
    datums with `model_input` and `loss_fn_inputs`. Without datums, the logprobs are one list. The service responds with
    `{"value": 1.5, "gradient": [[...], ...], "metrics": {}}`: the gradient d(value)/d(logprobs) in the shape of the
    logprobs, or null if the value does not depend on them. Metrics may be missing.

    The term is async, and works under `per_datum`. Its failures are `RegularizerError`, caused by `APIStatusError`,
    `InvalidResponse`, `TimeoutExceeded` or `ConnectionFailed`. `RegularizerSpec(retry=...)` repeats the request.

    Args:
        url: where the service is, without a query.
        name: default name of the regularizer.
        headers: sent with the request, such as a key. They are in no message and no repr.
        timeout: seconds for one request. The timeout of the term applies, too.

    Raises:
        ConfigError: an argument is invalid.
    """
    try:
        parts = checked_base_url(check_text("url", url, error=ConfigError))
    except ConfigError as error:
        raise ConfigError(str(error).replace("base_url", "url")) from None
    check_text("name", name, error=ConfigError)
    check_kind("headers", headers, Mapping, error=ConfigError)
    for header, value in cast("Mapping[object, object]", headers).items():
        check_text("headers", header, error=ConfigError)
        if not isinstance(value, str):
            raise ConfigError(f"headers[{header!r}] must be a string, got a {type(value).__name__}")
    seconds = as_number(timeout)
    if seconds is None or not 0 < seconds < float("inf"):
        raise ConfigError(f"timeout must be a number of seconds > 0, got {shown(timeout)}")
    try:
        sent = merged_headers(headers)
    except InvalidData as error:
        raise ConfigError(f"headers: {error}") from None
    return _HttpTerm(f"{parts.scheme}://{parts.netloc}", parts.path or "/", name, sent, seconds)


class ScoredResponse(ResponseModel):
    """The response of a service."""

    value: float
    gradient: Any = None
    metrics: dict[str, bool | int | float] = Field(default_factory=dict[str, bool | int | float])


@dataclass(frozen=True)
class _HttpTerm:
    origin: str
    path: str
    name: str
    headers: Mapping[str, str] = field(repr=False, hash=False)
    timeout: float

    async def compute(self, data: Sequence[Datum], logprobs: torch.Tensor | Sequence[torch.Tensor]) -> Scored:
        """Has the service compute value and gradient.

        Raises:
            APIStatusError: the service responded with another status than 2xx.
            InvalidResponse: the response is too large, is not JSON, or does not have the shape of the logprobs.
            TransportError: there was no complete response.
            InvalidData: the logprobs are not finite, or an element of `data` is not a datum.
        """
        is_packed = isinstance(logprobs, torch.Tensor)
        if is_packed:
            whole = logprobs.detach().as_subclass(torch.Tensor)
            parts = split(data, whole) if data else [whole]
        else:
            parts = [part.detach() for part in logprobs]
        body = await in_own_thread("tinkex-http-term", lambda: _body(data, parts))
        client = HttpClient(
            base_url=self.origin,
            timeout=self.timeout,
            headers=self.headers,
            max_response_bytes=_BYTES_OF_METRICS + _BYTES_PER_NUMBER * sum(part.numel() for part in parts),
        )
        try:
            response = await client.exchange(request("POST", self.path, content=body, content_type=JSON))
        finally:
            await client.aclose()
        read, gradients = await in_own_thread("tinkex-http-term", lambda: _read(response, parts, is_single=not data))
        gradient: Any = gradients
        if gradients is not None and is_packed:
            gradient = np.concatenate(gradients) if data else gradients[0]
        return Scored(read.value, gradient, read.metrics)


def _body(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> list[bytes]:
    """Returns the body in parts: each is encoded by itself, so that the event loop can run in between."""
    numbers = [part.cpu().double().numpy() for part in logprobs]
    if not all(np.isfinite(part).all() for part in numbers):
        raise InvalidData("the logprobs contain NaN or infinity, which JSON cannot represent")
    lists = [to_json(part.tolist()) for part in numbers]
    if not data:
        return [b'{"logprobs":', *lists, b',"data":[]}']
    datums = [check_kind(f"data[{index}]", datum, Datum) for index, datum in enumerate(data)]
    texts = [datum.model_dump_json(exclude_none=True).encode() for datum in datums]
    return [b'{"logprobs":[', *_with_commas(lists), b'],"data":[', *_with_commas(texts), b"]}"]


def _with_commas(texts: Sequence[bytes]) -> list[bytes]:
    return [piece for text in texts for piece in (b",", text)][1:]


def _read(
    response: Response, logprobs: Sequence[torch.Tensor], *, is_single: bool
) -> tuple[ScoredResponse, list[np.ndarray[Any, Any]] | None]:
    """Returns a response, and its gradients, one for each tensor."""
    if not response.is_success:
        detail = shown(response.readable_body())
        raise status_error_class(response.status)(
            f"{response.request} returned {response.status}: {detail}",
            status=response.status,
            body=response.readable_body(),
        )
    fields = response.json()
    if not isinstance(fields, dict):
        raise InvalidResponse(f"{response.request} returned no JSON object")
    read = ScoredResponse.read(cast("dict[str, Any]", fields))
    if read.gradient is None:
        return read, None
    given: object = [read.gradient] if is_single else read.gradient
    if not isinstance(given, list) or len(cast("list[object]", given)) != len(logprobs):
        got = f"{len(cast('list[object]', given))} of them" if isinstance(given, list) else shown(given)
        raise InvalidResponse(
            f"{response.request} must return a gradient with one list per datum ({len(logprobs)}), got {got}"
        )
    pairs = zip(cast("list[object]", given), logprobs, strict=True)
    return read, [_gradient(own, part, index, response) for index, (own, part) in enumerate(pairs)]


def _gradient(given: object, logprobs: torch.Tensor, index: int, response: Response) -> "np.ndarray[Any, Any]":
    try:
        array = np.array(given)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.size == 0 and array.shape[:1] == logprobs.shape[:1]:
        array = np.zeros(tuple(logprobs.shape))
    if array.dtype.kind not in "iuf" or array.shape != tuple(logprobs.shape):
        raise InvalidResponse(
            f"{response.request} must return a gradient in the shape of the logprobs: that of datum {index} needs "
            f"numbers in the shape {tuple(logprobs.shape)}, got {shown(given)}"
        )
    return array.astype(np.float64)
