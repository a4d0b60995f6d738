"""What a program needs to talk to a server that runs."""

from dataclasses import dataclass
from pathlib import Path

from tests.peers.installs import Install

MODEL = "tiny-qwen3"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Peer:
    """Where it listens, the key it takes, the base model it has, and how one can see gradients there (gradients.py)."""

    base_url: str
    api_key: str
    base_model: str
    version: str
    gradient_view: str = "step"


def write_shim(folder: Path, source: str) -> str:
    """Code that Python runs before the server's own; returns the PYTHONPATH for it."""
    shim = folder / "shim"
    shim.mkdir(parents=True, exist_ok=True)
    (shim / "sitecustomize.py").write_text(source)
    return str(shim)


def environment_of(install: Install, shim: str) -> dict[str, str]:
    return {**OFFLINE, "PYTHONPATH": shim, "VIRTUAL_ENV": str(install.folder)}
