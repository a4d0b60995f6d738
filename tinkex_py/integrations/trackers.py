"""Metric sinks for files and experiment trackers.

Each is a `tinkex_py.runs.MetricSink`. Importing this module imports no tracker; creating a sink does.
"""

import contextvars
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from tinkex_py.arguments import check_choice, check_count, check_kind, check_path, check_text, shown
from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.integrations import imported
from tinkex_py.runs.records import RunInfo, RunStatus

__all__ = ["JsonlSink", "MlflowSink", "TensorBoardSink", "TrackioSink", "WandbSink"]

Opened = TypeVar("Opened")
_LONGEST_NAME: Final = 50
_MLFLOW_TAG: Final = "tinkex.run"
_MLFLOW_STATUSES: Final[Mapping[RunStatus, str]] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}
_MLFLOW_REMOTE: Final = ("http://", "https://", "databricks", "uc:", "file:")
_MLFLOW_BATCH: Final = 1000  # MLflow's limit for the metrics of one call
_MLFLOW_LONGEST_KEY: Final = 250


class JsonlSink:
    """Appends one JSON object per step: `{"run": ..., "step": 3, "loss/total": 0.25, ...}`.

    NaN and infinities are the strings "NaN", "Infinity" and "-Infinity", which `float` accepts. A resumed run replaces
    its own lines from the step on at which it resumes.

    Args:
        path: the file, which runs may share one after another. Its folder is created when a run starts.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = check_path("path", path)
        self._key: str | None = None
        self._may_repeat = False

    def start(self, run: RunInfo) -> None:
        """Creates the folder of the file.

        Raises:
            ConfigError: the folder cannot be created.
        """
        key = run_key(run)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written ({error.strerror}): pass another path") from error
        self._key = key
        self._may_repeat = self.path.exists()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line."""
        numbers = _checked_row(step, metrics)
        key = _started(self._key, self)
        if self._may_repeat:
            self._remove(key, step)
            self._may_repeat = False
        row = {"run": key, "step": int(step), **{name: _plain(value) for name, value in numbers.items()}}
        with self.path.open("ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def finish(self, status: RunStatus) -> None:
        """Ends the run; its lines are already written."""
        _check_status(status)
        self._key = None

    def _remove(self, key: str, first: int) -> None:
        """Removes the lines of this run from step `first` on, and an incomplete last line."""
        *lines, rest = self.path.read_bytes().split(b"\n")
        kept = [line for line in lines if not _is_from(json.loads(line), key, first)]
        if kept != lines or rest:
            draft = self.path.with_name(f".{self.path.name}.draft")
            draft.write_bytes(b"".join(line + b"\n" for line in kept))
            draft.replace(self.path)


class TensorBoardSink:
    """Writes event files with PyTorch's writer, for `tensorboard --logdir FOLDER`.

    TensorBoard stores values as float32, including NaN and infinities. It replaces characters other than letters,
    digits, `_`, `-`, `.` and `/` in names by `_`. A resumed run writes to the same folder and marks its earlier values
    from that step on as obsolete, so that TensorBoard shows one curve.

    Args:
        folder: folder of all runs; each run has a subfolder, named after the run and its start.

    Raises:
        MissingExtra: `tensorboard` is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        imported("tensorboard", "tensorboard")
        self._make_writer: Any = imported("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.folder = check_path("folder", folder)
        self._run: RunInfo | None = None
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        """Sets the run; its first step creates the folder."""
        self._run = check_kind("run", run, RunInfo)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the values and flushes them, so that an open TensorBoard shows them."""
        numbers = _checked_row(step, metrics)
        if self._writer is None:
            self._writer = self._open(_started(self._run, self), step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, status: RunStatus) -> None:
        """Closes the event file."""
        _check_status(status)
        if self._writer is not None:
            self._writer.close()
        self._writer = self._run = None

    def _open(self, run: RunInfo, step: int) -> Any:
        folder = self.folder / run_key(run)
        resumed = any(folder.glob("events.out.tfevents.*"))
        writer = self._make_writer(str(folder), purge_step=step if resumed else None)
        if not resumed:
            writer.add_text("run", f"```\n{run.model_dump_json(indent=2)}\n```", 0)
        return writer


class WandbSink:
    """Logs to its own W&B run, next to one that the process may have.

    The number of the optimizer step is logged as `step` and is the x axis of every chart, because W&B's own step
    counter rejects the steps that a resumed run repeats. The id of the W&B run is made of the run's name and start, so
    that a resumed run continues the same W&B run.

    Args:
        project: W&B project.
        options: further arguments of `wandb.init`, such as `entity`, `mode="offline"` or `dir`; they take precedence.

    Raises:
        MissingExtra: `wandb` is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        self._wandb = imported("wandb", "wandb")
        self._options = {"project": check_text("project", project), **options}
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Starts or resumes the W&B run, with the settings of the run as its config."""
        given = {
            "id": run_key(run),
            "name": run.name,
            "resume": "allow",
            "reinit": "create_new",
            "config": _config(run),
            **self._options,
        }
        self._run = self._wandb.init(**given)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one row."""
        numbers = _checked_row(step, metrics)
        _started(self._run, self).log({"step": step, **numbers})

    def finish(self, status: RunStatus) -> None:
        """Ends the W&B run and marks it as failed if the run failed."""
        _check_status(status)
        run, self._run = _started(self._run, self), None
        run.finish(exit_code=int(status == "failed"))


class TrackioSink:
    """Logs to a trackio run, on this machine unless trackio is configured otherwise.

    The name of the trackio run is made of the run's name and start, because trackio identifies runs by name: a resumed
    run continues the same trackio run, and steps that it repeats appear twice. A trackio run of the program stays open.

    Args:
        project: trackio project.
        options: further arguments of `trackio.init`, such as `group` or `space_id`; they take precedence.

    Raises:
        MissingExtra: `trackio` is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        self._trackio = imported("trackio", "trackio")
        self._options = {"project": check_text("project", project), **options}
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Starts or resumes the trackio run, with the settings of the run as its config."""
        given = {
            "name": run_key(run),
            "resume": "allow",
            "embed": False,
            "auto_log_gpu": False,
            "auto_log_cpu": False,
            "config": _config(run),
            **self._options,
        }
        # `init` ends the run that is current in its context, so it gets an empty one.
        self._run = contextvars.Context().run(lambda: self._trackio.init(**given))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues the values; a thread of trackio writes them."""
        numbers = _checked_row(step, metrics)
        _started(self._run, self).log(numbers, step=step)

    def finish(self, status: RunStatus) -> None:
        """Waits until trackio has written everything."""
        _check_status(status)
        run, self._run = _started(self._run, self), None
        run.finish()


class MlflowSink:
    """Logs to an MLflow run, in a database on this machine or on a tracking server.

    The settings of the run become parameters. MLflow stores an infinity as the largest float. Characters of names that
    it does not allow (other than letters, digits, `_`, `-`, `.`, `:`, `/` and spaces) are replaced by `_`. A resumed
    run continues the same MLflow run, found by the tag `tinkex.run`; steps that it repeats appear twice.

    Args:
        experiment: name of the MLflow experiment, created if it does not exist.
        tracking_uri: such as `sqlite:///mlflow.db` or `http://...`; None uses the setting of MLflow.

    Raises:
        MissingExtra: `mlflow`, or a package that it needs for a database, is not installed.
    """

    def __init__(self, experiment: str, *, tracking_uri: str | None = None) -> None:
        self._mlflow = imported("mlflow", "mlflow")
        if tracking_uri is not None:
            check_text("tracking_uri", tracking_uri)
        self._uri: str = tracking_uri or self._mlflow.get_tracking_uri()
        if not self._uri.startswith(_MLFLOW_REMOTE):
            imported("sqlalchemy", "mlflow")
            imported("alembic", "mlflow")
        self.experiment = check_text("experiment", experiment)
        self._client: Any = None
        self._run_id: str | None = None

    def start(self, run: RunInfo) -> None:
        """Finds or creates the experiment and the MLflow run."""
        self._client = self._mlflow.MlflowClient(self._uri)
        experiment = self._client.get_experiment_by_name(self.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(self.experiment)
        key = run_key(run)
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{_MLFLOW_TAG}` = '{key}'", max_results=1
        )
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status=_MLFLOW_STATUSES["running"])
            return
        created = self._client.create_run(experiment_id, run_name=run.name, tags={_MLFLOW_TAG: key})
        self._run_id = created.info.run_id
        for name, value in _parameters(run).items():
            self._client.log_param(self._run_id, mlflow_key(name), value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs all values, in batches."""
        numbers = _checked_row(step, metrics)
        run_id, now = _started(self._run_id, self), int(time.time() * 1000)
        logged = [self._mlflow.entities.Metric(mlflow_key(name), value, now, step) for name, value in numbers.items()]
        for first in range(0, len(logged), _MLFLOW_BATCH):
            self._client.log_batch(run_id, metrics=logged[first : first + _MLFLOW_BATCH])

    def finish(self, status: RunStatus) -> None:
        """Ends the MLflow run as FINISHED, KILLED (stopped) or FAILED."""
        _check_status(status)
        run_id, self._run_id = _started(self._run_id, self), None
        self._client.set_terminated(run_id, status=_MLFLOW_STATUSES[status])
        self._client = None


def run_key(run: RunInfo) -> str:
    """Returns an id that stays the same when the run resumes, and differs for a new run of the same name.

    It consists of letters, digits, `.`, `_` and `-`.
    """
    check_kind("run", run, RunInfo)
    digest = hashlib.sha256(f"{run.name}\0{run.started_at!r}".encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name).strip("-.")[:_LONGEST_NAME]
    return f"{readable or 'run'}-{digest[:8]}"


def mlflow_key(name: str) -> str:
    """Returns the name in the form that MLflow allows for metrics and parameters: a plain relative path."""
    safe = re.sub(r"[^\w\-.:/ ]", "_", name, flags=re.ASCII)
    parts = [part for part in safe.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:_MLFLOW_LONGEST_KEY] or "_"


def _checked_row(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    check_count("step", step, least=0)
    check_kind("metrics", metrics, Mapping)
    for name, value in metrics.items():
        if not isinstance(name, str) or not isinstance(value, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"metrics must map names to numbers, got {shown(name)}: {shown(value)}")
    return dict(metrics)


def _check_status(status: RunStatus) -> None:
    check_choice("status", status, _MLFLOW_STATUSES)


def _started(opened: Opened | None, sink: object) -> Opened:
    if opened is None:
        raise ConfigError(f"{type(sink).__name__} has no run: call start(run) before log and finish")
    return opened


def _config(run: RunInfo) -> dict[str, Any]:
    return {
        "model": run.model,
        "seed": run.seed,
        "total_steps": run.total_steps,
        "versions": run.versions,
        **run.config,
    }


def _parameters(run: RunInfo) -> dict[str, str]:
    known = {"model": run.model, "seed": run.seed, "total_steps": run.total_steps}
    settings = {name: value for name, value in known.items() if value is not None} | run.config
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}


def _plain(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _is_from(row: Mapping[str, Any], key: str, first: int) -> bool:
    return row["run"] == key and row["step"] >= first
