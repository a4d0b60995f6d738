"""The service client of an application, and errors as problem details, over real HTTP."""

import importlib
import json
import sys
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel

from tests.client.recorder import KEY, http_recorder, quick_config
from tests.support.served_app import served_app
from tinkex_py import AsyncServiceClient, errors
from tinkex_py.errors import TinkexError
from tinkex_py.integrations.fastapi import (
    ServiceClient,
    add_error_handlers,
    detail_of,
    problem_responses,
    service_lifespan,
    status_of,
)

SECRET = "the text of a prompt at 10.0.0.7"

STATUSES = {
    "InvalidData": 422,
    "InvalidSpec": 422,
    "DuplicateRegularizerNames": 422,
    "BadRequest": 400,
    "NotFound": 404,
    "MissingEndpoint": 501,
    "Conflict": 409,
    "Unprocessable": 422,
    "PrecedingRequestFailed": 409,
    "SurrogateMismatch": 409,
    "RateLimited": 429,
    "UnsupportedFeature": 501,
    "Authentication": 502,
    "BillingRequired": 502,
    "PermissionDenied": 502,
    "ServerError": 502,
    "APIStatusError": 502,
    "InvalidResponse": 502,
    "TransportError": 502,
    "SequenceLost": 502,
    "RequestFailed": 502,
    "ResultLost": 502,
    "PartialFailure": 502,
    "ConnectionFailed": 503,
    "ClientClosed": 503,
    "TimeoutExceeded": 504,
    "RegularizerTimeout": 504,
    "TinkexError": 500,
    "ConfigError": 500,
    "MissingExtra": 500,
    "RequestInsideStep": 500,
    "PipelineError": 500,
    "InvalidBaseLoss": 500,
    "RegularizerError": 500,
    "NonFiniteLoss": 500,
    "InPlaceMutation": 500,
    "InvalidTermResult": 500,
}
WITH_MESSAGE = {"InvalidData", "InvalidSpec", "DuplicateRegularizerNames"}


def made(name: str) -> TinkexError:
    kind = getattr(errors, name)
    more: dict[str, Any] = {}
    if issubclass(kind, errors.APIStatusError):
        more = {"status": 400, "body": SECRET}
    elif issubclass(kind, errors.PartialFailure):
        more = {"applied": [], "missing": []}
    elif issubclass(kind, errors.RegularizerTimeout):
        more = {"name": "kl", "timeout": 1.0}
    elif issubclass(kind, errors.RegularizerError):
        more = {"name": "kl"}
    if kind is errors.DuplicateRegularizerNames:
        return kind([SECRET])
    if kind is errors.MissingExtra:
        return kind(SECRET, "local")
    return kind(SECRET, **more)


def test_every_error_has_a_status() -> None:
    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, TinkexError)
    }
    assert classes == set(STATUSES)
    for name, status in STATUSES.items():
        assert status_of(made(name)) == status, name
        assert (SECRET in detail_of(made(name))) == (name in WITH_MESSAGE), name
    for kind in (errors.RequestFailed, errors.ResultLost):  # because of the data
        error = kind("token 99999 is not in the vocabulary", category="user")
        assert (status_of(error), detail_of(error)) == (422, "token 99999 is not in the vocabulary")


class Wanted(BaseModel):
    number: int


def application(make: Any, *, all_errors: bool = False) -> FastAPI:
    app = FastAPI(lifespan=service_lifespan(make))
    add_error_handlers(app, all_errors=all_errors)

    @app.get("/models", responses=problem_responses(429, 502))
    async def models(service: ServiceClient) -> list[str]:
        return [model.model_name for model in (await service.get_server_capabilities()).supported_models]

    @app.get("/fail")
    async def fail(error: Annotated[str, Header()]) -> None:
        if error == "RateLimited":
            raise errors.RateLimited(SECRET, status=429, retry_after=2.3)
        raise made(error) from OSError(SECRET)

    @app.post("/number")
    async def number(body: Wanted) -> int:
        if body.number < 0:
            raise HTTPException(418, "negative", headers={"X-Why": "because"})
        return body.number

    return app


