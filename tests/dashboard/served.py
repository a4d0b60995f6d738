"""A dashboard on loopback, and its events."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tinkex_py.dashboard import serve_dashboard

INTERVAL = 0.02


@asynccontextmanager
async def dashboard(runs_dir: Path, **options: Any) -> AsyncIterator[str]:
    """The address of a dashboard that is stopped at the end."""
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    options = {"interval": INTERVAL, "on_listening": listening.set_result, **options}
    serving = asyncio.create_task(serve_dashboard(runs_dir, **options))
    await asyncio.wait([serving, listening], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    try:
        yield listening.result()
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


@asynccontextmanager
async def events(address: str, *runs: str) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
    """The server-sent events of a dashboard, as their kinds and data."""
    async with (
        httpx.AsyncClient(timeout=30.0) as client,
        client.stream("GET", f"{address}/api/events", params={"run": runs}) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        async with aclosing(_parsed(answer)) as parsed:
            yield parsed


async def _parsed(answer: httpx.Response) -> AsyncGenerator[tuple[str, Any]]:
    kind = ""
    async with aclosing(answer.aiter_lines()) as lines:
        async for line in lines:
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                yield kind, json.loads(value)


class Seen:
    """What a page would know after the events so far."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[str, Any]] = {}
        self.pictures: list[dict[str, Any]] = []
        self.steps: dict[str, list[int]] = {}
        self.values: dict[str, dict[str, list[float | None]]] = {}
        self.problems: dict[str, str | None] = {}
        self.sizes: list[int] = []

    def take(self, kind: str, told: dict[str, Any]) -> None:
        if kind == "runs":
            self.lines |= {line["name"]: line for line in told["changed"]}
            for name in told["gone"]:
                del self.lines[name]
        elif kind == "charts":
            self.pictures, self.steps, self.values = told["pictures"], {}, {}
        else:
            run, start = told["run"], told["from"]
            self.sizes.append(len(told["steps"]))
            self.problems[run] = told["problem"]
            self.steps[run] = self.steps.get(run, [])[:start] + told["steps"]
            values = self.values.setdefault(run, {})
            for name, points in told["values"].items():
                values[name] = values.get(name, [])[:start] + points

    async def until(self, stream: AsyncIterator[tuple[str, Any]], enough: Any) -> None:
        """Takes events until `enough(self)`."""
        while not enough(self):
            self.take(*await anext(stream))
