"""A key and a prompt planted everywhere, everything used, and all that comes out searched for them.

`tests/client/test_secrecy.py` has the client's side against services that echo the key.
"""

import asyncio
import base64
import contextlib
import json
import logging
import pickle
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.client.recorder import QUICK
from tests.client.test_secrecy import everything_about
from tests.support.scripted_server import Behaviour, ScriptedServer, answer
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    Datum,
    InvalidSpec,
    ModelInput,
    Pipeline,
    RegularizerSpec,
    RetryPolicy,
    SamplingParams,
    TinkexConfig,
    TinkexError,
    telemetry,
)
from tinkex_py.base_losses import NLL
from tinkex_py.integrations.opentelemetry import OpenTelemetry
from tinkex_py.local import LocalOptions, LocalService, serve
from tinkex_py.regularizers import L2
from tinkex_py.runs import RunInfo, TrainSettings, read_run, read_steps, train
from tinkex_py.runs.folder import RunFolder
from tinkex_py.runs.pairs import read_pairs
from tinkex_py.runs.report import write_report

pytestmark = pytest.mark.asyncio
KEY = "tml-PLANTED-0123456789abcdef"
PROMPT = "Planted~prompt: Jane's password is swordfish."
TOKENS = list(PROMPT.encode())
PART = slice(16, 26)


def forms_of_the_prompt() -> dict[str, bytes]:
    """How a prompt could show: as text, as numbers in a row, and as bytes in other clothes."""
    part = TOKENS[PART]
    raw = {name: np.array(part, name).tobytes() for name in ("<i4", "<i8", "<f4")}
    forms = {
        "text": PROMPT[PART].encode(),
        "numbers": ", ".join(map(str, part)).encode(),
        "JSON": ",".join(map(str, part)).encode(),
        "rows": " ".join(map(str, part)).encode(),
        **raw,
    }
    for name, content in raw.items():
        forms[f"{name} as repr"] = repr(content)[2:-1].encode()
        forms[f"{name} as base64"] = base64.b64encode(np.array(TOKENS, name).tobytes())[32:64]
        forms[f"{name} as hex"] = content.hex().encode()
    return forms


SECRETS = {"key": KEY.encode(), **forms_of_the_prompt()}


def check_clean(where: str, content: str | bytes) -> None:
    searched = content.encode("utf-8", "replace") if isinstance(content, str) else content
    searched += re.sub(rb"\s+", b" ", searched)  # arrays are printed in columns
    for name, secret in SECRETS.items():
        at = searched.find(secret)
        assert at < 0, f"{where} shows the {name}: ...{searched[max(0, at - 200) : at + 60]!r}"


async def test_the_search_itself_finds_them():
    for content in (f"x{KEY}", PROMPT, repr(TOKENS), str(np.array(TOKENS)), repr(np.array(TOKENS, "<i4").tobytes())):
        with pytest.raises(AssertionError, match="shows the"):
            check_clean("this", content)
    with pytest.raises(AssertionError, match="shows the"):
        check_clean("this", base64.b64encode(np.array(TOKENS, "<i8").tobytes()))


