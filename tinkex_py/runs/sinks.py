"""Metric sinks: receivers of a run's numbers beside its folder, each called in its own thread."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from tinkex_py import telemetry
from tinkex_py.errors import ConfigError
from tinkex_py.runs.records import RunInfo, RunStatus
from tinkex_py.threads import FileThread

Call = Callable[[], None]


@runtime_checkable
class MetricSink(Protocol):
    """Receives the numbers of one run. It is called in a thread, so it may block.

    An exception does not interrupt the training: the sink is not called again, and one warning event reports it.
    """

    def start(self, run: RunInfo) -> None:
        """The run starts or resumes; called once, before anything else."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one optimizer step, under the names of `tinkex_py.runs.scalars`."""
        ...

    def finish(self, status: RunStatus) -> None:
        """The run ended; nothing is logged after this."""
        ...


class Sinks:
    """The sinks of one run. Calls are queued and made in order; a call that raises ends its sink.

    Use it with `async with`; leaving it waits until all calls are made.

    Args:
        sinks: receivers of the numbers.

    Raises:
        ConfigError: one of them is not a sink.
    """

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        for sink in sinks:
            if not isinstance(sink, MetricSink):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigError(f"sinks: a {type(sink).__name__} has no start, log and finish")
        self._queues = [_SinkQueue(sink) for sink in sinks]

    def start(self, run: RunInfo) -> None:
        """The run starts or resumes."""
        for queue in self._queues:
            queue.put(lambda sink=queue.sink: sink.start(run))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one optimizer step."""
        for queue in self._queues:
            queue.put(lambda sink=queue.sink: sink.log(step, metrics))

    def finish(self, status: RunStatus, *, discard_waiting: bool = False) -> None:
        """The run ended.

        Args:
            status: how it ended.
            discard_waiting: drop the calls that still wait.
        """
        for queue in self._queues:
            if discard_waiting:
                queue.discard()
            queue.put(lambda sink=queue.sink: sink.finish(status))

    async def __aenter__(self) -> "Sinks":
        for queue in self._queues:
            queue.open()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await asyncio.gather(*(queue.aclose() for queue in self._queues), return_exceptions=True)


class _SinkQueue:
    """The calls that wait for one sink."""

    def __init__(self, sink: MetricSink) -> None:
        self.sink = sink
        self._calls: asyncio.Queue[Call | None] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    def put(self, call: Call) -> None:
        self._calls.put_nowait(call)

    def discard(self) -> None:
        while not self._calls.empty():
            self._calls.get_nowait()

    def open(self) -> None:
        self._worker = asyncio.create_task(self._work(), name="tinkex.sink")

    async def aclose(self) -> None:
        """Waits for the calls; a cancelled caller waits only for the one that runs."""
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
                except Exception as error:  # noqa: BLE001  (an exception of a sink must not interrupt the training)
                    name, reason = type(self.sink).__name__, type(error).__name__
                    telemetry.emit("tinkex.run.sink_failed", {}, {"sink": name, "reason": reason}, error)
                    return
