"""hatchery-core: no switch for a real model on the CPU, so it is launched with one of its checks answered."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.peers.installs import HATCHERY
from tests.peers.peer import MODEL, Peer, environment_of, write_shim
from tests.peers.process import answers, free_port, running
from tests.peers.tiny_model import ensure_tiny_model

_LAUNCHER = """
import uvicorn
import hatchery.core.local_dev as development

original = uvicorn.Config
uvicorn.Config = lambda app, **options: original(app, **{**options, "host": "127.0.0.1"})
development._has_gpu = lambda: True
development.main()
"""


@contextmanager
def hatchery(folder: Path) -> Iterator[Peer]:
    HATCHERY.ensure()
    ensure_tiny_model(HATCHERY.python, folder / MODEL)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **environment_of(HATCHERY, write_shim(folder, "")),
        "HATCHERY_DEV_PORT": str(port),
        "HATCHERY_DEV_API_KEY": "tml-dummy",
        "HATCHERY_DEV_BASE_MODEL": str(folder / MODEL),
        "HATCHERY_DEV_DEVICE": "cpu:0",
        "HATCHERY_WORKER_LOCAL_DIR": str(folder / "state"),
    }
    command = [str(HATCHERY.python), "-c", _LAUNCHER]
    with running(command, folder, environment, lambda: answers(f"{address}/api/v1/healthz")):
        yield Peer(
            address, "tml-dummy", str(folder / MODEL), f"hatchery-core {HATCHERY.version}", f"folder:{folder / 'state'}"
        )
