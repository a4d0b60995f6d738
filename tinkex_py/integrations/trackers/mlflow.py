"""MLflow."""

import json
import re
import time
from collections.abc import Mapping
from typing import Any, Final

from tinkex_py.integrations.extras import imported
from tinkex_py.integrations.trackers.identity import run_key, started
from tinkex_py.runs.records import RunInfo, RunStatus

_RUN_TAG: Final = "tinkex.run"
_STATUSES: Final[Mapping[RunStatus, str]] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}
_REMOTE: Final = ("http://", "https://", "databricks", "uc:", "file:")
_MOST_METRICS: Final = 1000  # of one batch, says MLflow
_LONGEST_KEY: Final = 250


class MlflowSink:
    """Logs to an MLflow run, in a database of this machine or on a tracking server.

    The run's settings become parameters. MLflow stores an infinity as the largest float, and names with characters
    other than letters, digits, `_`, `-`, `.`, `:`, `/` and spaces get `_` in their place. A run that goes on continues
    the same MLflow run, found by the tag `tinkex.run`; steps that are made again appear twice in its history.

    Args:
        experiment: name of the MLflow experiment, made if there is none.
        tracking_uri: such as `sqlite:///mlflow.db` or `http://...`; None is what MLflow is set to.

    Raises:
        MissingExtra: `mlflow` is not installed, or what it needs for a database.
    """

    def __init__(self, experiment: str, *, tracking_uri: str | None = None) -> None:
        self._mlflow = imported("mlflow", "mlflow")
        self._uri: str = tracking_uri or self._mlflow.get_tracking_uri()
        if not self._uri.startswith(_REMOTE):
            imported("sqlalchemy", "mlflow")
            imported("alembic", "mlflow")
        self.experiment = experiment
        self._client: Any = None
        self._run_id: str | None = None

    def start(self, run: RunInfo) -> None:
        """Finds or makes the experiment and the MLflow run."""
        self._client = self._mlflow.MlflowClient(self._uri)
        experiment = self._client.get_experiment_by_name(self.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(self.experiment)
        key = run_key(run)
        known = self._client.search_runs([experiment_id], filter_string=f"tags.`{_RUN_TAG}` = '{key}'", max_results=1)
        if known:
            self._run_id = known[0].info.run_id
            self._client.update_run(self._run_id, status=_STATUSES["running"])
        else:
            made = self._client.create_run(experiment_id, run_name=run.name, tags={_RUN_TAG: key})
            self._run_id = made.info.run_id
            for name, value in _parameters(run).items():
                self._client.log_param(self._run_id, allowed_key(name), value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs all values at once."""
        run_id, now = started(self._run_id, self), int(time.time() * 1000)
        logged = [self._mlflow.entities.Metric(allowed_key(name), value, now, step) for name, value in metrics.items()]
        for first in range(0, len(logged), _MOST_METRICS):
            self._client.log_batch(run_id, metrics=logged[first : first + _MOST_METRICS])

    def finish(self, status: RunStatus) -> None:
        """Ends the MLflow run as FINISHED, KILLED (stopped) or FAILED."""
        run_id, self._run_id = started(self._run_id, self), None
        self._client.set_terminated(run_id, status=_STATUSES[status])
        self._client = None


def allowed_key(name: str) -> str:
    """The name as MLflow lets a metric or parameter be called: it has to be a plain relative path."""
    safe = re.sub(r"[^\w\-.:/ ]", "_", name, flags=re.ASCII)
    parts = [part for part in safe.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:_LONGEST_KEY] or "_"


def _parameters(run: RunInfo) -> dict[str, str]:
    told = {"model": run.model, "seed": run.seed, "total_steps": run.total_steps}
    settings = {name: value for name, value in told.items() if value is not None} | run.config
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
