"""Where the numbers of a run go beside its folder: experiment trackers and the like."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from tinkex_py.runs.records import RunInfo, RunStatus


@runtime_checkable
class MetricSink(Protocol):
    """Receives the numbers of one run. A sink that blocks is called in a thread, never on the event loop.

    A sink that raises never breaks training: it is left out from then on, with one warning event.
    """

    def start(self, run: RunInfo) -> None:
        """The run starts, or goes on; called once before anything else."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one optimizer step, under the names of `tinkex_py.runs.records.scalars`."""
        ...

    def finish(self, status: RunStatus) -> None:
        """The run is over; nothing is logged after this."""
        ...
