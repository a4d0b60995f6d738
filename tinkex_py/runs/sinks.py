"""Hands the numbers of a run to its metric sinks, each in a thread of its own."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from tinkex_py import telemetry
from tinkex_py.errors import ConfigError
from tinkex_py.runs.records import RunInfo, RunStatus
from tinkex_py.runs.sink import MetricSink
from tinkex_py.threads import FileThread

Call = Callable[[], None]


class Sinks:
    """The sinks of one run. Calls are handed over at once and made in order; one that fails ends its sink.

    Use it with `async with`; leaving it waits until all calls are made.

    Args:
        sinks: where the numbers go.

    Raises:
        ConfigError: one of them is no sink.
    """

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        for sink in sinks:
            if not isinstance(sink, MetricSink):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigError(f"sinks: a {type(sink).__name__} has no start, log and finish")
        self._lines = [_Line(sink) for sink in sinks]

    def start(self, run: RunInfo) -> None:
        """The run starts, or goes on."""
        for line in self._lines:
            line.put(lambda sink=line.sink: sink.start(run))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one optimizer step."""
        for line in self._lines:
            line.put(lambda sink=line.sink: sink.log(step, metrics))

    def finish(self, status: RunStatus, *, at_once: bool = False) -> None:
        """The run is over.

        Args:
            status: how it ended.
            at_once: leave out the calls that still wait.
        """
        for line in self._lines:
            if at_once:
                line.forget()
            line.put(lambda sink=line.sink: sink.finish(status))

    async def __aenter__(self) -> "Sinks":
        for line in self._lines:
            line.open()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await asyncio.gather(*(line.aclose() for line in self._lines), return_exceptions=True)


class _Line:
    """The calls that wait for one sink."""

    def __init__(self, sink: MetricSink) -> None:
        self.sink = sink
        self._calls: asyncio.Queue[Call | None] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    def put(self, call: Call) -> None:
        self._calls.put_nowait(call)

    def forget(self) -> None:
        """Leaves out the calls that wait."""
        while not self._calls.empty():
            self._calls.get_nowait()

    def open(self) -> None:
        self._worker = asyncio.create_task(self._work(), name="tinkex.sink")

    async def aclose(self) -> None:
        """Waits for the calls; a cancelled caller waits only for the one in hand."""
        if self._worker is None:
            return
        self._calls.put_nowait(None)
        try:
            await self._worker
        finally:
            self._worker = None

    async def _work(self) -> None:
        async with FileThread("tinkex-sink") as thread:
            while (call := await self._calls.get()) is not None:
                try:
                    await thread.run(call)
                except Exception as error:  # noqa: BLE001  (the host's code must not break training)
                    name, reason = type(self.sink).__name__, type(error).__name__
                    telemetry.emit("tinkex.run.sink_failed", {}, {"sink": name, "reason": reason}, error)
                    return
