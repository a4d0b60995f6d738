"""The service behind a socket: the command line, the official SDK, and clean endings."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.served import ENVIRONMENT, serving
from tinkex_py.errors import ConfigError
from tinkex_py.local import LocalOptions, serve

OFFICIAL_SDK_ENGINE_PROGRAM = Path(__file__).with_name("official_sdk_engine_program.py")
OFFICIAL_SDK_PROGRAM = Path(__file__).with_name("official_sdk_program.py")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_line_then_a_clean_end_even_with_an_open_poll(number):
    with serving() as (process, address):
        assert httpx.get(f"{address}/api/v1/healthz").json() == {"status": "ok"}
        with httpx.Client(base_url=address, timeout=30) as http:
            session = http.post("/api/v1/create_session", json={}).json()["session_id"]
            body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
            model_id = http.post("/api/v1/create_model", json=body).json()["model_id"]
            late = {"model_id": model_id, "seq_id": 2, "adam_params": {}}
            request_id = http.post("/api/v1/optim_step", json=late).json()["request_id"]
            with http.stream("POST", "/api/v1/telemetry", json={}):
                pass
            process.send_signal(number)
            try:
                poll = http.post("/api/v1/retrieve_future", json={"request_id": request_id})
                assert poll.status_code == 503
            except httpx.TransportError:
                pass  # the signal was faster than the poll
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")


def official_sdk(program: Path, address: str) -> dict[str, Any]:
    """What a program of the official SDK saw."""
    done = subprocess.run(
        [sys.executable, str(program), address],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
def test_the_official_sdk_with_every_loss_an_uploaded_one_and_all_of_sampling():
    with serving("--custom-losses") as (_, address):
        seen = official_sdk(OFFICIAL_SDK_ENGINE_PROGRAM, address)
    assert seen == {
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


@pytest.mark.timeout(300)
def test_the_official_sdk_completes_the_whole_way():
    with serving() as (_, address):
        seen = official_sdk(OFFICIAL_SDK_PROGRAM, address)
    assert seen == {
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


def test_the_command_line_says_what_is_wrong():
    for arguments, message in (
        (["--model", "huge"], "model='huge': there is no such model"),
        (["--host", "0.0.0.0"], "other machines can reach host '0.0.0.0': set an api_key"),
    ):
        command = [sys.executable, "-m", "tinkex_py", "serve", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_without_typer_the_command_says_what_to_install():
    program = "import sys; sys.modules['typer'] = None\nfrom tinkex_py.__main__ import main\nmain()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "typer is not installed. Run: pip install 'tinkex-py[cli]'\n"


@pytest.mark.asyncio
async def test_a_cancelled_server_closes_its_connections_and_its_port():
    listening: asyncio.Queue[str] = asyncio.Queue()
    running = asyncio.create_task(serve(LocalOptions(), on_listening=listening.put_nowait))
    address = await listening.get()
    async with httpx.AsyncClient(base_url=address) as http:
        session = (await http.post("/api/v1/create_session", json={})).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
        created = (await http.post("/api/v1/create_model", json=body)).json()
        answer = await http.post("/api/v1/retrieve_future", json={"request_id": created["request_id"]})
        assert answer.json()["model_id"] == created["model_id"]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    async with httpx.AsyncClient(base_url=address) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get("/api/v1/healthz")


@pytest.mark.asyncio
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
async def test_others_need_a_key(host):
    with pytest.raises(ConfigError, match="set an api_key"):
        await serve(LocalOptions(), host, on_listening=print)


@pytest.mark.asyncio
async def test_a_port_in_use_is_named():
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await serve(LocalOptions(), port=port, on_listening=print)
