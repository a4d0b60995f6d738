"""TuFT: `hf` computes with torch and cannot sample; `dummy` has every endpoint and makes its numbers up."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tests.peers.installs import TUFT
from tests.peers.peer import MODEL, Peer, environment_of, write_shim
from tests.peers.process import answers, free_port, running
from tests.peers.tiny_model import ensure_tiny_model

# A CPU build of torch has no reset_peak_memory_stats, which the hf backend calls.
_SHIM = """
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
_CONFIG = """\
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
_MODES = {
    "dummy": {"TUFT_CPU_TEST": "1"},
    # The training actor asks Ray for one GPU. The address keeps it from a cluster that is, or was, there.
    "hf": {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2, "GPU": 1}', "RAY_ADDRESS": "local"},
}


@contextmanager
def tuft(mode: Literal["hf", "dummy"], folder: Path) -> Iterator[Peer]:
    TUFT.ensure()
    ensure_tiny_model(TUFT.python, folder / MODEL)
    config = folder / "tuft.yaml"
    capabilities = "[training]" if mode == "hf" else "[training, sampling]"
    config.write_text(_CONFIG.format(folder=folder, model=MODEL, capabilities=capabilities))
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **environment_of(TUFT, write_shim(folder, _SHIM)),
        **_MODES[mode],
        "TUFT_HOME": str(folder / "home"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    program = str(TUFT.folder / "bin" / "tuft")
    command = [program, "launch", "--host", "127.0.0.1", "--port", str(port), "--config", str(config)]
    with running(command, folder, environment, lambda: answers(f"{address}/api/v1/healthz")):
        yield Peer(address, "tml-dummy", MODEL, f"tuft {TUFT.version} ({mode})")