class Everything:
    """All output of the process: what is logged at any level by anybody, events, structlog, warnings and errors."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str]] = []
        self.events: list[Any] = []
        self.lines: list[Any] = []
        self.errors: list[BaseException] = []

    def check(self) -> None:
        for name, text in self.records:
            text.encode()  # a log file takes it
            check_clean(f"the log of {name}", text)
        for event in self.events:
            check_clean(f"the event {event.name}", repr(event))
        for line in self.lines:
            check_clean("a structlog line", repr(line))
        for error in self.errors:
            check_clean(f"a {type(error).__name__}", everything_about(error))


class Collector(logging.Handler):
    def __init__(self, everything: Everything) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(message)s"))
        self._everything = everything

    def emit(self, record: logging.LogRecord) -> None:
        # With its traceback, and whatever else it carries.
        text = f"{self.format(record)}\n{record.__dict__!r}"
        self._everything.records.append((record.name, text))


@pytest.fixture
def everything(recwarn) -> Iterator[Everything]:
    made = Everything()
    handler, root = Collector(made), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    telemetry.attach(made.events.append)
    telemetry.attach_logger()
    try:
        yield made
        made.lines += [str(warning.message) for warning in recwarn]
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


@asynccontextmanager
async def served(options: LocalOptions) -> AsyncIterator[tuple[str, LocalService]]:
    """A service behind a socket, and the service itself."""
    made: list[LocalService] = []
    original = LocalService.__init__

    def remember(self: LocalService, given: LocalOptions | None = None) -> None:
        made.append(self)
        original(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalService, "__init__", remember)
        listening: asyncio.Queue[str] = asyncio.Queue()
        running = asyncio.create_task(serve(options, on_listening=listening.put_nowait))
        try:
            yield await listening.get(), made[0]
        finally:
            running.cancel()
            await asyncio.wait([running])


def planted(**inputs: Any) -> Datum:
    count = len(TOKENS) - 1
    fields = {"target_tokens": TOKENS[1:], "weights": [1.0] * count, **inputs}
    return Datum(model_input=ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs=fields)


def failing(data: Any, logprobs: Any) -> Any:
    return logprobs.sum() * float("nan"), {}


async def use_everything(service: AsyncServiceClient, everything: Everything, folder: Path) -> None:
    """Every kind of call, as it succeeds and as it fails."""

    @contextlib.asynccontextmanager
    async def refused(kind: type[BaseException] = TinkexError) -> AsyncIterator[None]:
        with pytest.raises(kind) as caught:
            yield
        everything.errors.append(caught.value)

    training = await service.create_lora_training_client("tiny", rank=4, seed=1, user_metadata={"prompt": PROMPT})
    data = [planted()]
    await training.forward(data)
    await training.forward_backward(data)
    await training.forward_backward_custom(data, NLL(), regularizers=[RegularizerSpec(fn=L2(), weight=0.1)])
    await training.optim_step(AdamParams(learning_rate=1e-3))
    async with refused():
        await training.forward_backward_custom(data, NLL(), regularizers=[RegularizerSpec(fn=failing, weight=0.1)])
    async with refused():
        await training.forward_backward(data, loss_fn="no_such_loss")
    async with refused():
        await training.forward_backward(data, loss_fn="ppo")
    async with refused():
        await training.forward_backward([planted(weights=[float("nan")] * 3)])
    async with refused():
        await training.forward_backward([Datum(model_input=ModelInput.from_ints(TOKENS), loss_fn_inputs={})])
    async with refused():
        await training.forward_backward(
            [Datum(model_input=ModelInput.from_ints(TOKENS * 99), loss_fn_inputs={"target_tokens": TOKENS * 99})]
        )
    async with refused():
        planted(target_tokens=[TOKENS, TOKENS[1:]])
    async with refused():
        ModelInput.from_ints([*TOKENS, -1])
    async with refused():
        ModelInput.from_text(PROMPT, PROMPT)
    saved = await training.save_state("one")
    async with refused():
        await training.save_state("../" + "x" * 200)
    sampler = await training.save_weights_and_get_sampling_client()
    prompt = ModelInput.from_ints(TOKENS)
    await sampler.sample(prompt, num_samples=2, sampling_params=SamplingParams(max_tokens=4, stop=[PROMPT], seed=1))
    await sampler.compute_logprobs(prompt)
    async with refused():
        await sampler.sample(ModelInput.from_ints(TOKENS * 99))
    async with refused():
        await sampler.sample(ModelInput.from_ints([*TOKENS, 5000]))
    async with refused():
        SamplingParams(stop={PROMPT: 1})
    rest = service.create_rest_client()
    await rest.download_checkpoint(saved.path, folder / "download")
    async with refused():
        await rest.download_checkpoint(saved.path, folder / "download")
    async with refused():
        await service.create_training_client_from_state("tinker://a/weights/b")
    for thing in (service, training, sampler, rest, prompt, data, data[0], data[0].loss_fn_inputs, service.__dict__):
        check_clean(f"the repr of a {type(thing).__name__}", f"{thing!r} {thing}")
    await training.aclose()


async def test_all_calls_over_http(everything, tmp_path, capfd):
    state = tmp_path / "state"
    async with served(LocalOptions(api_key=KEY, state_dir=state)) as (address, local):
        config = TinkexConfig(base_url=address, api_key=KEY, retry=QUICK)
        check_clean("the configuration", repr(config) + str(config) + repr(pickle.dumps(config.api_key)))
        spans = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(spans))
        with OpenTelemetry(tracer_provider=provider):
            async with AsyncServiceClient(config) as service:
                await use_everything(service, everything, tmp_path)
        assert len(spans.get_finished_spans()) > 20
        for span in spans.get_finished_spans():
            check_clean("a span", span.to_json())
        wrong = AsyncServiceClient(TinkexConfig(base_url=address, api_key=KEY + "x", retry=QUICK))
        with pytest.raises(TinkexError) as caught:
            async with wrong:
                pass
        everything.errors.append(caught.value)
        check_clean("the options", repr(local.options))
    everything.check()
    out, err = capfd.readouterr()
    check_clean("standard output", out)
    check_clean("standard error", err)
    # What stays on the disk has the metadata that the client asked it to keep, and no more.
    for file in state.rglob("*"):
        if file.is_file() and not file.name.startswith("state.sqlite3"):
            check_clean(file.name, file.read_bytes())
    kept = b"".join(file.read_bytes() for file in state.glob("state.sqlite3*"))
    assert KEY.encode() not in kept
    assert kept.replace(PROMPT.encode(), b"").find(PROMPT[PART].encode()) < 0
    assert any(name.startswith("tinkex") for name, _ in everything.records)
    assert everything.events
    assert len(everything.errors) > 12


async def test_a_crash_of_the_service_is_logged_without_what_it_was_about(everything, tmp_path, capfd):
    """The error's text quotes the prompt: its client may read that, the log of the service may not."""
    async with served(LocalOptions(api_key=KEY)) as (address, local):
        retry = RetryPolicy(deadline=10.0, max_attempts=2, initial_wait=0.0, max_wait=0.01)
        config = TinkexConfig(base_url=address, api_key=KEY, retry=retry)
        async with AsyncServiceClient(config) as service:
            training = await service.create_lora_training_client("tiny", rank=4)
            sampler = await service.create_sampling_client(base_model="tiny")

            def crash(*_: object, **__: object) -> None:
                raise RuntimeError(f"cannot work on {PROMPT} {TOKENS}")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(local.core.engine, "run_pass", crash)
                patch.setattr(local.core.engine, "draw", crash)
                with pytest.raises(TinkexError, match="RuntimeError"):
                    await training.forward([planted()])
                with pytest.raises(TinkexError, match="RuntimeError"):
                    await sampler.sample(ModelInput.from_ints(TOKENS))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(local.core, "in_order", crash)
                with pytest.raises(TinkexError):
                    await training.forward([planted()])
    everything.check()
    check_clean("standard error", "".join(capfd.readouterr()))
    logged = "\n".join(text for name, text in everything.records if name == "tinkex_py.local")
    assert logged.count("RuntimeError") >= 3
    assert "in crash" in logged, "where it happened is told"


