"""The training service of `examples/fastapi_service/`, over real HTTP."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.served_app import served_app
from tinkex_py import AsyncServiceClient
from tinkex_py.runs import read_run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "fastapi_service"
BODY = {
    "examples": [
        {"prompt": "What is the capital of France?", "answer": "Ahoy friend, Paris!"},
        {"prompt": "What is the capital of Italy?", "answer": "Ahoy friend, Rome!"},
    ],
    "rank": 4,
}
ENDLESS = {**BODY, "steps": 10_000}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@asynccontextmanager
async def running(folder: Path, limit: int = 2) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    from training_service.__main__ import Server
    from training_service.app import create_app
    from training_service.settings import Settings

    app = create_app(Settings(lambda: AsyncServiceClient.local(model="tiny"), "tiny", folder, limit))
    async with served_app(app, Server) as server, httpx.AsyncClient(base_url=server.url, timeout=30) as web:
        yield web, server


async def events(web: httpx.AsyncClient, job: str, after: int | None = None) -> AsyncIterator[tuple[str, str, Any]]:
    """(event, id, data) as they arrive, until the stream ends."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    async with web.stream("GET", f"/jobs/{job}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        async for line in answer.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "event" in fields:
                yield fields["event"], fields.get("id", ""), json.loads(fields["data"])
                fields = {}


async def start(web: httpx.AsyncClient, body: Any = ENDLESS) -> str:
    answer = await web.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["status"] == "running"
    return job["id"]


async def until(web: httpx.AsyncClient, job: str, condition: Any) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            state = (await web.get(f"/jobs/{job}")).json()
            if condition(state):
                return state


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()


@pytest.mark.asyncio
async def test_a_job_from_start_to_result(example: None, tmp_path: Path) -> None:
    body = {**BODY, "steps": 5, "regularizers": {"l2": 0.01, "entropy": 0.001}}
    async with running(tmp_path) as (web, _):
        job = await start(web, body)
        early = await web.get(f"/jobs/{job}/result")
        *steps, (end, _, last) = [event async for event in events(web, job)]
        assert problem(early, 409)["detail"] == f"job {job} is running, so it has no result"
        assert [(event, number) for event, number, _ in steps] == [("step", str(n)) for n in range(1, 6)]
        assert (end, last["status"], last["steps_made"]) == ("end", "finished", 5)
        losses = [step["metrics"]["loss/total"] for _, _, step in steps]
        assert losses[-1] < losses[0]
        for _, _, step in steps:
            numbers = step["metrics"]
            whole = numbers["loss/base"] + numbers["term/l2/contribution"] + numbers["term/entropy/contribution"]
            assert numbers["loss/total"] == pytest.approx(whole, rel=1e-5)

        result = (await web.get(f"/jobs/{job}/result")).json()
        assert (result["first_loss"], result["last_loss"]) == (losses[0], losses[-1])
        assert result["checkpoint"].startswith("tinker://")
        assert [step["step"] for step in result["history"]] == [1, 2, 3, 4, 5]
        # A late follower gets all events, and one that reconnects the rest.
        assert len([event async for event in events(web, job)]) == 6
        assert [number for _, number, _ in [event async for event in events(web, job, after=3)]] == ["4", "5", ""]
        assert (await web.get("/jobs")).json() == [last | {"followers": 0}]
        assert (await web.delete(f"/jobs/{job}")).json()["status"] == "finished"  # an ended job stays as it is
        assert read_run(tmp_path / job).status == "finished"


@pytest.mark.asyncio
async def test_two_jobs_interleave(example: None, tmp_path: Path) -> None:
    arrived: list[str] = []

    async def follow(web: httpx.AsyncClient, job: str) -> None:
        async for event, _, _ in events(web, job):
            if event == "step":
                arrived.append(job)

    async with running(tmp_path) as (web, _):
        jobs = [await start(web, {**BODY, "steps": 8, "seed": seed}) for seed in (1, 2)]
        await asyncio.gather(*(follow(web, job) for job in jobs))
        first, second = [(await web.get(f"/jobs/{job}/result")).json() for job in jobs]
    assert sorted(arrived) == sorted(jobs * 8)
    turns = sum(one != other for one, other in pairwise(arrived))
    assert turns >= 4, arrived  # in sequence, there would be a single turn
    assert first["history"] != second["history"]


