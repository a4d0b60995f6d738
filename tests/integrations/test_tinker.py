"""Regularizers in an unmodified program of the official SDK, against the embedded service over HTTP."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import ENVIRONMENT, serving
from tinkex_py.runs.report import write_report

PROGRAM = Path(__file__).with_name("recipe_program.py")


@pytest.mark.timeout(300)
def test_an_official_program_with_regularizers(tmp_path: Path):
    with serving() as (_, address):
        program = subprocess.run(
            [sys.executable, str(PROGRAM), address, str(tmp_path / "runs")],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=240,
            check=False,
        )
    assert program.returncode == 0, program.stderr
    seen = json.loads(program.stdout.splitlines()[-1])
    assert seen["nothing"] <= 1e-6
    same = {name: seen[name] for name in seen if name.startswith("here: ")}
    assert len(same) == 5
    assert max(same.values()) <= 1e-5, same
    assert seen["moved by l2"] > 1e-2
    assert seen["l2 of our own client"] <= 1e-5
    assert seen["one client"] <= 1e-5
    assert seen["weight"] == [0.1, 0.1, 0.1]
    assert seen["schedule"] == pytest.approx([0.0, 0.1, 0.2])
    # AdaptiveKL: the value is far above the target, so the error is clipped to 0.2 and the weight grows by it.
    grown = seen["controller"][1] / seen["controller"][0]
    assert grown > 1
    assert [*seen["controller"], seen["controller at the end"]] == pytest.approx([0.1 * grown**n for n in range(4)])
    assert seen["refused"]
    assert seen["undone"]
    check_record(seen["record"])
    report = write_report([tmp_path / "runs" / "whole", tmp_path / "runs" / "plain"], tmp_path / "report")
    assert [(run.outcome, run.steps) for run in report.runs] == [("finished", 3), ("finished", 3)]
    assert {"losses", "contributions", "weights"} <= report.charts.keys()


def check_record(seen: dict[str, Any]):
    for own, official in (seen["loss/total"], seen["loss/base"], seen["term/l2/weight"]):
        assert own == pytest.approx(official, abs=1e-9)
    assert seen["term/l2/weight"][0] == pytest.approx([0.0, 0.1, 0.2])
    assert seen["learning rates"] == [1e-2] * 3
    assert seen["sizes"] == [[2, 14]] * 3  # 11 and 3 positions
    assert min(seen["norms"], seen["times"]) > 0
    assert seen["same weights"] <= 1e-5
    assert seen["status"] == {
        "cancelled": ["stopped: interrupted: CancelledError", "tiny", [1, 2, 3]],
        "failed": ["finished", "tiny", [1, 2, 3, 4, 5]],
        "failed-2": ["finished", "tiny", [3, 4, 5]],
        "plain": ["finished", "tiny", [1, 2, 3]],
        "whole": ["finished", "tiny", [1, 2, 3]],
    }
    assert seen["outcome"] == "failed: BugInRecipe"  # without its text, which may be data
    assert seen["not written"] == [True, "finished: not all steps could be recorded", True]
    used, missing, no_folder = seen["refused"]
    assert used.startswith("FOLDER/whole holds a run of 3 steps")
    assert "behind step 4" in missing
    assert "cannot be used" in no_folder
