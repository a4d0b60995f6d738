"""The ASGI app: routes, the key, and errors as JSON."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tinkex_py.local import (
    openapi,
    routes_checkpoints,
    routes_downloads,
    routes_losses,
    routes_models,
    routes_rest,
    routes_sampling,
    routes_service,
    routes_training,
)
from tinkex_py.local.core import Refused
from tinkex_py.local.http import AnyTextResponse
from tinkex_py.local.middleware import ErrorBoundary, ReadBody, RequireKey
from tinkex_py.local.routes_downloads import DOWNLOADS

if TYPE_CHECKING:
    from tinkex_py.local.service import LocalService

OPEN_PATHS = ("/api/v1/healthz", DOWNLOADS)
"""What these paths begin with needs no key; downloads have signed addresses instead."""


def build_app(service: "LocalService", api_key: str | None) -> ASGIApp:
    """The app of one service. Its lifespan starts and stops the service, where the server runs one."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        del app
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        routes=[
            *routes_service.routes,
            *routes_models.routes,
            *routes_training.routes,
            *routes_losses.routes,
            *routes_sampling.routes,
            *routes_rest.routes,
            *routes_checkpoints.routes,
            *routes_downloads.routes,
            *openapi.routes,
        ],
        exception_handlers={Refused: _refused, HTTPException: _http_error, 500: _server_error},
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    read = ReadBody(app, service.options.max_body_bytes)
    return ErrorBoundary(read if api_key is None else RequireKey(read, api_key, OPEN_PATHS))


async def _refused(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    code = {} if error.code is None else {"code": error.code}
    return AnyTextResponse({"detail": error.detail, **code}, status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return AnyTextResponse({"detail": detail}, status_code=error.status_code, headers=error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    return AnyTextResponse({"detail": f"{request.url.path}: {type(error).__name__}"}, status_code=500)
