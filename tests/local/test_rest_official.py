"""The official SDK's REST client against the embedded service over real HTTP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.served import ENVIRONMENT, serving

PROGRAM = Path(__file__).with_name("official_rest_program.py")


@pytest.mark.timeout(300)
def test_every_call_of_the_official_rest_client():
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
    assert json.loads(program.stdout.splitlines()[-1]) == {
        "nothing_yet": [0, 0, 0],
        "runs_in_pages": True,
        "cursor": [2, 2, 3],
        "run": ["tiny", 4, True, {"n": "0"}],
        "last": [True, True],
        "run_by_path": True,
        "checkpoints": [
            ["sampler_weights/final", "sampler"],
            ["weights/s2", "training"],
            ["weights/s1", "training"],
            ["weights/s0", "training"],
        ],
        "expires": [False, True, True, False],
        "of_user": True,
        "info": ["tiny", 4, True, True, True],
        "ttl_set": True,
        "ttl_cleared": True,
        "public": True,
        "private": True,
        "left": ["sampler_weights/final", "weights/s0"],
        "refused": [404] * 12,
        "external": [["adapter_config.json", "adapter_model.safetensors"], True],
        "session": [True, {"who": "official"}],
        "sampler": ["tiny", True, True],
        "summary": [True, 3, "p1"],
        "over": ["client_finished", "errored", "on purpose"],
        "none_active": True,
    }
