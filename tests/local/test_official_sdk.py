"""The unmodified official SDK against the embedded service over HTTP, one process each."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import ENVIRONMENT, serving

PROGRAM = Path(__file__).with_name("official_programs.py")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What each part of the SDK has seen; the service then ends cleanly on SIGINT."""
    with serving("--custom-losses") as (process, address):
        program = subprocess.run(
            [sys.executable, str(PROGRAM), address],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=500,
            check=False,
        )
        assert program.returncode == 0, program.stderr
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
    return json.loads(program.stdout.splitlines()[-1])


def test_every_call_of_the_official_rest_client(seen):
    assert seen["official_rest_program"] == {
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


def test_the_official_sdk_trains_saves_and_samples(seen):
    assert seen["official_sdk_program"] == {
        "models": ["tiny"],
        "info": ["tiny", 8, True],
        "tokens": [104, 195, 169],
        "forward_shapes": [[11], [3]],
        "loss_equal": True,
        "grad_norm_positive": True,
        "losses_fall": True,
        "surrogate_equal": True,
        "path_end": "weights/s1",
        "resumed_equal": True,
        "without_optimizer_differs": True,
        "sequences": [5, 5],
        "greedy_same": True,
        "scores_match": True,
        "base_differs": True,
        "checkpoints": ["sampler_weights/final", "weights/s1"],
        "runs": 3,
        "info_rank": 8,
        "unknown_model": True,
    }


def test_the_official_sdk_with_every_loss_an_uploaded_one_and_all_of_sampling(seen):
    assert seen["official_sdk_engine_program"] == {
        "importance_sampling": True,
        "ppo": True,
        "cispo": True,
        "dro": True,
        "gspo": True,
        "stable_reinforce": ["user", True],
        "sent_sparse": True,
        "matrix_shape": [11, 40],
        "matrix_loss": True,
        "picture": ["user", True],
        "goes_on": True,
        "uploaded": True,
        "server_equals_client": True,
        "not_allowed": ["user", True],
        "targets": True,
        "alternatives": [[11, 4], [11, 4]],
        "topk": [None, 3],
        "topk_sampled": [[2, 2, 2, 2], [2, 2, 2, 2]],
        "last_n": True,
        "many": 24 * 2 * 8,
        "stops": True,
        "inflight": [True, True, True],
        "snapshot": True,
        "concurrent": True,
    }


def test_the_official_sdk_draws_hundreds_of_samples_at_once(seen):
    sampling = seen["official_sampling_program"]
    assert sampling.pop("polls") < 60  # separate polls would be hundreds
    assert sampling == {
        "flag": True,
        "sequences": 200,
        "tokens": 800,
        "different": True,
        "clones": [20, 20],
        "failed": ["user", 3],
        "again": 50,
    }
