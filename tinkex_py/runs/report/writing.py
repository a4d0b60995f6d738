"""Writes a report."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from tinkex_py.errors import ConfigError
from tinkex_py.runs.pictures import PICTURES, drawings
from tinkex_py.runs.records import flattened
from tinkex_py.runs.report.drawing import picture_of
from tinkex_py.runs.report.loading import load_runs
from tinkex_py.runs.report.page import page_of
from tinkex_py.runs.report.summary import RunSummary, differing_settings, summary_of

PAGE_FILE = "index.html"


class Report(BaseModel):
    """What was written.

    Attributes:
        page: the HTML page, which holds the pictures too.
        pictures: key of the picture -> its PNG; none of a picture that no run has anything for.
        runs: in the order in which they were named.
        differing_settings: setting -> run -> value, where the runs are not the same.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    page: Path
    pictures: dict[str, Path]
    runs: list[RunSummary]
    differing_settings: dict[str, dict[str, JsonValue]]


def write_report(folders: Sequence[Path | str], out: Path | str) -> Report:
    """Draws runs into a folder, which is made; files of an earlier report there are replaced.

    Args:
        folders: of one or several runs, each with its `run.json`.
        out: where the page and the pictures go.

    Raises:
        ConfigError: a folder is no run, or cannot be read or written; nothing is written then.
    """
    runs = load_runs(folders)
    summaries = [summary_of(run) for run in runs]
    differing = differing_settings(runs) if len(runs) > 1 else {}
    curves = {run.label: run.curves for run in runs}
    laid_out = drawings({label: own.names for label, own in curves.items()})
    pictures = {drawing.picture.key: picture_of(drawing, curves) for drawing in laid_out if drawing.charts}
    if len(runs) > 1:
        settings = differing
    else:
        settings = {name: {runs[0].label: value} for name, value in flattened(runs[0].info.config).items()}
    page = page_of(summaries, settings, laid_out, pictures)
    files = {f"{key}.png": content for key, content in pictures.items()} | {PAGE_FILE: page.encode()}
    _write(Path(out), files)
    return Report(
        page=Path(out) / PAGE_FILE,
        pictures={key: Path(out) / f"{key}.png" for key in pictures},
        runs=summaries,
        differing_settings=differing,
    )


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Every file appears whole; a picture that an earlier report had and this one has not is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            draft = folder / f".{name}.draft"
            draft.write_bytes(content)
            draft.replace(folder / name)
        for picture in PICTURES:
            if f"{picture.key}.png" not in files:
                (folder / f"{picture.key}.png").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {folder}: {error.strerror}") from error
