"""The columns of the conformance table: pairs of a client and a server."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tests.peers.flows import FLOWS
from tests.peers.installs import COOKBOOK, ROOT, SKYRL_030, SKYRL_040, official
from tests.peers.recipes import RECIPES
from tests.peers.results import Defect
from tests.peers.servers import Peer, embedded, embedded_for_cookbook, hatchery, open_rl, skyrl, tuft, twinkle
from tinkex_py.version import __version__

Serve = Callable[[Path], AbstractContextManager[Peer]]


@dataclass(frozen=True)
class Pair:
    """One column of the table.

    Attributes:
        name: selects the pair, as in `make conformance ARGS=name`.
        head: heading of its column.
        client: name and version of the client.
        command: returns the interpreter and the program; may install them.
        serve: starts the server in a folder.
        options: further arguments of the program.
        defects: known failures inside the server.
        rows: of its table, with the methods of the program.
    """

    name: str
    head: str
    client: str
    command: Callable[[], list[str]]
    serve: Serve
    options: tuple[str, ...] = ()
    defects: tuple[Defect, ...] = ()
    rows: Mapping[str, str] = field(default_factory=lambda: FLOWS)


def _official_command(version: str) -> list[str]:
    is_here = importlib.metadata.version("tinker") == version
    python = sys.executable if is_here else str(official(version).ensure().python)
    return [python, str(Path(__file__).with_name("official_program.py"))]


def _own_command() -> list[str]:
    return [sys.executable, "-m", "tests.peers.own_program"]


def _cookbook_command() -> list[str]:
    return [str(COOKBOOK.ensure().python), str(Path(__file__).with_name("cookbook_program.py"))]


def _from_official(version: str) -> Pair:
    client = f"tinker {version}"
    return Pair(f"official-{version}", f"{client} -> ours", client, partial(_official_command, version), embedded)


def _to(name: str, server: str, serve: Serve, *options: str) -> Pair:
    return Pair(name, f"ours -> {server}", f"tinkex_py {__version__}", _own_command, serve, options)


PAIRS = (
    *(_from_official(version) for version in ("0.16.1", "0.24.1", "0.25.0", "0.38.0")),
    _to("ours", "ours", embedded),
    _to("skyrl-0.4.0", "SkyRL 0.4.0", partial(skyrl, SKYRL_040)),
    _to("skyrl-0.3.0", "SkyRL 0.3.0", partial(skyrl, SKYRL_030)),
    _to("tuft-hf", "TuFT hf", partial(tuft, "hf")),
    _to("tuft-dummy", "TuFT dummy", partial(tuft, "dummy"), "--made-up-numbers"),
    replace(
        _to("hatchery", "hatchery", hatchery, "--half-precision"),
        defects=(
            Defect(
                flow="save_weights_for_sampler, sample by path",
                answer=r"ServerError: POST /api/v1/create_sampling_session at \S+ returned 500 Internal Server "
                r"Error after \d attempts\. Sampler load_weights failed: KeyError: "
                r"'sessions/mdl_\w+/checkpoints/sampler/lora_weights\.pt' .*",
                reason="without vLLM its save_weights_for_sampler writes no file, and create_sampling_session fails "
                "with a KeyError for that file (500)",
            ),
        ),
    ),
    _to("twinkle", "Twinkle's model", twinkle),
    replace(
        _to("open-rl", "open-rl's passes", open_rl),
        defects=(
            Defect(
                flow="gradient of a custom loss arrives as computed",
                answer=r"AssertionError: (the loss times (2\.0|-0\.5)|two calls) .*",
                reason="dropout in the backward pass alone: equal steps have gradients of different norms",
            ),
            Defect(
                flow="from state with optimizer",
                answer=r"AssertionError: next losses .*",
                reason="dropout in the backward pass alone: equal steps from equal states differ",
            ),
        ),
    ),
)


_COOKBOOK = Pair(
    "cookbook-plain",
    "as it is",
    "tinker-cookbook 0.5.8, tinker 0.38.0",
    _cookbook_command,
    embedded_for_cookbook,
    rows=RECIPES,
)
COOKBOOK_PAIRS = (
    _COOKBOOK,
    replace(_COOKBOOK, name="cookbook-regularized", head="under regularize_recipe", options=("--regularized",)),
)


def program_output(pair: Pair, peer: Peer, errors: Path, patience: float) -> str:
    """Runs the pair's program and returns its output; a program that hangs is killed after `patience` seconds."""
    command = [*pair.command(), peer.base_url, peer.api_key, peer.base_model, peer.gradient_view, *pair.options]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TINKER_", "TINKEX_", "PYTHON"))}
    environment = {**clean, "TINKER_TELEMETRY": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with errors.open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=peer.folder, env=environment
        )
        try:
            return process.communicate(timeout=patience)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0]
