"""The targets of `make fuzz`: their seeds are valid input, and a short run of the fuzzer finds nothing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, seeds
from tests.support.served import ENVIRONMENT

ROOT = Path(__file__).parents[2]


def test_every_target_accepts_its_seeds_whole_and_damaged():
    given = seeds()
    assert given.keys() == TARGETS.keys()
    for name, target in TARGETS.items():
        for content in given[name]:
            assert content
            for damaged in (content, b"", content[:-1], content[1:], content * 2, content[: len(content) // 2]):
                target(damaged)


def fuzz(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_a_short_run_of_the_fuzzer_finds_nothing(tmp_path):
    done = fuzz(tmp_path, "--runs", "1500")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 1500 runs" in done.stderr
    assert list(tmp_path.iterdir()) == []
