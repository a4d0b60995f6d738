"""The life of a LocalService: nothing before start, nothing left after stop."""

import asyncio
import logging
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Literal

import httpx
import pytest

from tinkex_py.errors import ConfigError
from tinkex_py.local import LocalOptions, LocalService
from tinkex_py.local.options import LocalOptions as Options

pytestmark = pytest.mark.asyncio


class WatchedEvent(asyncio.Event):
    """Reports that a task waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = asyncio.Event()

    async def wait(self) -> Literal[True]:
        self.watched.set()
        return await super().wait()


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tinkex-engine")]


def private_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob(f"tinkex-py-{os.getpid()}-*"))


async def status(service: LocalService) -> int:
    transport = httpx.ASGITransport(app=service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://local") as http:
        return (await http.post("/api/v1/create_session", json={})).status_code


async def test_start_and_stop_leave_nothing_and_can_be_repeated():
    folders = private_folders()
    service = LocalService(LocalOptions())
    assert engine_threads() == []
    assert await status(service) == 503
    with pytest.raises(ConfigError, match="not running"):
        _ = service.tokenizer
    for _ in range(2):
        await asyncio.gather(service.start(), service.start())
        await service.start()
        assert len(engine_threads()) == 1
        assert await status(service) == 200
        assert len(private_folders() - folders) == 1
        await service.stop()
        await service.stop()
        assert engine_threads() == []
        assert private_folders() == folders
        assert await status(service) == 503


async def test_tokenizers_go_by_name():
    service = LocalService()
    await service.start()
    try:
        tokenizer = service.tokenizer_for("tiny")
        assert service.model_name == "tiny"
        assert tokenizer is service.tokenizer
        assert tokenizer.encode("hé") == [104, 195, 169]
        assert tokenizer.decode([256, 104, 195, 169, 257]) == "hé"
        assert tokenizer.eos_token_id == 257
        with pytest.raises(ConfigError, match=r"'other' is not served here\. Served: 'tiny'"):
            service.tokenizer_for("other")
    finally:
        await service.stop()


async def test_a_cancelled_start_is_ended_by_stop():
    service = LocalService()
    starting = asyncio.create_task(service.start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await service.stop()
    assert engine_threads() == []
    assert service.core is None


async def test_stop_waits_for_a_start_under_way():
    service = LocalService()
    starting = asyncio.create_task(service.start())
    await asyncio.sleep(0)
    await asyncio.gather(service.stop(), service.stop(), starting)
    assert engine_threads() == []
    assert service.core is None


@pytest.mark.parametrize("model", ["huge", "/nonexistent/folder"])
async def test_an_unknown_model_is_named_and_leaves_nothing(model):
    folders = private_folders()
    service = LocalService(LocalOptions(model=model))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"there is no such model. Use 'tiny', 'smollm2'") as caught:
            await service.start()
        assert repr(model) in str(caught.value)
    assert engine_threads() == []
    assert private_folders() == folders


async def test_an_unusable_device_is_named():
    service = LocalService(LocalOptions(device="abacus"))
    with pytest.raises(ConfigError, match="device='abacus' cannot be used here"):
        await service.start()


async def test_stop_answers_open_polls_and_fails_unfinished_work(run_service, kit):
    options = LocalOptions(hold_seconds=30)
    async with run_service(options) as client:
        model_id = await client.model()
        waiting = (await client.send_pass(kit.message(model_id, 2, [kit.datum(3, 1)]))).json()["request_id"]
        core = client.service.core
        pending = core.results.find(waiting)
        pending.done = WatchedEvent()
        poll = asyncio.create_task(client.result(waiting))
        await pending.done.watched.wait()
        await client.service.stop()
        answer = await poll
    assert answer.status_code == 200
    assert answer.json()["category"] == "server"
    assert "stopped before this request was done" in answer.json()["error"]


async def test_stop_ends_a_long_draw_early(run_service):
    async with run_service(LocalOptions()) as client:
        body = {"base_model": "tiny", "prompt": {"chunks": [{"tokens": [1]}]}, "num_samples": 64}
        long = {**body, "sampling_params": {"max_tokens": 2000, "stop": []}}
        ids = [(await client.ask("asample", long))["request_id"] for _ in range(3)]
        core = client.service.core
        await client.service.stop()
        outcomes = [core.results.find(request_id).outcome for request_id in ids]
        assert [outcome.category for outcome in outcomes] == ["server"] * 3
    assert engine_threads() == []


async def test_an_unexpected_error_is_a_server_failure_and_is_logged(client, kit, monkeypatch, caplog):
    model_id = await client.model()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(client.service.core.engine, "run_pass", broken)
    with caplog.at_level(logging.ERROR, "tinkex_py.local"):
        submitted = await client.send_pass(kit.message(model_id, 1, [kit.datum(3, 1)]))
        answer = (await client.final(submitted.json()["request_id"])).json()
    assert answer == {"error": "ZeroDivisionError: by nothing", "category": "server"}
    assert "ZeroDivisionError" in caplog.text


async def test_the_apps_lifespan_runs_the_service():
    service = LocalService()
    received: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    sent: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    await received.put({"type": "lifespan.startup"})
    running = asyncio.create_task(service.app({"type": "lifespan", "app": None}, received.get, sent.put))
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    assert await status(service) == 200
    await received.put({"type": "lifespan.shutdown"})
    assert (await sent.get())["type"] == "lifespan.shutdown.complete"
    await running
    assert engine_threads() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch=0"),
        ({"graph_budget_bytes": -1}, "graph_budget_bytes=-1"),
        ({"hold_seconds": 60}, "hold_seconds=60"),
        ({"api_key": ""}, "api_key must be a non-empty ASCII text"),
    ],
)
async def test_bad_options_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        Options(**fields)


async def test_importing_the_package_loads_nothing_heavy():
    program = (
        "import sys, tinkex_py.local, tinkex_py.__main__\n"
        "tinkex_py.local.LocalService().app\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.decode().strip() == "[]"


SPANS_PROGRAM = """
import asyncio, httpx
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tinkex_py.local import LocalService

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

async def main():
    transport = httpx.ASGITransport(app=LocalService().app)
    async with httpx.AsyncClient(transport=transport, base_url="http://local") as http:
        print((await http.get("/api/v1/healthz")).status_code, (await http.get("/api/v1/sessions")).status_code)
    print([span.name for span in exporter.get_finished_spans()])

asyncio.run(main())
"""


async def test_the_service_puts_nothing_into_the_traces_of_its_process():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SPANS_PROGRAM, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.decode().split("\n") == ["200 503", "[]", ""]


async def test_a_missing_extra_is_named(monkeypatch):
    from tinkex_py.errors import MissingExtra
    from tinkex_py.local import models

    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"transformers is not installed. Run: pip install 'tinkex-py\[local\]'"):
        await LocalService().start()
