"""Regularizers in an unmodified program of the official SDK, against the embedded service over HTTP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.served import ENVIRONMENT, serving

PROGRAM = Path(__file__).with_name("recipe_program.py")


@pytest.mark.timeout(300)
def test_an_official_program_with_regularizers():
    with serving() as (_, address):
        program = subprocess.run(
            [sys.executable, str(PROGRAM), address],
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
