"""Venvs of the peers, created once and reused, with what each needs to run without a GPU."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.peers.process import PeerError

ROOT = Path(__file__).parents[2]
# First and by this version, so that no later requirement brings a build for GPUs.
TORCH = "torch==2.13.0"


def peers_folder() -> Path:
    """Returns the folder of the venvs: `TINKEX_PEERS_DIR`, or `.peers` in the repository."""
    return Path(os.environ.get("TINKEX_PEERS_DIR") or ROOT / ".peers").resolve()


@dataclass(frozen=True)
class Install:
    """One venv. Its last step installs `package`, so the presence of that package shows that all steps succeeded."""

    venv: str
    package: str
    version: str
    steps: tuple[tuple[str, ...], ...]

    @property
    def folder(self) -> Path:
        return peers_folder() / self.venv

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def ensure(self) -> "Install":
        """Creates the venv unless it exists.

        Raises:
            PeerError: pip failed.
        """
        if self._is_installed():
            return self
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        commands = [
            [sys.executable, "-m", "venv", str(self.folder)],
            *([str(self.python), "-m", "pip", "install", "-q", *step] for step in self.steps),
        ]
        for command in commands:
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise PeerError(f"{self.package} {self.version} could not be installed: {error}") from error
        return self

    def _is_installed(self) -> bool:
        if not self.python.exists():
            return False
        query = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        found = subprocess.run([str(self.python), "-c", query], capture_output=True, text=True, check=False)
        return found.stdout.strip() == self.version


def official(version: str) -> Install:
    """Returns the venv of an official SDK, with the packages that its forward_backward_custom imports."""
    return Install(
        f"venv-tinker-{version}", "tinker", version, ((TORCH,), ("numpy", "transformers"), (f"tinker=={version}",))
    )


COOKBOOK = Install(
    "venv-cookbook",
    "tinker-cookbook",
    "0.5.8",
    (
        (TORCH,),
        # What this package needs there, for `regularize_recipe`.
        ("filelock", "httpcore>=1.0.5,<2", "httpx", "lazy-loader", "platformdirs", "structlog", "tenacity"),
        ("tinker==0.38.0", "tinker-cookbook[math-rl]==0.5.8"),
    ),
)
SKYRL_040 = Install(
    "venv-skyrl",
    "skyrl",
    "0.4.0",
    (
        (TORCH,),
        # It declares Python >= 3.12 but runs on 3.11 with the shim of skyrl.py, so its requirements come first.
        # aiohttp: imported by the server, missing from what it declares.
        (
            *("datasets>=4.0.0", "pillow>=11.3.0", "rich>=14.1.0", "safetensors>=0.6.2", "tokenizers>=0.23.1"),
            *("transformers>=5.6.1,<=5.16.1", "typer>=0.17.4", "peft==0.18.1", "hf_transfer", "cloudpathlib>=0.23.0"),
            *("zstandard>=0.23.0", "xxhash>=3.0.0", "tinker>=0.25.0,<0.26.0", "fastapi[standard]", "sqlmodel"),
            *("sqlalchemy[asyncio]", "aiosqlite", "asyncpg", "psycopg2-binary", "jax>=0.8,<1.0", "flax>=0.12.2"),
            *("optax>=0.2.5", "aiohttp", "uv"),
        ),
        ("--no-deps", "--ignore-requires-python", "skyrl==0.4.0"),
    ),
)
SKYRL_030 = Install(
    "venv-skyrl030",
    "skyrl",
    "0.3.0",
    ((TORCH,), ("skyrl[tinker,jax]==0.3.0", "tinker<0.25", "aiohttp", "uv")),
)
TUFT = Install(
    "venv-tuft",
    "tuft",
    "0.2.2",
    (
        (TORCH,),
        # It pins vllm, which needs a GPU: first its other requirements, then the package without dependencies.
        (
            *("accelerate>=1.0.0", "fastapi>=0.133.0,<0.137.0", "httpx>=0.28.1", "numpy>=2.0.0"),
            *("nvidia-ml-py>=13.0.0", "omegaconf>=2.3.0", "opentelemetry-api>=1.20.0"),
            *("opentelemetry-exporter-otlp>=1.20.0", "opentelemetry-instrumentation-fastapi>=0.41b0"),
            *("opentelemetry-instrumentation-logging>=0.41b0", "opentelemetry-sdk>=1.20.0", "peft==0.20.0"),
            *("protobuf>=4.21.0", "psutil>=5.9.0", "ray>=2.50.0", "tinker>=0.25,<0.26"),
            *("transformers>=5.5.3,<6.0.0", "typer>=0.20.1", "uvicorn[standard]>=0.38.0"),
        ),
        ("--no-deps", "tuft==0.2.2"),
    ),
)
HATCHERY = Install(
    "venv-hatchery",
    "hatchery-core",
    "0.3.0",
    (
        (TORCH,),
        # It declares Python >= 3.12 and torch 2.10; it runs with both of ours.
        (
            *("fastapi>=0.110", "uvicorn[standard]>=0.27", "pydantic>=2.6", "msgpack>=1.0", "aiosqlite>=0.19"),
            *("structlog>=24.1", "httpx>=0.27", "transformers>=4.51", "peft>=0.10", "tinker==0.24.1"),
        ),
        ("--no-deps", "--ignore-requires-python", "hatchery-client>=0.2.0"),
        ("--no-deps", "--ignore-requires-python", "hatchery-core==0.3.0"),
    ),
)
TWINKLE = Install(
    "venv-twinkle",
    "twinkle-kit",
    "0.5.1",
    (
        (TORCH,),
        # What it declares, and what the modules of its server import: Ray, and the types of the official SDK.
        (
            *("numpy>=2.0.0,<2.3.0", "datasets==4.8.4", "omegaconf==2.4.0", "fastapi", "uvicorn", "safetensors"),
            *("modelscope[framework]==1.40.2", "peft==0.19.0", "transformers==5.24.0", "typer>=0.9.0", "pyzmq"),
            *("accelerate==1.15.0", "ray[serve]==2.60.0", "tinker==0.16.1"),
        ),
        ("--no-deps", "twinkle-kit==0.5.1"),
    ),
)
