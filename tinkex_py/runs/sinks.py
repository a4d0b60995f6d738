"""Metric sinks: receivers of a run's numbers beside its folder, each called in its own thread."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from tinkex_py import telemetry
from tinkex_py.errors import ConfigError
from tinkex_py.runs.records import RunInfo, RunStatus
from tinkex_py.threads import FileThread


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


Call = Callable[[MetricSink], None]
Queue = asyncio.Queue[Call | None]


class Sinks:
    """The sinks of one run. Calls are queued and made in order; a sink that raises gets no further calls.

    Use it with `async with`; leaving it waits until all calls are made. A cancelled caller waits only for those that
    run.

    Raises:
        ConfigError: a value is not a sink.
    """

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        if not isinstance(sinks, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"sinks must be a list of metric sinks, got a {type(sinks).__name__}")
        for sink in sinks:
            if isinstance(sink, type) or not isinstance(sink, MetricSink):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigError(f"sinks: {type(sink).__name__} needs the methods start, log and finish of MetricSink")
        self._queues: list[tuple[MetricSink, Queue]] = [(sink, Queue()) for sink in sinks]
        self._workers: list[asyncio.Task[None]] = []

    def send(self, call: Call, *, discard_waiting: bool = False) -> None:
        """Queues a call of every sink, if requested instead of the calls that still wait."""
        for _, queue in self._queues:
            while discard_waiting and not queue.empty():
                queue.get_nowait()
            queue.put_nowait(call)

    async def __aenter__(self) -> "Sinks":
        self._workers = [asyncio.create_task(_work(*queue), name="tinkex.sink") for queue in self._queues]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for _, queue in self._queues:
            queue.put_nowait(None)
        await asyncio.gather(*self._workers, return_exceptions=True)


async def _work(sink: MetricSink, calls: Queue) -> None:
    async with FileThread("tinkex-sink") as thread:
        while (call := await calls.get()) is not None:
            try:
                await thread.run(lambda call=call: call(sink))
            except Exception as error:  # noqa: BLE001  (an exception of a sink must not interrupt the training)
                metadata = {"sink": type(sink).__name__, "reason": type(error).__name__}
                telemetry.emit("tinkex.run.sink_failed", {}, metadata, error)
                return
