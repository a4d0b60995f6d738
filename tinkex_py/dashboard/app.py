"""The dashboard's web application: one page, its files, and events that update it."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from pydantic import JsonValue
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tinkex_py.dashboard.feed import Feed
from tinkex_py.dashboard.runs_folder import RunLine
from tinkex_py.errors import ConfigError
from tinkex_py.runs.records import flattened

FILES = Path(__file__).parent / "static"
MOST_RUNS = 28  # at once: as many as there are combinations of colours and dashes
THIS_MACHINE = ("127.0.0.1", "localhost", "::1", "[::1]")
# Everything is loaded from this server, no data of a run can become a script, and no other page can frame this one.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

routes = APIRouter()


def dashboard_app(feed: Feed, *, hosts: Sequence[str] = THIS_MACHINE) -> FastAPI:
    """Creates the application over a feed.

    Args:
        feed: of the folder of runs; runs as long as the application.
        hosts: permitted host names, against DNS rebinding; `*` is any.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with feed.running():
            yield

    app = FastAPI(title="tinkex_py dashboard", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.feed = feed
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.mount("/static", StaticFiles(directory=FILES))
    app.include_router(routes)
    return app


def _feed_of(request: Request) -> Feed:
    return request.app.state.feed


TheFeed = Annotated[Feed, Depends(_feed_of)]


@routes.get("/")
async def page() -> FileResponse:
    """The page itself."""
    return FileResponse(FILES / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})


@routes.get("/api/runs")
async def runs(feed: TheFeed) -> list[RunLine]:
    """The runs, as their files are now."""
    return await feed.lines()


@routes.get("/api/runs/{name}/settings")
async def settings(name: str, feed: TheFeed) -> dict[str, JsonValue]:
    """The settings of one run."""
    try:
        info = await feed.info(name)
    except ConfigError as error:
        raise HTTPException(422, str(error)) from None
    if info is None:
        raise HTTPException(404, f"no run is named {name!r}")
    return flattened(info.config)


@routes.get("/api/events", response_class=EventSourceResponse)
async def events(
    feed: TheFeed, run: Annotated[list[str] | None, Query(max_length=MOST_RUNS)] = None
) -> AsyncGenerator[ServerSentEvent]:
    """`Feed.events` as server-sent events."""
    async for kind, data in feed.events(run or []):
        yield ServerSentEvent(event=kind, raw_data=data)
