"""SkyRL's server for the Tinker API: its JAX backend on the CPU, with a tiny random model."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.peers.installs import Install
from tests.peers.peer import MODEL, Peer, environment_of, write_shim
from tests.peers.process import answers, free_port, running
from tests.peers.tiny_model import ensure_tiny_model

# pydantic refuses typing.TypedDict before Python 3.12, and SkyRL 0.4.0 uses it.
_SHIM = """
import sys
if sys.version_info < (3, 12):
    import typing
    try:
        import typing_extensions
        typing.TypedDict = typing_extensions.TypedDict
    except ImportError:
        pass
"""
_BACKEND = {"max_lora_adapters": 32, "max_lora_rank": 32, "loss_chunk_size": 0}


@contextmanager
def skyrl(install: Install, folder: Path) -> Iterator[Peer]:
    install.ensure()
    ensure_tiny_model(install.python, folder / MODEL)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **environment_of(install, write_shim(folder, _SHIM)),
        "PATH": f"{install.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "UV_OFFLINE": "1",
        "UV_NO_CONFIG": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / f"{install.venv}-jax-cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # Its API starts the engine with `uv run` and the flags it finds on its own parent's command line.
    uv = (str(install.folder / "bin" / "uv"), "run", "--no-project", "--active", "--python", str(install.python))
    settings = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--base-model": MODEL,
        "--backend": "jax",
        "--backend-config": json.dumps(_BACKEND),
        "--checkpoints-base": str(folder / "checkpoints"),
        "--database-url": f"sqlite:///{folder / 'tinker.db'}",
    }
    command = [*uv, "-m", "skyrl.tinker.api", *(part for pair in settings.items() for part in pair)]

    def is_ready() -> bool:
        # /healthz answers before the engine has its model.
        started = "Starting background engine" in (folder / "server.log").read_text(errors="replace")
        return started and answers(f"{address}/api/v1/healthz")

    with running(command, folder, environment, is_ready):
        yield Peer(address, "tml-any", MODEL, f"skyrl {install.version}", "metric:skyrl.ai/grad_norm")
