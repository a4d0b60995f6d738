"""trackio."""

import contextvars
from collections.abc import Mapping
from typing import Any

from tinkex_py.integrations.extras import imported
from tinkex_py.integrations.trackers.identity import run_key, started
from tinkex_py.runs.records import RunInfo, RunStatus


class TrackioSink:
    """Logs to a trackio run, on this machine unless trackio is told otherwise.

    The trackio run is called by the run's name and a few characters of its start, because trackio knows runs by their
    names only: a run that goes on continues the same one, and steps that are made again appear twice. The run that
    the program itself may have open in trackio stays open.

    Args:
        project: trackio project.
        options: further arguments of `trackio.init`, such as `group` or `space_id`; they win.

    Raises:
        MissingExtra: `trackio` is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        self._trackio = imported("trackio", "trackio")
        self._options = {"project": project, **options}
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Starts or resumes the trackio run, with the run's settings as its config."""
        told = {"model": run.model, "seed": run.seed, "total_steps": run.total_steps, "versions": run.versions}
        given = {
            "name": run_key(run),
            "resume": "allow",
            "embed": False,
            "auto_log_gpu": False,
            "auto_log_cpu": False,
            "config": {**told, **run.config},
            **self._options,
        }
        # `init` ends the run that it finds in its context, so it gets an empty one.
        self._run = contextvars.Context().run(lambda: self._trackio.init(**given))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues the values; trackio's own thread writes them."""
        started(self._run, self).log(dict(metrics), step=step)

    def finish(self, status: RunStatus) -> None:  # noqa: ARG002  (trackio knows no status)
        """Waits until trackio has written everything."""
        run, self._run = started(self._run, self), None
        run.finish()
