"""Streams of events from an application with FastAPI, over real HTTP, to a client that stays or leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.sse import ServerSentEvent
from pydantic import BaseModel

from tests.support.served_app import served_app
from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, Pipeline, errors
from tinkex_py.base_losses import NLL
from tinkex_py.integrations.fastapi import (
    EventStream,
    ServiceClient,
    add_error_handlers,
    service_lifespan,
    training_events,
)
from tinkex_py.runs import TrainSettings, read_run, read_steps, train

SECRET = "the text of a prompt"
TOKENS = list(b"hello")
DATA = [Datum(model_input=ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": TOKENS[1:]})]


class Sample(BaseModel):
    text: str
    score: float = 0.5


def application(items: AsyncGenerator[Any, None], form: Any = "events") -> FastAPI:
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/stream")
    async def stream() -> EventStream:
        return EventStream(items, form)

    return app


async def events(answer: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream in either form, as a JSON line shows them."""
    event: dict[str, Any] = {}
    async for line in answer.aiter_lines():
        if line.startswith("{"):
            yield json.loads(line)
        elif line:
            name, _, value = line.partition(": ")
            event[name] = json.loads(value) if name == "data" else value
        else:
            yield {"event": "message", **event}
            event = {}


async def all_events(app: FastAPI) -> tuple[httpx.Response, list[dict[str, Any]]]:
    async with (
        served_app(app) as server,
        httpx.AsyncClient(base_url=server.url, timeout=30) as web,
        web.stream("GET", "/stream") as answer,
    ):
        return answer, [event async for event in events(answer)]


@pytest.mark.asyncio
@pytest.mark.parametrize(("form", "media_type"), [("events", "text/event-stream"), ("lines", "application/jsonl")])
async def test_items_become_events_and_the_stream_says_that_it_is_complete(form: str, media_type: str) -> None:
    async def items() -> AsyncGenerator[Any, None]:
        yield Sample(text="two\nlines")
        yield {"loss": float("nan"), "step": 1}
        yield ServerSentEvent(event="step", id="2", data=[1, 2])
        yield "plain"

    answer, sent = await all_events(application(items(), form))
    assert answer.headers["content-type"].partition(";")[0] == media_type
    assert answer.headers["cache-control"] == "no-cache"
    assert sent == [
        {"event": "message", "data": {"text": "two\nlines", "score": 0.5}},
        {"event": "message", "data": {"loss": None, "step": 1}},
        {"event": "step", "id": "2", "data": [1, 2]},
        {"event": "message", "data": "plain"},
        {"event": "end", "data": {}},
    ]


FAILURES = [
    (errors.InvalidData("datum 3 has no target_tokens"), 422, "datum 3 has no target_tokens", "InvalidData"),
    (errors.NonFiniteLoss(SECRET, name="kl"), 500, "Internal error.", "NonFiniteLoss"),
    (errors.ConnectionFailed(SECRET), 503, "The training service is unreachable. Try again later.", "ConnectionFailed"),
    (KeyError(SECRET), 500, "Internal error.", None),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("form", ["events", "lines"])
@pytest.mark.parametrize(("error", "status", "detail", "name"), FAILURES)
async def test_an_error_is_the_response_before_the_first_item_and_the_last_event_after_it(
    error: Exception, status: int, detail: str, name: str | None, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def items(count: int) -> AsyncGenerator[Any, None]:
        for _ in range(count):
            yield {}
        raise error

    async with served_app(application(items(0), form)) as server, httpx.AsyncClient(base_url=server.url) as web:
        refused = await web.get("/stream")
    assert refused.status_code == status
    if name is not None:  # else it is an error of the server, as in any endpoint
        assert (refused.json()["detail"], refused.json()["error"]) == (detail, name)
    answer, (first, last) = await all_events(application(items(1), form))
    assert (answer.status_code, first) == (200, {"event": "message", "data": {}})
    assert last["event"] == "problem"
    assert (last["data"]["status"], last["data"]["detail"], last["data"].get("error")) == (status, detail, name)
    assert SECRET not in str(last)
    assert (f"GET /stream: {name}" in caplog.text) == (name is not None and status >= 500)
    assert ("Exception in ASGI application" in caplog.text) == (name is None)


@pytest.mark.asyncio
@pytest.mark.parametrize("count", [0, 2])
async def test_a_client_that_leaves_cancels_the_generator_where_it_waits(count: int) -> None:
    waiting, ended = asyncio.Event(), asyncio.Event()

    async def items() -> AsyncGenerator[Any, None]:
        for number in range(count):
            yield number
        try:
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.set()
            raise

    async with served_app(application(items())) as server, httpx.AsyncClient(base_url=server.url) as web:
        request = asyncio.create_task(web.get("/stream"))
        async with asyncio.timeout(30):
            await waiting.wait()
            request.cancel()
            await asyncio.wait([request])
            await ended.wait()


def test_what_cannot_be_streamed_is_refused() -> None:
    async def items() -> AsyncGenerator[int, None]:
        yield 1

    with pytest.raises(errors.InvalidData, match="items must be an async generator, got a function: call the function"):
        EventStream(items)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidData, match="form must be one of 'events', 'lines', got 'xml'"):
        EventStream(items(), "xml")  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_a_run_is_streamed_cancelled_with_its_client_and_resumed(tmp_path: Path) -> None:
    app = FastAPI(lifespan=service_lifespan(lambda: AsyncServiceClient.local(model="tiny")))
    add_error_handlers(app)

    @app.post("/train/{steps}")
    async def start(steps: int, service: ServiceClient) -> EventStream:
        def run(view: Any) -> Any:
            settings = TrainSettings(steps=steps, checkpoint_every=1, early_stop=None)
            return train(
                service,
                lambda: service.create_lora_training_client("tiny", rank=4),
                lambda start: iter([DATA] * steps),
                Pipeline(NLL()),
                folder=tmp_path / "run",
                optimizer=AdamParams(learning_rate=1e-3),
                settings=settings,
                progress=view,
            )

        return EventStream(training_events(run))

    async with served_app(app) as server, httpx.AsyncClient(base_url=server.url, timeout=30) as web:
        async with web.stream("POST", "/train/1000") as answer, aclosing(events(answer)) as stream:
            sent = [await anext(stream)]
            while sent[-1]["event"] != "step":
                sent.append(await anext(stream))
            assert sent[0] == {"event": "start", "data": {"name": "run", "made": 0, "total_steps": 1000}}
        assert (await resumed(web, tmp_path))[-3:] == ["step", "run", "end"]
        info = read_run(tmp_path / "run")
        assert (info.status, info.total_steps) == ("finished", len(read_steps(tmp_path / "run")))


async def resumed(web: httpx.AsyncClient, folder: Path) -> list[str]:
    """The events of two more steps, once the run of the client that left has ended."""
    async with asyncio.timeout(30):
        while True:
            more = len(read_steps(folder / "run")) + 2
            async with web.stream("POST", f"/train/{more}") as answer:
                if answer.status_code == 200:
                    sent = [event async for event in events(answer)]
                    break
    assert sent[0]["event"] == "start"
    assert sent[0]["data"]["made"] <= more - 2  # the checkpoint of the last step may be missing
    assert [event["id"] for event in sent if event["event"] == "step"][-1] == str(more)
    assert (sent[-2]["data"]["status"], sent[-2]["data"]["steps"]) == ("finished", more)
    return [event["event"] for event in sent if event["event"] != "doing"]
