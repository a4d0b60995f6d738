"""`tinkex-py check` against services that are well, ill, or none."""

import json
import socket

import pytest

from tests.support.scripted_server import ScriptedServer, answer
from tinkex_py.commands.check import checked_service


def test_a_service_that_is_well(command, address):
    result = command("check", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["base_url"], report["works"]) == (address, True)
    assert report["latency_seconds"] > 0
    assert [model["model_name"] for model in report["models"]] == ["tiny"]
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert list(findings) == [
        "connection",
        "session",
        "wire",
        "sampling",
        "uploaded losses",
        "training runs",
        "checkpoints",
    ]
    assert {finding["state"] for finding in findings.values()} == {"works"}
    assert findings["wire"]["detail"] == "protobuf"
    assert all(finding["way_out"] is None for finding in findings.values())


def test_for_people(command, address):
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


def test_nobody_is_there(plain_command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    result = plain_command("check", "--base-url", address, "--timeout", "0.2")
    assert result.exit_code == 1
    assert "FAILED  connection" in result.stdout
    assert "tinkex-py serve" in result.stdout
    assert "session" not in result.stdout


def test_settings_that_cannot_be_used(plain_command, monkeypatch):
    result = plain_command("check", "--base-url", "ftp://here", "--json")
    assert result.exit_code == 2
    (finding,) = json.loads(result.stdout)["findings"]
    assert (finding["name"], finding["state"]) == ("settings", "failed")
    monkeypatch.delenv("TINKER_API_KEY")
    monkeypatch.setenv("HOME", "/nowhere")
    result = plain_command("check")
    assert result.exit_code == 2
    assert "no API key" in result.stdout


CAPABILITIES = {"supported_models": [{"model_name": "base"}]}


async def checked(**scripts):
    """The findings at a service with these answers; others are 404."""
    async with ScriptedServer() as server:
        for path, behaviour in scripts.items():
            server.script(f"/api/v1/{path}", behaviour)
        report = await checked_service(server.url, 5.0)
    return report, {finding.name: finding for finding in report.findings}


@pytest.mark.asyncio
async def test_what_a_service_need_not_have_is_missing_and_no_failure(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-key")
    report, findings = await checked(
        **{
            "client/config": answer(json={"proto_write_fwdbwd": False}),
            "get_server_capabilities": answer(json=CAPABILITIES),
            "create_session": answer(json={"session_id": "s"}),
            "create_sampling_session": answer(405, json={"detail": "no"}),
        }
    )
    assert report.works
    assert {name: finding.state for name, finding in findings.items()} == {
        "connection": "works",
        "session": "works",
        "wire": "works",
        "sampling": "missing",
        "uploaded losses": "missing",
        "training runs": "missing",
        "checkpoints": "missing",
    }
    assert findings["wire"].detail == "json"


@pytest.mark.asyncio
async def test_a_part_that_fails(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-key")
    report, findings = await checked(
        **{
            "client/config": answer(json={"proto_write_fwdbwd": True}),
            "get_server_capabilities": answer(json=CAPABILITIES),
            "create_session": answer(json={"session_id": "s"}),
            "create_sampling_session": answer(402, json={"detail": "no money"}),
            "training_runs": answer(403, json={"detail": "not yours"}),
        }
    )
    assert not report.works
    assert findings["sampling"].state == "failed"
    assert findings["sampling"].way_out == "the service requires payment: check the account's billing"
    assert findings["training runs"].state == "failed"
    assert "TINKER_PROJECT_ID" in findings["training runs"].way_out
    assert findings["checkpoints"].state == "missing"  # it went on


@pytest.mark.asyncio
async def test_something_else_answers(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-key")
    report, findings = await checked(
        **{"client/config": answer(body=b"<html>hello</html>"), "get_server_capabilities": answer(body=b"<html>")}
    )
    assert (report.works, list(findings)) == (False, ["connection"])
    assert "does not provide the Tinker API" in findings["connection"].way_out