def problem(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    content = answer.json()
    assert content["status"] == answer.status_code
    assert content["type"] == "about:blank"
    return content


@pytest.mark.asyncio
async def test_an_application_with_a_client(caplog: pytest.LogCaptureFixture) -> None:
    clients: list[AsyncServiceClient] = []
    async with http_recorder() as (recorder, url):

        def make() -> AsyncServiceClient:
            clients.append(AsyncServiceClient(quick_config(url)))
            return clients[-1]

        app = application(make)
        async with served_app(app) as server, httpx.AsyncClient(base_url=server.url) as web:
            assert (await web.get("/models")).json() == ["tiny"]
            assert len(clients) == 1

            answer = await web.get("/fail", headers={"error": "RateLimited"})
            assert problem(answer) == {
                "type": "about:blank",
                "title": "Too Many Requests",
                "status": 429,
                "detail": "Too many requests are in progress. Try again later.",
                "error": "RateLimited",
            }
            assert answer.headers["retry-after"] == "3"
            for name in ("InvalidData", "BadRequest", "ConnectionFailed", "NonFiniteLoss", "PartialFailure"):
                answer = await web.get("/fail", headers={"error": name})
                status = STATUSES[name]
                assert (answer.status_code, problem(answer)["error"]) == (status, name)
                assert ("retry-after" in answer.headers) == (status in (429, 503))
                assert (SECRET in answer.text) == (name in WITH_MESSAGE)
                assert KEY not in answer.text
            assert (await web.post("/number", json={"number": "x"})).json()["detail"][0]["loc"] == ["body", "number"]

            schema = (await web.get("/openapi.json")).json()
            documented = schema["paths"]["/models"]["get"]["responses"]["429"]
            assert list(documented["content"]) == ["application/problem+json"]
            assert "detail" in documented["content"]["application/problem+json"]["schema"]["properties"]
            assert "Retry-After" in documented["headers"]
        assert len(recorder.of("finish")) == 1  # the session was closed with the application
    with pytest.raises(errors.ClientClosed):
        await clients[0].get_server_capabilities()
    assert "GET /fail: NonFiniteLoss from OSError" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.asyncio
async def test_all_errors_in_one_form() -> None:
    app = application(lambda: AsyncServiceClient.local(model="tiny"), all_errors=True)
    async with served_app(app) as server, httpx.AsyncClient(base_url=server.url) as web:
        answer = await web.post("/number", json={"number": SECRET})
        content = problem(answer)
        assert (content["status"], content["errors"][0]["loc"]) == (422, ["body", "number"])
        assert SECRET not in answer.text
        refused = await web.post("/number", json={"number": -1})
        assert (problem(refused)["detail"], refused.headers["x-why"]) == ("negative", "because")
        assert problem(await web.get("/nowhere"))["title"] == "Not Found"
        assert problem(await web.get("/number"))["status"] == 405
        assert (await web.post("/number", json={"number": 3})).json() == 3


@pytest.mark.asyncio
async def test_the_dependency_needs_the_lifespan(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/")
    async def root(service: ServiceClient) -> None:
        raise AssertionError(service)

    async with served_app(app) as server, httpx.AsyncClient(base_url=server.url) as web:
        content = problem(await web.get("/"))
    assert (content["status"], content["error"], content["detail"]) == (500, "ConfigError", "Internal error.")
    assert "GET /: ConfigError" in caplog.text


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "tinkex_py.integrations.fastapi")
    with pytest.raises(
        errors.MissingExtra, match=r"^fastapi is not installed\. Run: pip install 'tinkex-py\[fastapi\]'$"
    ):
        importlib.import_module("tinkex_py.integrations.fastapi")


def test_a_problem_is_plain_json() -> None:
    for status, documented in problem_responses(404, 503).items():
        assert json.loads(json.dumps(documented)) == documented
        assert ("headers" in documented) == (status == 503)
