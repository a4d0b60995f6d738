"""The state of the runs as server-sent events.

Each stream remembers what it has sent and, after a change, sends the difference to the current state. Nothing is queued
for a browser, so a slow one costs no memory and skips intermediate states.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic_core import to_json

from tinkex_py.dashboard.following import FollowedSteps
from tinkex_py.dashboard.runs_folder import RunLine, RunsFolder
from tinkex_py.runs.records import RunInfo

INTERVAL = 0.5  # seconds between two reads of the files, and between two messages to a browser
DIGITS = 7

Result = TypeVar("Result")
Event = tuple[str, str]


@dataclass(frozen=True)
class _State:
    """State of a run's steps; while `version` is the same, points are only added."""

    version: tuple[int, int]
    steps_made: int
    problem: str | None


@dataclass
class _Sent:
    """What one stream has sent.

    Attributes:
        lines: of the list of runs; None before anything was sent.
        points: name of the run -> its state, and the number of points.
        samples: name of the run -> step of the last sample.
    """

    lines: dict[str, RunLine] | None = None
    points: dict[str, tuple[_State, int]] = field(default_factory=dict[str, tuple[_State, int]])
    samples: dict[str, int] = field(default_factory=dict[str, int])


class Feed:
    """Follows a folder of runs as long as a stream is open.

    Args:
        runs_dir: the folder.
        interval: seconds between two reads of the files.

    Raises:
        ConfigError: it is not a folder.
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
        """Follows the folder while the block runs; all streams end with it."""
        # One thread for all reading: files may be slow, and the folder is not thread-safe.
        with ThreadPoolExecutor(1, thread_name_prefix="dashboard") as thread:
            self._thread = thread
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._look())
                try:
                    yield
                finally:
                    self.close()

    def close(self) -> None:
        """Ends all streams, present and future ones."""
        self._closing.set()
        self._listened.set()
        self._changed.set()

    async def lines(self) -> list[RunLine]:
        """Reads the files and returns the runs."""
        await self._refresh()
        return list(self._folder.lines.values())

    async def info(self, name: str) -> RunInfo | None:
        """Reads `run.json` of a run; None if there is no such run.

        Raises:
            ConfigError: it cannot be read.
        """
        await self._refresh()
        return await self._in_thread(lambda: self._folder.info(name))

    async def events(self, selected: Sequence[str]) -> AsyncGenerator[Event]:
        """Yields the state of the runs, then its changes, until the feed closes; each event as its name and its JSON.

        Events: `runs` (lines that changed, names that are gone), `curves` (points of one run, which replace all from
        some point on), and `samples` (texts of one run, which replace all).

        Args:
            selected: names of the runs whose curves are sent; names without a run are ignored until there is one.
        """
        own, sent = object(), _Sent()
        self._selections[own] = selected
        self._listened.set()
        try:
            await self._refresh()
            while not self._closing.is_set():
                changed = self._changed
                for event in await self._in_thread(lambda: list(self._news(selected, sent))):
                    yield event
                await self._pause()
                await changed.wait()
        finally:
            del self._selections[own]
            if not self._selections:
                self._listened.clear()

    async def _look(self) -> None:
        while not self._closing.is_set():
            await self._listened.wait()
            await self._refresh()
            if not self._folder.is_behind:
                await self._pause()

    async def _pause(self) -> None:
        """Waits for the interval, or until the feed closes."""
        try:
            async with asyncio.timeout(self._interval):
                await self._closing.wait()
        except TimeoutError:
            return

    async def _refresh(self) -> None:
        wanted = list(dict.fromkeys(name for selected in self._selections.values() for name in selected if name))
        if await self._in_thread(lambda: self._folder.refresh(wanted)):
            self._changed.set()
            self._changed = asyncio.Event()

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        assert self._thread is not None, "the feed is not running"
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _news(self, selected: Sequence[str], sent: _Sent) -> Iterator[Event]:
        lines, before = self._folder.lines, sent.lines or {}
        changed = [line.model_dump() for name, line in lines.items() if before.get(name) is not line]
        gone = [name for name in before if name not in lines]
        if changed or gone or sent.lines is None:
            yield _event("runs", {"changed": changed, "gone": gone})
            sent.lines = lines
        for name in dict.fromkeys(selected):
            steps = self._folder.followed(name)
            if steps is None:
                sent.points.pop(name, None)
            else:
                yield from _news_of(name, steps, sent)


def _news_of(run: str, steps: FollowedSteps, sent: _Sent) -> Iterator[Event]:
    curves = steps.curves
    state = _State(steps.version, curves.steps_made, steps.problem)
    before, points = sent.points.get(run, (None, 0))
    if state == before:
        return
    # The last point that was sent may stand for more steps by now.
    start = max(0, points - 1) if before is not None and before.version == state.version else 0
    sent.points[run] = state, curves.points
    axes = {axis: positions[start:] for axis, positions in curves.axes.items()}
    values = {name: _rounded(curves.values(name, start)) for name in curves.names}
    yield _event("curves", {"run": run, "from": start, "problem": steps.problem, "axes": axes, "values": values})
    last = steps.samples[-1][0] if steps.samples else 0
    if last != sent.samples.get(run, 0) or start == 0:
        sent.samples[run] = last
        yield _event("samples", {"run": run, "samples": list(steps.samples)})


def _event(kind: str, content: dict[str, Any]) -> Event:
    return kind, to_json(content, inf_nan_mode="null").decode()


def _rounded(values: Sequence[float | None]) -> list[float]:
    """Rounds values to the digits that a chart can show; None becomes NaN, which is null in JSON."""
    numbers = np.array(values, dtype=np.float64)
    sizes = np.where(np.isfinite(numbers) & (numbers != 0), np.abs(numbers), 1.0)
    scales = 10.0 ** np.clip(DIGITS - np.ceil(np.log10(sizes)), -300, 300)
    return (np.round(numbers * scales) / scales).tolist()
