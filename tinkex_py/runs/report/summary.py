"""What a report says in words and numbers; `tinkex-py report --json` prints it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from tinkex_py.runs.records import RunStatus, StepRecord, flattened, scalars
from tinkex_py.runs.report.loading import LoadedRun


class RunSummary(BaseModel):
    """One run in a few numbers.

    Attributes:
        label: what the report calls it.
        folder: where it lies.
        model: name of the base model; None if the service did not tell it.
        status: as `run.json` has it; a process that was killed could not change "running".
        reason: why it stopped or failed; None otherwise.
        steps: optimizer steps made.
        total_steps: how many there are to be; None if only the data tells.
        started_at: in seconds since the epoch.
        last_step_at: when the last step ended, in seconds since the epoch; None if no step was made.
        step_seconds: time in steps, in seconds; pauses are not in it.
        tokens: of all steps.
        first: numbers of the first step, under the names of `tinkex_py.runs.records.scalars`.
        last: numbers of the last step.
        non_finite: name -> how many NaN or infinite values the pictures leave out.
        seed: of the run.
        versions: of Python, this package and what computes.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    label: str
    folder: Path
    model: str | None
    status: RunStatus
    reason: str | None
    steps: int
    total_steps: int | None
    started_at: float
    last_step_at: float | None
    step_seconds: float
    tokens: int
    first: dict[str, float]
    last: dict[str, float]
    non_finite: dict[str, int]
    seed: int | None
    versions: dict[str, str]


def summary_of(run: LoadedRun) -> RunSummary:
    """The run in a few numbers."""
    return RunSummary(
        label=run.label,
        folder=run.folder,
        model=run.info.model,
        status=run.info.status,
        reason=run.info.reason,
        steps=run.curves.steps_made,
        total_steps=run.info.total_steps,
        started_at=run.info.started_at,
        last_step_at=None if run.last is None else run.last.finished_at,
        step_seconds=run.step_seconds,
        tokens=run.tokens,
        first=_numbers(run.first),
        last=_numbers(run.last),
        non_finite=run.curves.non_finite,
        seed=run.info.seed,
        versions=run.info.versions,
    )


def differing_settings(runs: Sequence[LoadedRun]) -> dict[str, dict[str, JsonValue]]:
    """Settings that are not the same in all runs: setting -> run -> value. A run without the setting is left out."""
    by_run = {run.label: flattened(run.info.config) for run in runs}
    names = dict.fromkeys(name for settings in by_run.values() for name in settings)
    table = {name: {label: settings[name] for label, settings in by_run.items() if name in settings} for name in names}
    return {name: values for name, values in table.items() if len(values) < len(runs) or _differ(values.values())}


def _differ(values: Iterable[JsonValue]) -> bool:
    return len(set(map(repr, values))) > 1  # 1, 1.0 and True are not the same setting


def _numbers(step: StepRecord | None) -> dict[str, float]:
    return {} if step is None else scalars(step)
