"""A process that is killed while it saves leaves the old checkpoint or the new one, never half of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import ENVIRONMENT

PROGRAM = Path(__file__).with_name("killed_saves_program.py")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


def outcomes(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(PROGRAM), str(folder), *arguments]
    root = str(Path(__file__).parents[2])
    environment = {**ENVIRONMENT, "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]]) -> None:
    for outcome in found:
        assert outcome["whole"], outcome
        assert outcome["folders"] == 1, f"something half-done stayed: {outcome}"
        assert outcome["generation"] >= outcome["before"], f"an older checkpoint came back: {outcome}"


def test_killed_before_every_line_of_a_save(tmp_path):
    found = outcomes(tmp_path)
    check(found)
    *killed, last = found
    assert all(outcome["killed"] for outcome in killed)
    assert not last["killed"]
    assert len(killed) > 60
    new = [outcome["generation"] - outcome["before"] for outcome in found]
    # From one line on, and not before it, the new one is there.
    assert set(new) == {0, 1}
    assert new == sorted(new)


def test_killed_at_random_moments(tmp_path):
    """Also inside of safetensors and SQLite, where no line of ours is."""
    found = outcomes(tmp_path, "20261124", "15")
    check(found)
    assert all(outcome["killed"] for outcome in found)
