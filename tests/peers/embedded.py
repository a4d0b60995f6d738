"""The embedded service of this package, over real HTTP."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.peers.peer import Peer
from tests.support.served import serving
from tinkex_py.version import __version__


@contextmanager
def embedded(folder: Path) -> Iterator[Peer]:
    with serving("--state-dir", str(folder / "state")) as (_, address):
        yield Peer(address, "tml-local", "tiny", f"tinkex_py {__version__}", "metric:grad_norm")
