"""How things look in a notebook: right numbers, nothing that becomes HTML, and no torch for it."""

import functools
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.runs.made_up_runs import BOUND, TERMS, base_loss, contribution, made_up_step, weight
from tests.runs.support import run_info
from tinkex_py import Pipeline, RegularizerSpec, controllers, per_datum, schedules
from tinkex_py.html_table import html_table
from tinkex_py.regularizers import L1
from tinkex_py.runs.loop import TrainedRun

EVIL = "<script>alert('&x')</script>"
TAGS = {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}


class Tables(HTMLParser):
    """The rows, by first cell."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.tags: set[str] = set()
        self.text = ""
        self._row: list[str] = []
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in_cell = tag in ("td", "th")
        if tag == "tr":
            self._row = []
        if self._in_cell:
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False
        if tag == "tr":
            self.rows[self._row[0]] = self._row[1:]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self._row[-1] += data


def nothing(data, logprobs, **options):
    return logprobs.sum() * 0


def test_an_output():
    tables = Tables(made_up_step(4).losses[0]._repr_html_())
    assert list(tables.rows) == ["term", "base loss", *TERMS, "total"]
    column = tables.rows["term"].index
    assert tables.rows["base loss"][column("value")] == f"{base_loss(4):.5g}"
    for place, term in enumerate(TERMS):
        row = tables.rows[term]
        assert row[column("weight")] == f"{weight(place, 4):.5g}"
        assert row[column("weight x value")] == f"{contribution(place, 4):.5g}"
        assert row[column("cosine with base")] == f"{math.cos(4 / 30 + place + 1):.5g}"
    total = base_loss(4) + sum(contribution(place, 4) for place in range(3))
    assert tables.rows["total"][column("weight x value")] == f"{total:.5g}"
    without = Tables(made_up_step(4, norms=False).losses[0]._repr_html_())
    assert without.rows["term"] == ["value", "weight", "weight x value", "bound", "violation", "feasible"]
    assert without.rows["kl_to_base"][3] == f"<= {BOUND:g}"


def test_a_spec_and_a_pipeline():
    controller = controllers.TargetGradientRatio(ratio=0.2)
    specs = [
        RegularizerSpec(fn=L1(), weight=0.25, timeout=math.inf, on_error="skip"),
        RegularizerSpec(fn=per_datum(nothing), weight=schedules.Constant(0.5), name="scheduled", timeout=2.5),
        RegularizerSpec(fn=functools.partial(nothing, a=1), weight=controller, name="led"),
        RegularizerSpec(fn=SimpleNamespace(compute=nothing, name="object"), weight=1, enabled=False, options={"b": 2}),
    ]
    facts = Tables(specs[0]._repr_html_()).rows
    assert facts["weight"] == ["0.25"]
    assert facts["timeout"] == ["no limit"]
    assert facts["on error"] == ["skip"]
    assert facts["fn"][0].startswith("L1(")
    assert "enabled" not in facts
    tables = Tables(Pipeline(nothing, specs, timeout=7.0)._repr_html_())
    assert list(tables.rows) == ["term", "base loss", "l1_sparsity", "scheduled", "led", "object"]
    fn = tables.rows["term"].index("fn")
    told = [tables.rows[name][fn] for name in ("base loss", "scheduled", "led", "object")]
    assert told == ["nothing", "per_datum(nothing)", "partial(nothing)", "SimpleNamespace"]
    column = tables.rows["term"].index("weight")
    assert tables.rows["scheduled"][column] == "Constant(value=0.5)"
    assert tables.rows["led"][column].startswith("TargetGradientRatio, now ")
    assert "timeout=7.0" in tables.text
    assert list(Tables(Pipeline(nothing)._repr_html_()).rows) == ["term", "base loss"]


def test_showing_a_pipeline_does_not_start_its_controllers():
    controller = controllers.TargetGradientRatio(ratio=0.2)
    pipeline = Pipeline(nothing, [RegularizerSpec(fn=nothing, weight=controller, name="a")])
    pipeline._repr_html_()
    assert controller.weights == {}


def test_a_run():
    info = run_info(name="mine", status="failed", reason="broke", config={"optimizer": {"lr": 0.5}}, seed=3)
    rows = Tables(info._repr_html_()).rows
    assert rows["status"] == ["failed"]
    assert rows["reason"] == ["broke"]
    assert rows["optimizer.lr"] == ["0.5"]
    assert rows["seed"] == ["3"]
    for last, steps in ((None, "0"), (made_up_step(2), "2")):
        run = TrainedRun(info, Path("runs/mine"), last, "tinker://somewhere", SimpleNamespace())
        rows = Tables(run._repr_html_()).rows
        assert rows["steps"] == [steps]
        assert rows["checkpoint"] == ["tinker://somewhere"]
        assert ("total" in rows) == (last is not None)


def test_nothing_becomes_html():
    output = made_up_step(1, [EVIL]).losses[0].model_copy(update={"skipped": {EVIL: EVIL}})
    spec = RegularizerSpec(fn=nothing, weight=1.0, name=EVIL, options={"a": EVIL})
    info = run_info(name=EVIL, status="failed", reason=EVIL, model=EVIL, config={EVIL: {EVIL: [EVIL]}})
    run = TrainedRun(info, Path(EVIL), None, EVIL, SimpleNamespace())
    for thing in (output, spec, Pipeline(nothing, [spec]), info, run):
        tables = Tables(thing._repr_html_())
        assert tables.tags <= TAGS
        assert EVIL in tables.text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (1.23456789, "1.2346"), (math.nan, "nan"), (-math.inf, "-inf"), (True, "True"), (3, "3"), ("a", "a")],
)
def test_cells(value: object, text: str):
    assert Tables(html_table("", ("a", "b"), [("row", value), ("other", 0)])).rows["row"] == [text]


def test_long_values_are_cut():
    shown = Tables(html_table("", ("a", "b"), [("row", torch.arange(100_000))])).rows["row"][0]
    assert len(shown) < 200


def test_an_output_is_shown_without_torch():
    program = (
        "import sys\n"
        "from tinkex_py.losses.output import CustomLossOutput\n"
        "from tinkex_py.runs.records import RunInfo\n"
        f"shown = CustomLossOutput.model_validate_json({made_up_step(1).losses[0].model_dump_json()!r})._repr_html_()\n"
        "shown += RunInfo(name='a', started_at=1, updated_at=1)._repr_html_()\n"
        "print('torch' in sys.modules, 'kl_to_base' in shown)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
