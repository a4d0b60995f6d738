"""What a run shows: lines, a bar or a table; and why it waits."""

import asyncio
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.client.recorder import after, answering
from tests.runs.support import run_info, run_to, step_record
from tinkex_py.runs import RunInfo, StepRecord, read_steps
from tinkex_py.runs.progress import NoProgress, ProgressBar, ProgressLines, ProgressView, chosen_view, notebook_bar
from tinkex_py.runs.rich_progress import RichProgress


def shown(view: ProgressView) -> None:
    """A short run."""
    view.start(run_info(total_steps=3), 1)
    view.doing("step 2")
    view.doing("waiting: the service is at capacity")
    view.step(step_record(2, loss=1.25, evaluation={"held_out": 0.5}))
    view.step(step_record(3, loss=1.0))
    view.finish(run_info(status="stopped", reason="stop was requested"))


def test_lines() -> None:
    stream = io.StringIO()
    shown(ProgressLines(stream))
    assert stream.getvalue().splitlines() == [
        "somewhere: resumed after step 1",
        "waiting: the service is at capacity",
        "step 2  loss 1.7500  base 1.2500  l2 5.0000 (weight 0.1)  held_out 0.5000  0.25 s",
        "step 3  loss 1.5000  base 1.0000  l2 5.0000 (weight 0.1)  0.25 s",
        "somewhere: stopped: stop was requested",
    ]


def test_a_bar_as_in_notebooks() -> None:
    stream = io.StringIO()

    def bar(**options: Any) -> Any:
        return notebook_bar()(file=stream, mininterval=0, ncols=160, **options)

    shown(ProgressBar(bar))
    assert "waiting: the service is at capacity" in stream.getvalue()
    last = stream.getvalue().rstrip().splitlines()[-1].rpartition("\r")[2]
    assert last.startswith("stopped: stop was requested: 100%")
    assert "3/3" in last
    assert "loss 1.5000  base 1.0000  l2 5.0000 (weight 0.1)" in last


def test_a_table_in_a_terminal() -> None:
    stream = io.StringIO()
    view = RichProgress(Console(file=stream, force_terminal=True, width=100))
    shown(view)
    text = stream.getvalue()
    table = text[text.rindex("terms of step 3") :]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert cells == [
        ["base loss", "1.0000", "", "1.0000", "1.2500", "-"],
        ["l2", "5.0000", "0.1", "0.5000", "0.5000", "-"],
        ["total", "", "", "1.5000", "1.7500", "-"],
    ]
    assert "stopped: stop was requested" in table
    assert "3/3" in table


def test_the_view_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(chosen_view(False), NoProgress)
    assert isinstance(chosen_view(True), ProgressLines)  # pytest's stderr is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(chosen_view(True), RichProgress)

    class ZMQInteractiveShell:
        """What Jupyter's shell is called."""

    class Interactive:
        get_ipython = ZMQInteractiveShell

    monkeypatch.setitem(sys.modules, "IPython", Interactive)
    assert isinstance(chosen_view(True), ProgressBar)


@pytest.mark.asyncio
async def test_a_wait_in_the_queue_is_shown_and_measured(bench: Any, tmp_path: Path) -> None:
    shown: list[str] = []
    waits = asyncio.Event()

    class View(NoProgress):
        def doing(self, text: str) -> None:
            shown.append(text)
            if text.startswith("waiting"):
                waits.set()

        def step(self, record: StepRecord) -> None:
            shown.append(f"made {record.step}")

        def finish(self, run: RunInfo) -> None:
            shown.append(run.status)

    full = {"queue_state": "paused_capacity", "queue_state_reason": "42 before you"}
    # create_model, checkpoint, then the forward pass of the first step.
    bench.recorder.faults["retrieve_future"] = [None, None, answering(408, full), after(waits)]
    await run_to(bench.service, tmp_path, steps=2, checkpoint_every=None, progress=View())
    assert shown.count("waiting: the service is at capacity (42 before you)") == 1
    assert shown[-1] == "finished"
    first, second = read_steps(tmp_path)
    assert 0 < first.queue_seconds < first.seconds
    assert second.queue_seconds == 0