async def test_a_runs_folder(everything, local_bench, tmp_path):
    """Runs that end well, that fail in a term whose error quotes the data, and that are refused by the service."""

    def quoting(data: Any, logprobs: Any) -> Any:
        raise ValueError(f"I do not like {PROMPT} {TOKENS} {KEY}")

    bench = local_bench(api_key=KEY)
    with structlog.testing.capture_logs() as lines:
        async with bench.service as service:
            for number, term in enumerate((L2(), failing, quoting)):
                training = await service.create_lora_training_client("tiny", rank=4)
                composed = Pipeline(NLL(), [RegularizerSpec(fn=term, weight=0.1, name="term")])
                work = train(
                    service,
                    training,
                    [[planted()]] * 2,
                    composed,
                    folder=tmp_path / str(number),
                    settings=TrainSettings(steps=2, resends=0, restarts=0),
                    optimizer=AdamParams(learning_rate=1e-3),
                )
                if number == 0:
                    await work
                else:
                    with pytest.raises(TinkexError):
                        await work
    assert lines
    everything.lines += lines
    everything.check()
    for file in tmp_path.rglob("*"):
        if file.is_file():
            check_clean(file.name, file.read_bytes())
    assert {file.name for file in tmp_path.rglob("*.json*")} == {"run.json", "steps.jsonl", "state.json"}
    report = write_report([tmp_path / str(number) for number in range(3)], tmp_path / "report")
    check_clean("the report", report.page.read_bytes())
    check_clean("the report's summary", report.model_dump_json())


@pytest.mark.parametrize("content", [f'{{"prompt": "{PROMPT}"}}\n'.encode(), PROMPT.encode() + b"\xff\n", b"\x80"])
async def test_a_file_of_prompts_that_cannot_be_read(tmp_path, content):
    (tmp_path / "pairs.jsonl").write_bytes(content)
    with pytest.raises(TinkexError, match=r"pairs\.jsonl") as caught:
        read_pairs(tmp_path / "pairs.jsonl")
    check_clean("the error", everything_about(caught.value))


