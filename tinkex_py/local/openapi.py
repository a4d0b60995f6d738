"""The service's description of itself: one OpenAPI document of all routes, at `/openapi.json`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkex_py.local import requests
from tinkex_py.local.http import PROTOBUF, answer
from tinkex_py.version import __version__

PATH = "/openapi.json"
_REFERENCE = "#/components/schemas/{model}"
_JSON = "application/json"
_OCTETS = "application/octet-stream"


@dataclass(frozen=True)
class _Operation:
    """What a route takes and gives beside what its path and its docstring tell.

    Args:
        body: the JSON body; None takes none.
        query: names of parameters in the query.
        also_reads: another media type of the body.
        also_gives: another media type of the answer.
        statuses: those of answers that are no errors.
    """

    body: type[BaseModel] | None = None
    query: tuple[str, ...] = ()
    also_reads: str | None = None
    also_gives: str | None = None
    statuses: tuple[int, ...] = (200,)


class AnyBody(BaseModel):
    """A body of which nothing is read."""


_API = "/api/v1/"
_PAGE = ("limit", "offset")
_CHECKPOINT = "training_runs/{run}/checkpoints/{kind}/{name}"
_OPERATIONS: Mapping[str, _Operation] = {
    "POST client/config": _Operation(AnyBody),
    "POST client/dynamic_config": _Operation(AnyBody),
    "POST telemetry": _Operation(AnyBody),
    "POST create_session": _Operation(requests.SessionBody),
    "POST session_heartbeat": _Operation(requests.SessionIdBody),
    "POST sessions/{session_id}/finish": _Operation(requests.FinishBody),
    "POST retrieve_future": _Operation(requests.FutureBody, also_gives=PROTOBUF, statuses=(200, 408)),
    "POST cancel_future": _Operation(requests.FutureBody),
    "POST create_model": _Operation(requests.CreateModelBody),
    "POST load_weights": _Operation(requests.LoadWeightsBody),
    "POST get_info": _Operation(requests.ModelBody),
    "POST unload_model": _Operation(requests.ModelBody),
    "POST forward_backward": _Operation(requests.ForwardBackwardBody, also_reads=PROTOBUF),
    "POST forward": _Operation(requests.ForwardBody),
    "POST optim_step": _Operation(requests.OptimStepBody),
    "POST save_weights": _Operation(requests.SaveWeightsBody),
    "POST save_weights_for_sampler": _Operation(requests.SaveWeightsBody),
    "POST save_weights_external": _Operation(requests.SaveWeightsBody),
    "POST create_custom_loss": _Operation(requests.CustomLossBody),
    "POST create_sampling_session": _Operation(requests.SamplingSessionBody),
    "POST asample": _Operation(requests.SampleBody),
    "POST join_sampling_session": _Operation(requests.SamplerIdBody),
    "POST weights_info": _Operation(requests.TinkerPathBody),
    "POST copy_weights": _Operation(requests.CopyBody),
    "POST sessions/search": _Operation(requests.SearchBody),
    f"PUT {_CHECKPOINT}/ttl": _Operation(requests.TtlBody),
    "GET training_runs": _Operation(query=(*_PAGE, "project_id")),
    "GET training_runs/{run}/checkpoints": _Operation(query=_PAGE),
    "GET checkpoints": _Operation(query=_PAGE),
    "GET sessions": _Operation(query=_PAGE),
    f"GET {_CHECKPOINT}/archive": _Operation(statuses=(302,)),
    "GET downloads/{run}/{kind}/{name}/{file}": _Operation(
        query=("expires", "signature"), also_gives=_OCTETS, statuses=(200, 206)
    ),
}
_PLAIN = _Operation()


async def openapi(request: Request) -> Response:
    """The OpenAPI document."""
    return answer(document(route for route in request.app.routes if isinstance(route, Route)))


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The OpenAPI document of some routes."""
    bodies = {operation.body for operation in _OPERATIONS.values() if operation.body is not None}
    ordered = sorted(bodies, key=lambda body: body.__name__)
    _, schemas = models_json_schema([(body, "validation") for body in ordered], ref_template=_REFERENCE)
    error = {"type": "object", "properties": {"detail": {"type": "string"}, "code": {"type": "string"}}}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(route.path, {})[method.lower()] = _described(route, method)
    return {
        "openapi": "3.1.0",
        "info": {"title": "tinkex_py, the embedded service", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": {**error, "required": ["detail"]}},
            "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}},
        },
        "security": [{"key": []}],
    }


def _described(route: Route, method: str) -> dict[str, Any]:
    told = _OPERATIONS.get(f"{method} {route.path.removeprefix(_API)}", _PLAIN)
    names = [(name, "path") for name in route.param_convertors] + [(name, "query") for name in told.query]
    described: dict[str, Any] = {
        "operationId": "_".join([method.lower(), *re.findall(r"\w+", route.path.removeprefix(_API))]),
        "summary": (route.endpoint.__doc__ or "").partition("\n")[0],
        "parameters": [_parameter(name, place) for name, place in names],
        "responses": _answers(told),
    }
    if told.body is not None:
        content = {_JSON: {"schema": {"$ref": _REFERENCE.format(model=told.body.__name__)}}}
        if told.also_reads is not None:
            content[told.also_reads] = {"schema": _binary()}
        described["requestBody"] = {"content": content, "required": True}
    return described


def _parameter(name: str, place: str) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 0, "maximum": 999_999_999} if name in _PAGE else {"type": "string"}
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def _answers(operation: _Operation) -> dict[str, Any]:
    content: dict[str, Any] = {_JSON: {"schema": {"type": "object"}}}
    if operation.also_gives is not None:
        content[operation.also_gives] = {"schema": _binary()}
    error = {"description": "refused", "content": {_JSON: {"schema": {"$ref": _REFERENCE.format(model="Error")}}}}
    told: dict[str, Any] = {str(status): {"description": "done", "content": content} for status in operation.statuses}
    if 302 in operation.statuses:
        told["302"] = {"description": "the address is in Location"}
    return {**told, "4XX": error, "5XX": error}


def _binary() -> dict[str, str]:
    return {"type": "string", "format": "binary"}


routes = [Route(PATH, openapi, methods=["GET"])]
