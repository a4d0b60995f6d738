"""Compares losses with TRL's and verl's own functions on random data: `make compare`.

Each library runs in an environment of its own, below `TINKEX_PEERS_DIR`. The batch and what they computed become
`numbers.json`, which `tests/objectives/test_compared.py` compares with this package.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.peers.installs import ROOT, TORCH, Install, peers_folder

NUMBERS = Path(__file__).with_name("numbers.json")
ROWS, LENGTH, CANDIDATES = 6, 7, 5

# verl pins transformers and ray: its loss modules import these packages, and no model.
TRL = Install(
    "venv-trl",
    "trl",
    "1.16.0",
    (
        (TORCH,),
        ("accelerate>=1.4", "datasets>=3.0", "jinja2", "numpy", "packaging>20.0", "transformers>=5.5,<6"),
        ("--no-deps", "trl==1.16.0"),
    ),
)
VERL = Install(
    "venv-verl",
    "verl",
    "0.9.1",
    (
        (TORCH,),
        ("codetiming", "datasets", "dill", "hydra-core", "numpy", "omegaconf", "orjson", "packaging", "pandas"),
        ("ray>=2.50", "tensordict", "transformers>=5.5,<6"),
        ("--no-deps", "verl==0.9.1"),
    ),
)
PROGRAMS = {"trl": TRL, "verl": VERL}


def batch() -> dict[str, Any]:
    """Random rows of tokens with a mask; all numbers are multiples of 1/1024, which float32 holds exactly."""
    random = np.random.default_rng(2026)

    def exact(values: Any) -> Any:
        return np.round(np.asarray(values) * 1024) / 1024

    def candidates() -> Any:
        values = random.normal(size=(ROWS, LENGTH, CANDIDATES))
        return exact(values - np.log(np.exp(values).sum(-1, keepdims=True)))

    sampler = exact(-random.uniform(0.1, 3.0, (ROWS, LENGTH)))
    mask = (np.arange(LENGTH) < random.integers(3, LENGTH + 1, ROWS)[:, None]).astype(float)
    mask[1, 1] = mask[4, 0] = 0.0  # answers of tools
    fields = {
        "logprobs": exact(np.minimum(sampler + random.normal(0.0, 0.35, sampler.shape), -0.03)),
        "sampler": sampler,
        "reference": exact(np.minimum(sampler + random.normal(0.0, 0.5, sampler.shape), -0.03)),
        "advantages": exact(np.repeat(random.normal(size=(ROWS, 1)), LENGTH, 1)),
        "mask": mask,
        "student": candidates(),
        "teacher": candidates(),
        "rewards": exact(random.uniform(size=ROWS)),
        "groups": np.array([0, 0, 0, 1, 1, 1]),
    }
    return {"length": LENGTH, **{name: values.tolist() for name, values in fields.items()}}


def main() -> int:
    content: dict[str, Any] = {"batch": batch()}
    with tempfile.TemporaryDirectory(prefix="tinkex-compare-") as name:
        given = Path(name) / "batch.json"
        given.write_text(json.dumps(content["batch"]))
        for library, install in PROGRAMS.items():
            print(f"{library} {install.version} in {peers_folder() / install.venv} ...", flush=True)
            program, result = Path(__file__).with_name(f"{library}_program.py"), Path(name) / f"{library}.json"
            command = [str(install.ensure().python), str(program), str(given), str(result)]
            subprocess.run(command, check=True, cwd=name)
            content[library] = json.loads(result.read_text())
    NUMBERS.write_text(json.dumps(content) + "\n")
    return pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "objectives" / "test_compared.py")])


if __name__ == "__main__":
    sys.exit(main())
