"""Reads the runs that a report is about."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinkex_py.errors import ConfigError
from tinkex_py.runs.curves import Curves
from tinkex_py.runs.folder import read_run, read_steps
from tinkex_py.runs.records import RunInfo, StepRecord, scalars


@dataclass(frozen=True)
class LoadedRun:
    """One run.

    Attributes:
        label: what it is called in the report; unique there.
        folder: where it lies.
        info: its `run.json`.
        curves: its numbers.
        first: the first step; None if it made none.
        last: the last step; None if it made none.
        step_seconds: of all steps.
        tokens: of all steps.
    """

    label: str
    folder: Path
    info: RunInfo
    curves: Curves
    first: StepRecord | None
    last: StepRecord | None
    step_seconds: float
    tokens: int


def load_runs(folders: Sequence[Path | str]) -> list[LoadedRun]:
    """Reads the runs; one that is named twice is read once.

    Raises:
        ConfigError: there is none, or a folder is no run or cannot be read, naming it.
    """
    places = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not places:
        raise ConfigError("name at least one run's folder")
    for place in places:
        try:
            str(place).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{str(place)!r} is no text in UTF-8: rename the folder") from error
    return [_load(place, label) for place, label in zip(places, _labels(places), strict=True)]


def _load(folder: Path, label: str) -> LoadedRun:
    info, steps, curves = read_run(folder), read_steps(folder), Curves()
    for step in steps:
        curves.add(step.step, scalars(step))
    return LoadedRun(
        label=label,
        folder=folder,
        info=info,
        curves=curves,
        first=steps[0] if steps else None,
        last=steps[-1] if steps else None,
        step_seconds=sum(step.seconds for step in steps),
        tokens=sum(step.tokens for step in steps),
    )


def _labels(places: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as it takes to tell them apart."""
    longest = max(len(place.parts) for place in places)
    for count in range(1, longest + 1):
        labels = ["/".join(place.parts[-count:]) for place in places]
        if len(set(labels)) == len(labels):
            return labels
    return [str(place) for place in places]
