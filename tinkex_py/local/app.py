"""The ASGI app: routes, errors as JSON, and the middleware around it."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from tinkex_py.local import (
    routes_checkpoints,
    routes_futures,
    routes_models,
    routes_rest,
    routes_sampling,
    routes_service,
    routes_training,
)
from tinkex_py.local.core import Refused, Startable
from tinkex_py.local.http import API, Route, UnicodeJSONResponse, problems
from tinkex_py.local.middleware import ErrorBoundary, ReadBody, RequireKey
from tinkex_py.local.routes_checkpoints import DOWNLOADS
from tinkex_py.version import __version__

OPEN_PATHS = (f"{API}/healthz", DOWNLOADS)
"""Beginnings of paths that need no key; downloads have signed addresses instead."""
# Requests are matched in this order: the routes of a training loop come first.
_ROUTERS = (
    routes_futures.router,
    routes_training.router,
    routes_sampling.router,
    routes_service.router,
    routes_models.router,
    routes_rest.router,
    routes_checkpoints.router,
)


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the key, which middleware checks."""
        document = super().openapi()
        key = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
        document["components"]["securitySchemes"] = {"key": key}
        document["security"] = [{"key": []}]
        return document


def build_app(service: Startable, api_key: str | None) -> ASGIApp:
    """Returns the app of a service. Its lifespan, if the server runs it, starts and stops the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        del app
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    routes = [route for router in _ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    heads = [
        Route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
        for route in routes
        if "GET" in (route.methods or ())
    ]
    app = _App(
        title="tinkex_py, the embedded service",
        version=__version__,
        routes=[*routes, *heads],
        exception_handlers={
            Refused: _refused,
            RequestValidationError: _invalid,
            HTTPException: _http_error,
            500: _server_error,
        },
        lifespan=lifespan,
        # FastAPI's pages load scripts from another host.
        docs_url=None,
        redoc_url=None,
        # Its spans, metrics and logs would go to the exporters of the host process.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    read = ReadBody(app, service)
    return ErrorBoundary(read if api_key is None else RequireKey(read, api_key, OPEN_PATHS))


async def _refused(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    code = {} if error.code is None else {"code": error.code}
    return UnicodeJSONResponse({"detail": error.detail, **code}, status_code=error.status, headers=headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """Returns 400 for a body that is not a JSON object, and 422 for its fields or a query."""
    del request
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if errors[0]["loc"] == ("body",) and errors[0]["type"] != "value_error":
        return UnicodeJSONResponse({"detail": "the body must be a JSON object"}, status_code=400)
    found = problems([{**item, "loc": item["loc"][1:]} for item in errors])
    return UnicodeJSONResponse({"detail": found}, status_code=422)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return UnicodeJSONResponse({"detail": detail}, status_code=error.status_code, headers=error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    return UnicodeJSONResponse({"detail": f"{request.url.path}: {type(error).__name__}"}, status_code=500)