@pytest.mark.asyncio
async def test_overload_is_told_and_passes(example: None, tmp_path: Path) -> None:
    async with running(tmp_path) as (web, _):
        jobs = [await start(web) for _ in range(2)]
        for job in jobs:
            await until(web, job, lambda state: state["steps_made"] >= 1)
        refused = await web.post("/jobs", json=BODY)
        assert problem(refused, 429)["error"] == "RateLimited"
        assert int(refused.headers["retry-after"]) > 1  # thousands of steps are left
        assert (await web.delete(f"/jobs/{jobs[0]}")).json()["status"] == "cancelled"
        await start(web, {**BODY, "steps": 1})


@pytest.mark.asyncio
async def test_cancelling_ends_the_job_its_model_and_its_followers(example: None, tmp_path: Path) -> None:
    async with running(tmp_path) as (web, _):
        job = await start(web)
        told: list[tuple[str, str, Any]] = []
        async for event in events(web, job):
            told.append(event)
            if len(told) == 2:
                state = (await web.delete(f"/jobs/{job}")).json()
                assert state["status"] == "cancelled"
        event, _, last = told[-1]
        assert (event, last["status"]) == ("end", "cancelled")
        problem(await web.get(f"/jobs/{job}/result"), 409)
        assert (read_run(tmp_path / job).status, read_run(tmp_path / job).reason) == ("stopped", "cancelled")
        at_once = await start(web)
        assert (await web.delete(f"/jobs/{at_once}")).json()["status"] == "cancelled"  # before its first step


