"""`tinkex-py check` against services that work, that fail, and that do not exist."""

import json
import socket

import pytest

from tests.support.scripted_server import ScriptedServer, answer
from tinkex_py.commands.check import checked_service

NAMES = ["connection", "session", "wire", "sampling", "uploaded losses", "training runs", "checkpoints"]


def test_a_service_that_works(command, address):
    result = command("check", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["base_url"], report["works"]) == (address, True)
    assert report["latency_seconds"] > 0
    assert [model["model_name"] for model in report["models"]] == ["tiny"]
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert list(findings) == NAMES
    assert {finding["state"] for finding in findings.values()} == {"works"}
    assert findings["wire"]["detail"] == "protobuf"
    assert all(finding["way_out"] is None for finding in findings.values())

    result = command("check", "--base-url", address)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == [address]
    assert ["ok", "wire", "protobuf"] in lines
    assert ["tiny", "2048", "yes", "yes"] in lines


def test_a_wrong_key(command, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-wrong-key")
    result = command("check", "--json")
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)["findings"]
    assert (finding["name"], finding["state"]) == ("connection", "failed")
    assert "TINKER_API_KEY" in finding["way_out"]
    assert "tml-wrong-key" not in result.output


def test_no_service(plain_command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    result = plain_command("check", "--base-url", address, "--timeout", "0.2")
    assert result.exit_code == 1
    assert "FAILED  connection" in result.stdout
    assert "tinkex-py serve" in result.stdout
    assert "session" not in result.stdout


def test_invalid_settings(plain_command, monkeypatch):
    result = plain_command("check", "--base-url", "ftp://here", "--json")
    assert result.exit_code == 2
    (finding,) = json.loads(result.stdout)["findings"]
    assert (finding["name"], finding["state"]) == ("settings", "failed")
    monkeypatch.delenv("TINKER_API_KEY")
    monkeypatch.setenv("HOME", "/nowhere")
    result = plain_command("check")
    assert result.exit_code == 2
    assert "no API key" in result.stdout


WORKING = {
    "client/config": answer(json={"proto_write_fwdbwd": False}),
    "get_server_capabilities": answer(json={"supported_models": [{"model_name": "base"}]}),
    "create_session": answer(json={"session_id": "s"}),
}
MISSING = dict.fromkeys(NAMES[3:], ("missing", None))
NO_MONEY = ("failed", "the service requires payment: check the account's billing")
NOT_MINE = ("failed", "the key has no permission: check its owner and TINKER_PROJECT_ID")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("scripts", "expected"),
    [
        (WORKING | {"create_sampling_session": answer(405, json={"detail": "no"})}, MISSING),
        (
            WORKING
            | {
                "create_sampling_session": answer(402, json={"detail": "no money"}),
                "training_runs": answer(403, json={"detail": "not yours"}),
            },
            MISSING | {"sampling": NO_MONEY, "training runs": NOT_MINE},
        ),
        (
            {"client/config": answer(body=b"<html>hello</html>"), "get_server_capabilities": answer(body=b"<html>")},
            {"connection": ("failed", "this server does not provide the Tinker API: check the URL and its path")},
        ),
    ],
    ids=["optional features are missing", "features fail", "another server"],
)
async def test_what_a_service_lacks(monkeypatch, scripts, expected):
    monkeypatch.setenv("TINKER_API_KEY", "tml-key")
    async with ScriptedServer() as server:  # other paths are 404
        for path, behaviour in scripts.items():
            server.script(f"/api/v1/{path}", behaviour)
        report = await checked_service(server.url, 5.0)
    assert report.works == all(state != "failed" for state, _ in expected.values())
    found = {finding.name: (finding.state, finding.way_out) for finding in report.findings}
    assert {name: result for name, result in found.items() if result[0] != "works"} == expected
    if "wire" in found:
        assert next(finding.detail for finding in report.findings if finding.name == "wire") == "json"


def test_gradients_of_a_service_are_measured(command, address, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = command("check", "--gradients", "--rank", "4", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    measured = report["gradients"]
    assert (measured["surrogate"], measured["model"], measured["rank"]) == ("cross_entropy", "tiny", 4)
    assert measured["service"] == address
    assert "at most 374 throwaway models" in result.stderr
    (file,) = (tmp_path / "tinkex-py" / "certificates").iterdir()
    assert json.loads(file.read_text()) == measured


def test_a_service_whose_gradients_cannot_be_measured(command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = command("check", "--gradients", "--model", "huge")
    assert result.exit_code == 1
    assert "Its only model is 'tiny'" in result.output
    result = command("check", "--gradients", "--rank", "4")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["surrogate", "cross_entropy:", "pass"] in lines
    assert ["pass", "descending"] in [line[:2] for line in lines]
    assert "arrive as computed with surrogate='cross_entropy'" in result.stdout
