"""What a browser is told, and when: the state of the runs as server-sent events.

Nothing is queued for a browser. Each stream remembers what it has sent and, when something changes, sends the
difference to what is there now; so a slow browser costs no memory and skips what it was too slow for.
"""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tinkex_py.dashboard.curves import Curves
from tinkex_py.dashboard.following import FollowedSteps
from tinkex_py.dashboard.pictures import PALETTE_ON_DARK, PALETTE_ON_LIGHT, Drawing, drawings
from tinkex_py.dashboard.runs_folder import RunLine, RunsFolder
from tinkex_py.runs.records import RunInfo

INTERVAL = 0.5  # seconds between two looks at the files

Result = TypeVar("Result")
Event = tuple[str, str]


@dataclass(frozen=True)
class State:
    """What is known of a run's steps; as long as `version` is the same, points are only added."""

    version: tuple[int, int]
    steps_made: int
    problem: str | None


@dataclass
class Sent:
    """What one stream has sent.

    Attributes:
        lines: of the list of runs.
        layout: the names of the curves by run; None before anything was sent.
        drawn: what they are drawn as.
        points: name of the run -> what the next points are compared with, and how many were sent.
    """

    lines: dict[str, RunLine] = field(default_factory=dict[str, RunLine])
    layout: dict[str, list[str]] | None = None
    drawn: list[Drawing] = field(default_factory=list[Drawing])
    points: dict[str, tuple["State", int]] = field(default_factory=dict[str, tuple["State", int]])


class Feed:
    """Looks at a folder of runs as long as somebody listens.

    Args:
        runs_dir: the folder.
        interval: seconds between two looks.

    Raises:
        ConfigError: it is no folder.
    """

    def __init__(self, runs_dir: Path | str, *, interval: float = INTERVAL) -> None:
        self._folder = RunsFolder(runs_dir)
        self._interval = interval
        self._selections: dict[object, Sequence[str]] = {}
        self._closing = asyncio.Event()
        self._listened = asyncio.Event()
        self._changed = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Looks at the folder while the block runs; all streams end with it."""
        # One thread for all reading: files may be slow, and the folder is not safe to use from two.
        with ThreadPoolExecutor(1, thread_name_prefix="dashboard") as thread:
            self._thread = thread
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._look())
                try:
                    yield
                finally:
                    self.close()

    def close(self) -> None:
        """Ends all streams, now and later ones."""
        self._closing.set()
        self._listened.set()
        self._changed.set()

    async def lines(self) -> list[RunLine]:
        """The runs, as the files are now."""
        await self._refresh()
        return list(self._folder.lines.values())

    async def info(self, name: str) -> RunInfo | None:
        """What `run.json` of a run says; None if there is no such run.

        Raises:
            ConfigError: it cannot be read.
        """
        await self._refresh()
        return await self._in_thread(lambda: self._folder.info(name))

    async def events(self, selected: Sequence[str]) -> AsyncGenerator[Event]:
        """The state of the runs, then what changes, until the feed closes; each event as its name and its JSON.

        Events: `runs` (lines that changed, names that are gone), `charts` (what to draw, when that changes), and
        `curves` (points of one run from some point on, in place of all from there).

        Args:
            selected: names of the runs whose curves are told; the place of each is its colour. An empty one keeps a
                colour free, and one that is no run is left out for as long as that is so.
        """
        own, sent = object(), Sent()
        self._selections[own] = selected
        self._listened.set()
        try:
            await self._refresh()
            while not self._closing.is_set():
                changed = self._changed
                for kind, told in await self._in_thread(lambda: list(self._news(selected, sent))):
                    yield kind, told
                await changed.wait()
        finally:
            del self._selections[own]
            if not self._selections:
                self._listened.clear()

    async def _look(self) -> None:
        while not self._closing.is_set():
            await self._listened.wait()
            await self._refresh()
            try:
                async with asyncio.timeout(self._interval):
                    await self._closing.wait()
            except TimeoutError:
                continue

    async def _refresh(self) -> None:
        wanted = list(dict.fromkeys(name for selected in self._selections.values() for name in selected if name))
        if await self._in_thread(lambda: self._folder.refresh(wanted)):
            self._changed.set()
            self._changed = asyncio.Event()

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        assert self._thread is not None, "the feed is not running"
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _news(self, selected: Sequence[str], sent: Sent) -> Iterator[Event]:
        lines = self._folder.lines
        changed = [line.model_dump() for name, line in lines.items() if sent.lines.get(name) is not line]
        gone = [name for name in sent.lines if name not in lines]
        if changed or gone or sent.layout is None:
            yield _event("runs", {"changed": changed, "gone": gone})
            sent.lines = lines
        followed = {name: steps for name in selected if (steps := self._folder.followed(name)) is not None}
        layout = {name: steps.curves.names for name, steps in followed.items()}
        if layout != sent.layout:
            sent.drawn = drawings(layout, {name: selected.index(name) for name in layout})
            yield _event("charts", _as_json(sent.drawn))
            sent.layout, sent.points = layout, {}
        for name, steps in followed.items():
            yield from _points(name, steps, sent)


def _points(run: str, steps: FollowedSteps, sent: Sent) -> Iterator[Event]:
    curves = steps.curves
    state = State(steps.version, curves.steps_made, steps.problem)
    before, points = sent.points.get(run, (None, 0))
    if state == before:
        return
    # The last point that was sent may stand for more steps by now.
    start = max(0, points - 1) if before is not None and before.version == state.version else 0
    sent.points[run] = state, curves.points
    values = {name: _numbers(curves, name, start) for name in _names_drawn(run, sent.drawn)}
    told = {"run": run, "from": start, "stride": curves.stride, "problem": steps.problem}
    yield _event("curves", {**told, "steps": curves.steps(start), "values": values})


def _event(kind: str, told: dict[str, Any]) -> Event:
    return kind, json.dumps(told, allow_nan=False)


def _numbers(curves: Curves, name: str, start: int) -> list[float | None]:
    """With as many digits as a picture can show."""
    return [None if math.isnan(value) else float(f"{value:.7g}") for value in curves.values(name, start).tolist()]


def _names_drawn(run: str, laid_out: Sequence[Drawing]) -> list[str]:
    lines = [line for drawing in laid_out for chart in drawing.charts for line in chart.lines]
    return list(dict.fromkeys(line.name for line in lines if line.run == run))


def _as_json(laid_out: Sequence[Drawing]) -> dict[str, Any]:
    pictures = [
        {
            "key": drawing.picture.key,
            "title": drawing.picture.title,
            "caption": drawing.picture.caption if drawing.charts else f"Nothing to show: {drawing.picture.absent}.",
            "columns": drawing.columns,
            "charts": [
                {
                    "title": chart.title,
                    "axis": chart.panel.axis,
                    "scale": chart.panel.scale,
                    "stacked": chart.panel.stacked,
                    "noisy": chart.panel.noisy,
                    "sparse": chart.panel.sparse,
                    "limits": chart.panel.limits,
                    "lines": [vars(line) for line in chart.lines],
                }
                for chart in drawing.charts
            ],
        }
        for drawing in laid_out
    ]
    return {"pictures": pictures, "palettes": {"light": PALETTE_ON_LIGHT, "dark": PALETTE_ON_DARK}}
