"""The dashboard over real HTTP."""

import asyncio
import hashlib
import json
import math
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from tests.dashboard.served import Seen, dashboard, events
from tests.runs.made_up_runs import base_loss, contribution, made_up_run, made_up_step, weight, write_run
from tests.runs.support import run_info
from tinkex_py.cli import app
from tinkex_py.dashboard import serve_dashboard
from tinkex_py.dashboard.app import FILES, MOST_RUNS
from tinkex_py.dashboard.curves import POINTS
from tinkex_py.errors import ConfigError
from tinkex_py.runs.records import scalars


def append(run: Path, first: int, last: int, *terms: Sequence[str], norms: bool = True) -> None:
    steps = [made_up_step(step, *terms, norms=norms) for step in range(first, last + 1)]
    with (run / "steps.jsonl").open("a") as file:
        file.writelines(step.model_dump_json() + "\n" for step in steps)


@pytest.mark.asyncio
async def test_a_running_run_is_followed(tmp_path: Path):
    first = made_up_step(1).model_copy(update={"samples": {"a prompt": "an answer"}})
    run = write_run(tmp_path / "live", [first], run_info(status="running", total_steps=4))
    async with dashboard(tmp_path) as address, events(address, "live") as stream:
        seen = Seen()
        await seen.until(stream, lambda seen: seen.steps.get("live") == [1])
        assert seen.lines["live"]["steps"] == 1
        await seen.until(stream, lambda seen: seen.samples.get("live") == [[1, {"a prompt": "an answer"}]])
        append(run, 2, 4)
        await seen.until(stream, lambda seen: seen.steps["live"] == [1, 2, 3, 4])
        (run / "run.json").write_text(run_info(status="finished", total_steps=4).model_dump_json())
        await seen.until(stream, lambda seen: seen.lines["live"]["status"] == "finished")
        values = seen.values["live"]
        assert values["loss/base"] == pytest.approx([base_loss(step) for step in range(1, 5)], rel=1e-6)
        for place, term in enumerate(("l2", "kl_to_base", "rarity")):
            assert values[f"term/{term}/weight"] == pytest.approx([weight(place, n) for n in range(1, 5)], rel=1e-6)
            expected = [contribution(place, n) for n in range(1, 5)]
            assert values[f"term/{term}/contribution"] == pytest.approx(expected, rel=1e-6)
        assert values.keys() == scalars(made_up_step(4)).keys()
        assert seen.axes["live"]["tokens"] == [512, 1024, 1536, 2048]
        assert seen.axes["live"]["seconds"] == pytest.approx(
            [1.5 + 0.5 * math.sin(1) + 2.0 * step for step in range(4)]
        )
        # Only what is new is sent, with the point that may have changed.
        assert seen.sizes[0] == 1
        assert sum(seen.sizes) < 1 + 2 * 3 + 1


@pytest.mark.asyncio
async def test_a_run_that_appears_and_one_that_goes(tmp_path: Path):
    async with dashboard(tmp_path) as address, events(address, "new") as stream:
        seen = Seen()
        assert await anext(stream) == ("runs", {"changed": [], "gone": []})
        run = made_up_run(tmp_path / "new", 2)
        await seen.until(stream, lambda seen: seen.steps.get("new") == [1, 2])
        (run / "run.json").unlink()
        await seen.until(stream, lambda seen: seen.lines == {})
        made_up_run(tmp_path / "new again", 1)
        await seen.until(stream, lambda seen: seen.lines.keys() == {"new again"})


@pytest.mark.asyncio
async def test_long_runs_are_thinned_and_stay_whole(tmp_path: Path):
    run = made_up_run(tmp_path / "long", POINTS, ["l2"], norms=False)
    async with dashboard(tmp_path) as address, events(address, "long") as stream:
        seen = Seen()
        await seen.until(stream, lambda seen: len(seen.steps.get("long", [])) == POINTS)
        append(run, POINTS + 1, POINTS + 3, ["l2"], norms=False)
        await seen.until(stream, lambda seen: seen.steps["long"][-1] == POINTS + 3)
        assert seen.steps["long"] == [*range(2, POINTS + 3, 2), POINTS + 3]
        assert seen.values["long"]["loss/base"][-1] == pytest.approx(base_loss(POINTS + 3), rel=1e-6)
        losses = np.array([base_loss(step) for step in range(1, POINTS + 3)])
        assert seen.values["long"]["loss/base"][:-1] == pytest.approx(losses.reshape(-1, 2).mean(axis=1), rel=1e-6)


@pytest.mark.asyncio
async def test_only_selected_runs_are_sent_and_each_once(tmp_path: Path):
    for name in ("a", "b", "c"):
        made_up_run(tmp_path / name, 2)
    async with dashboard(tmp_path) as address, events(address, "b", "", "gone", "a", "b") as stream:
        seen = Seen()
        await seen.until(stream, lambda seen: len(seen.steps) == 2)
        assert seen.steps == {"a": [1, 2], "b": [1, 2]}
        assert seen.sizes == [2, 2]


def test_the_files_of_uplot_are_those_of_its_release():
    folder = FILES / "vendor"
    facts = json.loads((folder / "uPlot.json").read_text())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert found == {**facts["sha256"], "uPlot.json": found["uPlot.json"]}
    assert f"uPlot (v{facts['version']})" in (folder / "uPlot.iife.min.js").read_text()
    assert (folder / "uPlot.LICENSE").read_text().startswith("The MIT License (MIT)")


