"""Weights & Biases."""

from collections.abc import Mapping
from typing import Any

from tinkex_py.integrations.extras import imported
from tinkex_py.integrations.trackers.identity import run_key, started
from tinkex_py.runs.records import RunInfo, RunStatus


class WandbSink:
    """Logs to a W&B run of its own, beside whatever run the process has.

    The number of the optimizer step is logged as `step`, and is the x axis of every chart: a run that goes on from an
    earlier step then logs that step again, which W&B's own step counter would refuse. The W&B run has an id made of
    the run's name and start, so that a run that goes on continues the same one.

    Args:
        project: W&B project.
        options: further arguments of `wandb.init`, such as `entity`, `mode="offline"` or `dir`; they win.

    Raises:
        MissingExtra: `wandb` is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        self._wandb = imported("wandb", "wandb")
        self._options = {"project": project, **options}
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Starts or resumes the W&B run, with the run's settings as its config."""
        told = {"model": run.model, "seed": run.seed, "total_steps": run.total_steps, "versions": run.versions}
        given = {
            "id": run_key(run),
            "name": run.name,
            "resume": "allow",
            "reinit": "create_new",
            "config": {**told, **run.config},
            **self._options,
        }
        self._run = self._wandb.init(**given)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one row."""
        started(self._run, self).log({"step": step, **metrics})

    def finish(self, status: RunStatus) -> None:
        """Ends the W&B run; it is marked as failed if this run failed."""
        run, self._run = started(self._run, self), None
        run.finish(exit_code=int(status == "failed"))
