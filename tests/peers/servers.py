"""The servers of the conformance runs: this package's embedded service, SkyRL, TuFT, hatchery-core, Twinkle, open-rl.

Each function is a context manager that starts one server in a folder and yields a `Peer`. The other projects' servers
run on the CPU with a tiny random model; the shims below work around what they expect of a GPU or of a newer Python.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.peers.installs import COOKBOOK, HATCHERY, ROOT, TUFT, TWINKLE, Install
from tests.peers.process import free_port, responds, running
from tests.peers.tiny_model import ensure_tiny_model
from tests.support.served import serving
from tinkex_py.version import __version__

MODEL = "tiny-qwen3"


@dataclass(frozen=True)
class Peer:
    """What a program needs to talk to a running server.

    Attributes:
        base_url: its address.
        api_key: a key that it accepts.
        base_model: the model that it serves.
        version: name and version of the server.
        gradient_view: how a gradient can be measured there; see `tests/peers/gradients.py`.
        folder: where the client runs.
    """

    base_url: str
    api_key: str
    base_model: str
    version: str
    gradient_view: str = "step"
    folder: Path = ROOT


@contextmanager
def embedded(folder: Path) -> Iterator[Peer]:
    """The embedded service of this package, over HTTP."""
    with serving("--state-dir", str(folder / "state")) as (_, address):
        yield Peer(address, "tml-local", "tiny", f"tinkex_py {__version__}", "metric:grad_norm")


# The name by which the cookbook knows renderer and settings. As a relative path it is also a folder, from which both
# the service and the cookbook load the tiny model and its tokenizer.
COOKBOOK_MODEL = "Qwen/Qwen3-4B-Instruct-2507"


@contextmanager
def embedded_for_cookbook(folder: Path) -> Iterator[Peer]:
    """The embedded service of this package, over HTTP, with a model that the cookbook knows."""
    ensure_tiny_model(COOKBOOK.ensure().python, folder / COOKBOOK_MODEL)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tinkex_py", "serve", "--model", COOKBOOK_MODEL, "--port", str(port)]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with running(command, folder, environment, lambda: responds(f"{address}/api/v1/healthz")):
        yield Peer(address, "tml-local", COOKBOOK_MODEL, f"tinkex_py {__version__}", folder=folder)


def prepare(install: Install, folder: Path, shim: str = "") -> Mapping[str, str]:
    """Installs a server, makes its model, and returns the environment to start it in.

    Args:
        install: the server's venv.
        folder: where the model and the shim are written.
        shim: code that Python runs before the server's own.
    """
    install.ensure()
    ensure_tiny_model(install.python, folder / MODEL)
    (folder / "shim").mkdir(parents=True, exist_ok=True)
    (folder / "shim" / "sitecustomize.py").write_text(shim)
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder / "shim"),
        "VIRTUAL_ENV": str(install.folder),
    }


# SkyRL: its JAX backend on the CPU

# pydantic refuses typing.TypedDict before Python 3.12, and SkyRL 0.4.0 uses it.
_SKYRL_SHIM = """
import sys
if sys.version_info < (3, 12):
    import typing
    try:
        import typing_extensions
        typing.TypedDict = typing_extensions.TypedDict
    except ImportError:
        pass
"""
_SKYRL_BACKEND = {"max_lora_adapters": 32, "max_lora_rank": 32, "loss_chunk_size": 0}


@contextmanager
def skyrl(install: Install, folder: Path) -> Iterator[Peer]:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **prepare(install, folder, _SKYRL_SHIM),
        "PATH": f"{install.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "UV_OFFLINE": "1",
        "UV_NO_CONFIG": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / f"{install.venv}-jax-cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # Its API starts the engine with `uv run` and the flags on the command line of its own parent process.
    uv = (str(install.folder / "bin" / "uv"), "run", "--no-project", "--active", "--python", str(install.python))
    settings = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--base-model": MODEL,
        "--backend": "jax",
        "--backend-config": json.dumps(_SKYRL_BACKEND),
        "--checkpoints-base": str(folder / "checkpoints"),
        "--database-url": f"sqlite:///{folder / 'tinker.db'}",
    }
    command = [*uv, "-m", "skyrl.tinker.api", *(part for pair in settings.items() for part in pair)]

    def is_ready() -> bool:
        # /healthz responds before the engine has loaded its model.
        started = "Starting background engine" in (folder / "server.log").read_text(errors="replace")
        return started and responds(f"{address}/api/v1/healthz")

    with running(command, folder, environment, is_ready):
        yield Peer(address, "tml-any", MODEL, f"skyrl {install.version}", "metric:skyrl.ai/grad_norm")


# TuFT: `hf` computes with torch and cannot sample; `dummy` has every endpoint and returns made-up numbers

# A CPU build of torch has no reset_peak_memory_stats, which the hf backend calls.
_TUFT_SHIM = """
import importlib.abc
import importlib.util
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch.cuda":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            if not module.is_available():
                module.reset_peak_memory_stats = lambda *a, **k: None

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
"""
_TUFT_CONFIG = """\
checkpoint_dir: {folder}/checkpoints
authorized_users:
  tml-dummy: user-a