@pytest.mark.asyncio
async def test_what_is_wrong_with_a_file_reaches_the_page(tmp_path: Path):
    run = made_up_run(tmp_path / "a", 1)
    async with dashboard(tmp_path) as address, events(address, "a") as stream:
        seen = Seen()
        await seen.until(stream, lambda seen: "a" in seen.steps)
        with (run / "steps.jsonl").open("a") as file:
            file.write("no step\n")
        await seen.until(stream, lambda seen: seen.problems["a"] == "steps.jsonl, line 2 is not a step")
        (run / "run.json").write_text("{")
        await seen.until(stream, lambda seen: "is not a valid RunInfo" in (seen.lines["a"]["problem"] or ""))


@pytest.mark.asyncio
async def test_many_pages_some_of_which_leave(tmp_path: Path):
    run = write_run(tmp_path / "a", [made_up_step(1)])

    async def page(address: str, steps: int) -> None:
        async with events(address, "a") as stream:
            await Seen().until(stream, lambda seen: len(seen.steps.get("a", [])) >= steps)

    async with dashboard(tmp_path) as address:
        async with asyncio.TaskGroup() as pages:
            for number in range(6):
                pages.create_task(page(address, 1 if number % 2 else 2))
            append(run, 2, 2)
        await page(address, 2)


@pytest.mark.asyncio
async def test_stopping_ends_open_streams(tmp_path: Path):
    async with httpx.AsyncClient(timeout=None) as client:
        async with dashboard(tmp_path, interval=3600.0) as address:
            answer = await client.send(client.build_request("GET", f"{address}/api/events"), stream=True)
            lines = answer.aiter_lines()
            assert await anext(lines) == "event: runs"
        async for line in lines:  # ends without an error
            assert line is not None
        await answer.aclose()


@pytest.mark.asyncio
async def test_the_page_and_its_files(tmp_path: Path):
    made_up_run(tmp_path / "a run", 1, config={"optimizer": {"lr": 0.5}, "seed": 3}, seed=3)
    async with dashboard(tmp_path) as address, httpx.AsyncClient(base_url=address) as client:
        page = await client.get("/")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert "//" not in page.text.replace("<!doctype html>", "")  # nothing from elsewhere
        assert (await client.get("/static/panel.js")).status_code == 200
        for name in ("style.css", "dashboard.js", "vendor/uPlot.iife.min.js", "vendor/uPlot.min.css"):
            assert f"/static/{name}" in page.text
            assert (await client.get(f"/static/{name}")).status_code == 200
        assert [run["name"] for run in (await client.get("/api/runs")).json()] == ["a run"]
        settings = await client.get("/api/runs/a%20run/settings")
        assert settings.json() == {"optimizer.lr": 0.5, "seed": 3}
        assert (await client.get("/docs")).status_code == 404
        too_many = await client.get("/api/events", params={"run": [str(number) for number in range(MOST_RUNS + 1)]})
        assert too_many.status_code == 422


@pytest.mark.asyncio
async def test_nothing_outside_the_folder_is_served(tmp_path: Path):
    secret = made_up_run(tmp_path / "secret", 1, config={"key": "hidden"})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(secret)
    async with dashboard(tmp_path / "runs") as address:
        port = int(address.rpartition(":")[2])
        for path in ("..%2Fsecret", "%2e%2e/secret", "link", "..", "%2Fetc", "..%5Csecret"):
            for target in (f"/api/runs/{path}/settings", f"/static/{path}/run.json", f"/static/../{path}/run.json"):
                answer = await raw_answer(port, target)
                assert answer.startswith(("HTTP/1.1 404", "HTTP/1.1 405")), (target, answer)
                assert "hidden" not in answer
        async with events(address, "../secret", "link", str(secret)) as stream:
            assert await anext(stream) == ("runs", {"changed": [], "gone": []})
            own = made_up_run(tmp_path / "runs" / "own", 1)
            kind, data = await anext(stream)  # and no curves before it
            assert (kind, [line["name"] for line in data["changed"]]) == ("runs", [own.name])


async def raw_answer(port: int, target: str) -> str:
    """Asks without a client that would tidy the path."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer.decode()


@pytest.mark.asyncio
async def test_foreign_host_names_and_other_machines_need_permission(tmp_path: Path):
    async with dashboard(tmp_path) as address, httpx.AsyncClient(base_url=address) as client:
        for host in ("evil.example", "127.0.0.1.evil.example:80", ""):
            assert (await client.get("/api/runs", headers={"Host": host})).status_code == 400
        assert (await client.get("/api/runs", headers={"Host": "localhost:1"})).status_code == 200
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*--allow-other-machines"):
        await serve_dashboard(tmp_path, "0.0.0.0", on_listening=print)
    async with dashboard(tmp_path, host="0.0.0.0", allow_other_machines=True) as address:
        port = address.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.get("/api/runs", headers={"Host": "my-machine"})).status_code == 200


@pytest.mark.asyncio
async def test_a_port_in_use_is_named(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            await serve_dashboard(tmp_path, port=port, on_listening=print)


def test_the_command_fails_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def told(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["dashboard", *arguments])
        assert done.exit_code == 2
        (line,) = done.stderr.splitlines()
        return line

    assert "nowhere is not a folder" in told(str(tmp_path / "nowhere"))
    assert "--allow-other-machines" in told(str(tmp_path), "--host", "0.0.0.0")
    monkeypatch.setitem(sys.modules, "fastapi.sse", None)
    assert told(os.fspath(tmp_path)).endswith("Run: pip install 'tinkex-py[dashboard]'")