@pytest.mark.asyncio
async def test_a_follower_that_leaves_is_noticed(example: None, tmp_path: Path) -> None:
    """Also of a job without events, whose sending could fail."""
    from training_service.jobs import Job
    from training_service.models import JobRequest

    async with running(tmp_path) as (web, server):
        silent = Job(JobRequest(**BODY))
        server.config.app.state.jobs._jobs[silent.id] = silent
        waiting = asyncio.create_task(anext(events(web, silent.id)))
        await until(web, silent.id, lambda state: state["followers"] == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await until(web, silent.id, lambda state: state["followers"] == 0)


@pytest.mark.asyncio
async def test_stopping_the_server_ends_running_jobs(example: None, tmp_path: Path) -> None:
    async with running(tmp_path) as (web, server):
        jobs = [await start(web) for _ in range(2)]
        told: list[tuple[str, str, Any]] = []
        async for event in events(web, jobs[0]):
            told.append(event)
            server.should_exit = True
    assert (told[-1][0], told[-1][2]["status"]) == ("end", "cancelled")
    for job in jobs:
        assert read_run(tmp_path / job).status == "stopped"


@pytest.mark.asyncio
async def test_a_job_that_fails_tells_why_and_harms_no_other(example: None, tmp_path: Path) -> None:
    async with running(tmp_path) as (web, _):
        other = await start(web)
        too_long = {**BODY, "examples": [{"prompt": "x" * 9_000, "answer": "y" * 9_000}]}  # of the tiny model
        failing = await start(web, too_long)
        state = await until(web, failing, lambda state: state["status"] != "running")
        assert state["status"] == "failed"
        assert state["error"]
        assert "xxx" not in state["error"]
        problem(await web.get(f"/jobs/{failing}/result"), 409)
        made = (await web.get(f"/jobs/{other}")).json()["steps_made"]
        await until(web, other, lambda state: state["steps_made"] > made)


@pytest.mark.asyncio
async def test_bad_input_starts_nothing(example: None, tmp_path: Path) -> None:
    bad: list[tuple[Any, list[Any]]] = [
        ({}, ["body", "examples"]),
        ({"examples": []}, ["body", "examples"]),
        ({"examples": [{"prompt": "", "answer": "a"}]}, ["body", "examples", 0, "prompt"]),
        ({**BODY, "steps": 0}, ["body", "steps"]),
        ({**BODY, "learning_rate": "much"}, ["body", "learning_rate"]),
        ({**BODY, "regularizers": {"l2": -1}}, ["body", "regularizers", "l2"]),
        ({**BODY, "nonsense": 1}, ["body", "nonsense"]),
    ]
    async with running(tmp_path) as (web, _):
        for body, place in bad:
            told = problem(await web.post("/jobs", json=body), 422)
            assert [error["loc"] for error in told["errors"]] == [place]
        problem(await web.post("/jobs", content=b"{", headers={"content-type": "application/json"}), 422)
        infinite = json.dumps({**BODY, "learning_rate": math.inf}).encode()
        problem(await web.post("/jobs", content=infinite, headers={"content-type": "application/json"}), 422)
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/result")):
            told = problem(await web.request(method, f"/jobs/none{path}"), 404)
            assert told["detail"] == "no job has the id 'none'"
        job = await start(web, {**BODY, "steps": 1})
        problem(await web.get(f"/jobs/{job}/events", headers={"Last-Event-ID": "x"}), 422)
        assert len((await web.get("/jobs")).json()) == 1


def test_the_openapi_page(example: None, tmp_path: Path) -> None:
    from training_service.app import create_app
    from training_service.models import JobRequest
    from training_service.settings import Settings

    schema = create_app(Settings(AsyncServiceClient.local, "tiny", tmp_path)).openapi()
    operations = {(method, path): own for path, methods in schema["paths"].items() for method, own in methods.items()}
    jobs, job = "/jobs", "/jobs/{job_id}"
    assert set(operations) == {
        *(("post", jobs), ("get", jobs), ("get", job), ("delete", job)),
        *(("get", f"{job}/events"), ("get", f"{job}/result")),
    }
    for (_, path), own in operations.items():
        assert own["summary"]
        assert own["description"]
        assert own["tags"][0] in ("jobs", "progress")
        assert "{job_id}" not in path or "application/problem+json" in own["responses"]["404"]["content"]
    responses = operations["post", jobs]["responses"]
    assert set(responses) == {"202", "422", "429", "503"}
    assert "Retry-After" in responses["429"]["headers"]
    (example_body,) = schema["components"]["schemas"]["JobRequest"]["examples"]
    assert JobRequest(**example_body).steps == 10
    stream = operations["get", f"{job}/events"]["responses"]["200"]["content"]["text/event-stream"]
    shown = dict(line.split(": ", 1) for line in stream["example"].splitlines() if line)
    assert set(json.loads(shown["data"])) == set(schema["components"]["schemas"]["JobState"]["properties"])
    assert "HTTPValidationError" not in json.dumps(schema)


def test_settings_from_the_environment(example: None) -> None:
    from training_service.settings import Settings

    from tinkex_py import ConfigError

    settings = Settings.from_environment({"MAX_JOBS": "7", "BASE_MODEL": "big", "RUNS_FOLDER": "x"})
    assert (settings.limit, settings.base_model, settings.folder) == (7, "big", Path("x"))
    for limit in ("0", "many", "-1", ""):
        with pytest.raises(ConfigError, match="MAX_JOBS must be a whole number"):
            Settings.from_environment({"MAX_JOBS": limit})


def test_it_runs_as_the_readme_says_and_stops_at_a_signal(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TINKER_", "COVERAGE"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "training_service", "--port", "0"],
        cwd=FOLDER,
        env={**environment, "PYTHONPATH": str(ROOT), "RUNS_FOLDER": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(process.stderr.readline, "")
        line = next(line for line in lines if "running on http" in line)
        url = line.partition("running on ")[2].split()[0]
        with httpx.Client(base_url=url, timeout=30) as web:
            job = web.post("/jobs", json=ENDLESS).json()["id"]
            with web.stream("GET", f"/jobs/{job}/events") as answer:
                text = answer.iter_lines()
                assert next(text) == "event: step"
                process.send_signal(signal.SIGTERM)
                assert list(text)[-3] == "event: end"
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode in (0, -signal.SIGTERM), rest  # uvicorn raises the signal again when all is done
    assert "Application shutdown complete" in rest
    assert "Traceback" not in rest
    assert read_run(tmp_path / job).status == "stopped"
