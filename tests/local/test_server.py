"""The service behind a socket: the command line, the official SDK, and clean endings."""

import asyncio
import signal
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

from tests.support.served import serving
from tinkex_py.cli import app
from tinkex_py.errors import ConfigError
from tinkex_py.local import LocalOptions, serve


def test_one_line_then_a_clean_end_even_with_an_open_poll():
    """Ends on SIGTERM; `test_official_sdk.py` ends its service with SIGINT."""
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
            process.send_signal(signal.SIGTERM)
            try:
                poll = http.post("/api/v1/retrieve_future", json={"request_id": request_id})
                assert poll.status_code == 503
            except httpx.TransportError:
                pass  # the signal was faster than the poll
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "huge"], "model='huge': there is no such model"),
        (["--host", "0.0.0.0"], "other machines can reach host '0.0.0.0': set an api_key"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


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
async def test_a_port_in_use_is_named():
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await serve(LocalOptions(), port=port, on_listening=print)


def test_without_typer_the_command_says_what_to_install():
    program = "import sys; sys.modules['typer'] = None\nfrom tinkex_py.__main__ import main\nmain()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "typer is not installed. Run: pip install 'tinkex-py[cli]'\n"
