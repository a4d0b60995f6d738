"""`tinkex-py report`: runs as one self-contained HTML page, and its charts as PNG files."""

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, JsonValue

from tinkex_py.errors import ConfigError
from tinkex_py.runs.charts import CHARTS, NARROW, PALETTE, WIDE, RunCurves, draw
from tinkex_py.runs.folder import read_run, read_steps
from tinkex_py.runs.records import RunStatus, flattened, scalars

PAGE_FILE = "index.html"


class RunSummary(BaseModel):
    """A run in a few numbers.

    Attributes:
        label: its name in the report.
        folder: its files.
        model: name of the base model; None if the service did not report it.
        status: of `run.json`; a process that was killed leaves "running".
        reason: why it stopped or failed; None otherwise.
        steps: optimizer steps made.
        total_steps: planned optimizer steps; None if the run ends with its data.
        started_at: in seconds since the epoch.
        last_step_at: end of the last step, in seconds since the epoch; None if no step was made.
        step_seconds: time in steps, in seconds, without pauses.
        tokens: of all steps.
        first: numbers of the first step, under the names of `tinkex_py.runs.scalars`.
        last: numbers of the last step.
        non_finite: name -> number of NaN or infinite values, which the charts omit.
        seed: of the run; None if unknown.
        versions: of Python, this package and torch.
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


class Report(BaseModel):
    """The files of a report.

    Attributes:
        page: the HTML page, which contains the charts.
        charts: key of the chart -> its PNG; none of a chart that no run has data for.
        runs: in the order of the folders.
        differing_settings: setting -> run -> value, where the runs differ.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    page: Path
    charts: dict[str, Path]
    runs: list[RunSummary]
    differing_settings: dict[str, dict[str, JsonValue]]


def write_report(folders: Sequence[Path | str], out: Path | str) -> Report:
    """Draws runs into a folder, which is created; files of an earlier report are replaced.

    Args:
        folders: of one or several runs, each with its `run.json`.
        out: folder of the page and the charts.

    Raises:
        ConfigError: a folder is not a run, or cannot be read or written; nothing is written then.
    """
    loaded, out = _load(folders), Path(out)
    runs = [summary for summary, _, _ in loaded]
    curves = {summary.label: own for summary, own, _ in loaded}
    settings = _by_setting({summary.label: own for summary, _, own in loaded})
    # repr, because 1, 1.0 and True differ.
    differing = {
        name: values
        for name, values in settings.items()
        if len(values) < len(runs) or len(set(map(repr, values.values()))) > 1
    }
    wide = {key: image for key, chart in CHARTS.items() if (image := draw(chart, curves, WIDE)) is not None}
    narrow = {key: image for key in wide if (image := draw(CHARTS[key], curves, NARROW)) is not None}
    page = page_of(runs, differing if len(runs) > 1 else settings, wide, narrow)
    _write(out, {f"{key}.png": content for key, content in wide.items()} | {PAGE_FILE: page.encode()})
    charts = {key: out / f"{key}.png" for key in wide}
    return Report(page=out / PAGE_FILE, charts=charts, runs=runs, differing_settings=differing)


def _load(folders: Sequence[Path | str]) -> list[tuple[RunSummary, RunCurves, dict[str, JsonValue]]]:
    """Summary, numbers and settings of each run; a folder that is named twice is read once."""
    places = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not places:
        raise ConfigError("name at least one folder of a run")
    for place in places:
        try:
            str(place).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"the name of {str(place)!r} is not UTF-8 text: rename the folder") from error
    depth = 1  # of the label: as many parents as distinguish the folders
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return [_load_one(place, "/".join(place.parts[-depth:])) for place in places]


def _load_one(folder: Path, label: str) -> tuple[RunSummary, RunCurves, dict[str, JsonValue]]:
    info, records = read_run(folder), read_steps(folder)
    rows = [scalars(record) for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    finite = {name: np.where(np.isfinite(one), one, np.nan) for name, one in values.items()}
    summary = RunSummary(
        label=label,
        folder=folder,
        steps=len(records),
        last_step_at=records[-1].finished_at if records else None,
        step_seconds=sum(record.seconds for record in records),
        tokens=sum(record.tokens for record in records),
        first=rows[0] if rows else {},
        last=rows[-1] if rows else {},
        non_finite=Counter(name for row in rows for name, value in row.items() if not math.isfinite(value)),
        **info.model_dump(include={"model", "status", "reason", "total_steps", "started_at", "seed", "versions"}),
    )
    return summary, RunCurves(np.array([float(record.step) for record in records]), finite), flattened(info.config)


def _by_setting(runs: Mapping[str, Mapping[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
    """Setting -> run -> value. A run without the setting is omitted."""
    names = dict.fromkeys(name for own in runs.values() for name in own)
    return {name: {label: own[name] for label, own in runs.items() if name in own} for name in names}


def page_of(
    runs: Sequence[RunSummary],
    settings: Mapping[str, Mapping[str, JsonValue]],
    wide: Mapping[str, bytes],
    narrow: Mapping[str, bytes],
) -> str:
    """The HTML page; everything from a run is escaped.

    Args:
        runs: in order.
        settings: setting -> run -> value, for the table.
        wide: key of the chart -> PNG for wide screens; none of a chart without data.
        narrow: the same for phones.
    """
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": moment, "duration": duration, "setting": setting, "png": _data_url}
    return environment.get_template("report.html").render(
        runs=runs,
        palette=PALETTE,
        settings=settings,
        charts=CHARTS,
        wide=wide,
        narrow=narrow,
        terms={run.label: terms_of(run.last) for run in runs},
        evaluations=sorted({name for run in runs for name in run.last if name.startswith("evaluation/")}),
    )


def terms_of(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The numbers of one step by term, the base loss first."""
    terms: dict[str, dict[str, float]] = {"base_loss": {}}
    for name, value in numbers.items():
        if name.startswith("term/"):
            term, _, measure = name.removeprefix("term/").rpartition("/")
            terms.setdefault(term, {})[measure] = value
    for measure, name in (("value", "loss/base"), ("contribution", "loss/base"), ("grad_norm", "grad_norm/base_loss")):
        if name in numbers:
            terms["base_loss"][measure] = numbers[name]
    return terms if numbers else {}


def moment(seconds: float | None) -> str:
    """A point in local time."""
    if seconds is None:
        return "-"
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):  # a wrong clock
        return str(seconds)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def setting(value: JsonValue) -> str:
    """A setting as JSON, texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Each file is replaced atomically; a chart of an earlier report that has no successor is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            draft = folder / f".{name}.draft"
            draft.write_bytes(content)
            draft.replace(folder / name)
        for key in CHARTS:
            if f"{key}.png" not in files:
                (folder / f"{key}.png").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {folder}: {error.strerror}") from error
