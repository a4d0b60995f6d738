"""A dashboard on loopback, and its events."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tinkex_py.dashboard import serve_dashboard

INTERVAL = 0.02
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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
        self.axes: dict[str, dict[str, list[float]]] = {}
        self.values: dict[str, dict[str, list[float | None]]] = {}
        self.samples: dict[str, list[Any]] = {}
        self.problems: dict[str, str | None] = {}
        self.sizes: list[int] = []

    @property
    def steps(self) -> dict[str, list[float]]:
        return {run: axes["step"] for run, axes in self.axes.items()}

    def take(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "runs":
            self.lines |= {line["name"]: line for line in data["changed"]}
            for name in data["gone"]:
                del self.lines[name]
                self.axes.pop(name, None)
        elif kind == "samples":
            self.samples[data["run"]] = data["samples"]
        else:
            run, start = data["run"], data["from"]
            self.sizes.append(len(data["axes"]["step"]))
            self.problems[run] = data["problem"]
            for known, new in ((self.axes, data["axes"]), (self.values, data["values"])):
                for name, points in new.items():
                    own = known.setdefault(run, {})
                    own[name] = own.get(name, [])[:start] + points

    async def until(self, stream: AsyncIterator[tuple[str, Any]], enough: Any) -> None:
        """Takes events until `enough(self)`."""
        while not enough(self):
            self.take(*await anext(stream))