async def test_files_of_a_run_that_cannot_be_read(tmp_path):
    for name, read in (("run.json", read_run), ("steps.jsonl", read_steps)):
        (tmp_path / name).write_text(f'{{"prompt": "{PROMPT}"}}\n\n')
        with pytest.raises(TinkexError) as caught:
            read(tmp_path)
        check_clean("the error", everything_about(caught.value))


class LogFile(logging.FileHandler):
    """A host's log file; what cannot be written to it is an error instead of a note on the screen."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the library's name)
        raise  # noqa: PLE0704  (called while the error is handled)


@pytest.fixture
def log_file(tmp_path) -> Iterator[Path]:
    """Everything that this package logs, as a host keeps it."""
    handler, logger = LogFile(tmp_path / "host.log"), logging.getLogger("tinkex_py")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield tmp_path / "host.log"
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(before)


HALF = "\ud800"
ODD_TEXT = f"{HALF}{KEY}\udfff {KEY[:10]}{HALF}{KEY[10:]}"
"""Half characters around a key and in it. Were they left out instead of replaced, the second would be the key again."""

ODD_ANSWERS: dict[str, tuple[str, Behaviour]] = {
    "an error": ("create_model", answer(400, json={"detail": ODD_TEXT, HALF: [ODD_TEXT], "code": ODD_TEXT})),
    "an error without form": ("create_model", answer(422, ODD_TEXT.encode("utf-8", "surrogatepass"))),
    "nearly UTF-8": ("create_model", answer(400, f'{{"error": "{ODD_TEXT}"}}'.encode("utf-8", "surrogatepass"))),
    "a failure": ("retrieve_future", answer(json={"error": ODD_TEXT, "category": HALF})),
    "a failed result": ("retrieve_future", answer(400, json={"detail": {HALF: ODD_TEXT}})),
    "an id": ("create_model", answer(json={"request_id": HALF})),
    "the id of a model": ("retrieve_future", answer(json={"model_id": ODD_TEXT})),
    "the name of a session": ("create_session", answer(json={"session_id": ODD_TEXT})),
    "a word on the queue": (
        "retrieve_future",
        answer(408, json={"queue_state": HALF, "queue_state_reason": HALF}),
    ),
}


@pytest.mark.parametrize("name", ODD_ANSWERS)
async def test_half_characters_of_a_service_break_nothing_and_hide_no_key(everything, log_file, tmp_path, name):
    path, odd = ODD_ANSWERS[name]
    retry = RetryPolicy(deadline=5.0, max_attempts=1, initial_wait=0.0, max_wait=0.01)
    with structlog.testing.capture_logs() as lines:
        async with ScriptedServer() as server:
            right = {
                "client/config": {},
                "create_session": {"session_id": "s"},
                "create_model": {"request_id": "1"},
                "retrieve_future": {"model_id": "m"},
                "sessions/s/finish": {},
            }
            for endpoint, told in right.items():
                server.script(f"/api/v1/{endpoint}", answer(json=told))
            behaviours = (odd, answer(json={"error": "in the end"})) if name == "a word on the queue" else (odd,)
            server.script(f"/api/v1/{path}", *behaviours)
            config = TinkexConfig(base_url=server.url, api_key=KEY, retry=retry)
            with pytest.raises(TinkexError) as caught:
                async with AsyncServiceClient(config) as service:
                    await service.create_lora_training_client("tiny")
    json.dumps(everything_about(caught.value), ensure_ascii=False).encode()
    json.dumps([dict(line) for line in lines], ensure_ascii=False, default=repr).encode()
    json.dumps([dict(event.metadata) for event in everything.events], ensure_ascii=False).encode()
    everything.errors.append(caught.value)
    everything.lines += lines
    everything.check()
    check_clean("the host's log", log_file.read_bytes())
    with RunFolder(tmp_path / "run") as folder:
        folder.write_run(RunInfo(name="x", started_at=1.0, updated_at=2.0, status="failed", reason=str(caught.value)))
        assert folder.read_run() is not None
    check_clean("run.json", (tmp_path / "run" / "run.json").read_bytes())


async def test_a_term_cannot_be_named_with_half_a_character():
    with pytest.raises(InvalidSpec, match="name must not contain half a character"):
        RegularizerSpec(fn=L2(), weight=0.1, name=f"half {HALF}")