supported_models:
  - model_name: {model}
    model_path: {folder}/{model}
    max_model_len: 512
    max_lora_rank: 32
    max_loras: 16
    training_backend: hf
    capabilities: {capabilities}
"""
_TUFT_MODES = {
    "dummy": {"TUFT_CPU_TEST": "1"},
    # The training actor requests one GPU from Ray. The address keeps Ray from joining an existing cluster.
    "hf": {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2, "GPU": 1}', "RAY_ADDRESS": "local"},
}


@contextmanager
def tuft(mode: Literal["hf", "dummy"], folder: Path) -> Iterator[Peer]:
    environment = {
        **prepare(TUFT, folder, _TUFT_SHIM),
        **_TUFT_MODES[mode],
        "TUFT_HOME": str(folder / "home"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    config = folder / "tuft.yaml"
    capabilities = "[training]" if mode == "hf" else "[training, sampling]"
    config.write_text(_TUFT_CONFIG.format(folder=folder, model=MODEL, capabilities=capabilities))
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    program = str(TUFT.folder / "bin" / "tuft")
    command = [program, "launch", "--host", "127.0.0.1", "--port", str(port), "--config", str(config)]
    with running(command, folder, environment, lambda: responds(f"{address}/api/v1/healthz")):
        yield Peer(address, "tml-dummy", MODEL, f"tuft {TUFT.version} ({mode})")


# hatchery-core: it has no switch for a real model on the CPU, so its check for a GPU is replaced

_HATCHERY_LAUNCHER = """
import uvicorn
import hatchery.core.local_dev as development

original = uvicorn.Config
uvicorn.Config = lambda app, **options: original(app, **{**options, "host": "127.0.0.1"})
development._has_gpu = lambda: True
development.main()
"""


@contextmanager
def hatchery(folder: Path) -> Iterator[Peer]:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **prepare(HATCHERY, folder),
        "HATCHERY_DEV_PORT": str(port),
        "HATCHERY_DEV_API_KEY": "tml-dummy",
        "HATCHERY_DEV_BASE_MODEL": str(folder / MODEL),
        "HATCHERY_DEV_DEVICE": "cpu:0",
        "HATCHERY_WORKER_LOCAL_DIR": str(folder / "state"),
    }
    command = [str(HATCHERY.python), "-c", _HATCHERY_LAUNCHER]
    with running(command, folder, environment, lambda: responds(f"{address}/api/v1/healthz")):
        yield Peer(
            address, "tml-dummy", str(folder / MODEL), f"hatchery-core {HATCHERY.version}", f"folder:{folder / 'state'}"
        )


# Twinkle's model class, and open-rl's way of its passes, behind routes of ours


@contextmanager
def twinkle(folder: Path) -> Iterator[Peer]:
    environment = {**prepare(TWINKLE, folder), "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    with _thin(TWINKLE.python, folder, environment, "twinkle") as address:
        yield Peer(address, "tml-any", MODEL, f"twinkle-kit {TWINKLE.version}, its model class", "metric:grad_norm")


@contextmanager
def open_rl(folder: Path) -> Iterator[Peer]:
    python = Path(sys.executable)
    ensure_tiny_model(python, folder / MODEL)
    with _thin(python, folder, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, "open-rl") as address:
        yield Peer(
            address, "tml-any", MODEL, "open-rl's way of its passes (2026-11), torch and peft", "metric:grad_norm"
        )


@contextmanager
def _thin(python: Path, folder: Path, environment: Mapping[str, str], kind: str) -> Iterator[str]:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    program = str(Path(__file__).with_name("thin_server.py"))
    command = [str(python), program, str(port), str(folder), kind]
    with running(command, folder, environment, lambda: responds(f"{address}/api/v1/healthz")):
        yield address
