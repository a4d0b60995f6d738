"""The page of a report: one HTML file that needs nothing else, with everything of a run's own escaped."""

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import JsonValue

from tinkex_py.runs.pictures import BASE_LOSS, Drawing
from tinkex_py.runs.report.drawing import MOST_POINTS_UNSMOOTHED, colour_on_paper
from tinkex_py.runs.report.summary import RunSummary

TERM_COLUMNS = (
    ("value", "value"),
    ("weight", "weight"),
    ("contribution", "weight x value"),
    ("grad_norm", "gradient norm"),
    ("share_of_total", "share"),
    ("cosine_with_base", "cosine with base"),
    ("cosine_with_total", "cosine with total"),
)


def page_of(
    runs: Sequence[RunSummary],
    settings: Mapping[str, Mapping[str, JsonValue]],
    drawings: Sequence[Drawing],
    pictures: Mapping[str, bytes],
) -> str:
    """The whole page.

    Args:
        runs: in the order in which they were named.
        settings: setting -> run -> value, for the table.
        drawings: what is shown.
        pictures: key of the picture -> its PNG; none of a picture that no run has anything for.
    """
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "moment": moment, "duration": duration, "setting": setting}
    encoded = {key: base64.b64encode(content).decode() for key, content in pictures.items()}
    colours = {run.label: colour_on_paper(place % 7) for place, run in enumerate(runs)} if len(runs) > 1 else {}
    return environment.get_template("page.html").render(
        runs=runs,
        colours=colours,
        settings=settings,
        drawings=drawings,
        pictures=encoded,
        terms={run.label: terms_of(run.last) for run in runs},
        evaluations=sorted({name for run in runs for name in run.last if name.startswith("evaluation/")}),
        term_columns=TERM_COLUMNS,
        is_smoothed=any(run.steps > MOST_POINTS_UNSMOOTHED for run in runs),
    )


def terms_of(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The numbers of one step by term, the base loss first."""
    terms: dict[str, dict[str, float]] = {"base loss": {}}
    for name, value in numbers.items():
        if name.startswith("term/"):
            term, _, measure = name.removeprefix("term/").rpartition("/")
            terms.setdefault("base loss" if term == BASE_LOSS else term, {})[measure] = value
    for measure, name in (("value", "loss/base"), ("contribution", "loss/base"), ("grad_norm", "grad_norm/base_loss")):
        if name in numbers:
            terms["base loss"][measure] = numbers[name]
    return terms if numbers else {}


def number(value: float | None) -> str:
    """Five significant digits."""
    return "-" if value is None else f"{value:.5g}"


def moment(seconds: float | None) -> str:
    """A time of day in local time."""
    if seconds is None:
        return "-"
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):  # a clock that was wrong
        return str(seconds)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they matter."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def setting(value: JsonValue) -> str:
    """A setting as JSON, texts without their quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
