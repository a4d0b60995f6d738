"""An HTTP client that is given a request in parts, and sends the same key with every one."""

from contextlib import AbstractAsyncContextManager
from typing import Any

from tinkex_py.transport.adapters import ClientTransport, InProcessTransport
from tinkex_py.transport.http import HttpClient, ResponseStream
from tinkex_py.transport.messages import Response, Secret, request


class KeyedClient:
    def __init__(
        self, *, api_key: str | None = None, http_client: object = None, asgi_app: object = None, **options: Any
    ) -> None:
        transport = None
        if http_client is not None:
            transport = ClientTransport(http_client)
        if asgi_app is not None:
            transport = InProcessTransport(asgi_app)
        self.http = HttpClient(transport=transport, **options)
        self.key = Secret(api_key or "")
        self.aclose = self.http.aclose

    async def exchange(self, method: str, path: str, *, attempt: int = 1, **parts: Any) -> Response:
        return await self.http.exchange(request(method, path, **parts), key=self.key, attempt=attempt)

    def stream(self, path: str, **parts: Any) -> AbstractAsyncContextManager[ResponseStream]:
        return self.http.stream(request("GET", path, accept="*/*", **parts), key=self.key)
