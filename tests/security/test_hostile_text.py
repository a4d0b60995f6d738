"""Text of others in every field that reaches a terminal, a page or a file: it is shown, and steers nothing."""

import ast
import asyncio
import csv
import io
import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import structlog
from playwright.async_api import async_playwright
from rich.console import Console
from typer.testing import CliRunner

import tinkex_py
from tests.dashboard.served import CHROMIUM, dashboard
from tests.runs.made_up_runs import made_up_step
from tests.runs.support import run_info
from tests.support.served import serving
from tinkex_py import AsyncServiceClient, Datum, InvalidResponse, ModelInput, Pipeline, RegularizerSpec, TinkexError
from tinkex_py.base_losses import NLL
from tinkex_py.cli import app
from tinkex_py.html_table import html_facts, html_table
from tinkex_py.integrations.trackers import JsonlSink
from tinkex_py.local.models import load_tokenizer
from tinkex_py.regularizers import L2
from tinkex_py.runs import StepRecord, TrainSettings, read_run, read_steps, train
from tinkex_py.runs.folder import RunFolder
from tinkex_py.runs.progress import ProgressBar, ProgressLines, ProgressView, notebook_bar
from tinkex_py.runs.rich_progress import RichProgress
from tinkex_py.telemetry.logs import write_line
from tinkex_py.unicode import plain_json, plain_line, plain_text

# A title of the window, a cleared screen, colours; the same as C1; backspace, carriage return; overrides of direction;
# separators of lines; markup of rich and HTML; a formula.
NAME = "=1+1\x1b]0;PWNED\x07\x1b[2J\x1b[31m[bold]x[nope]\x9b2J\x9d0;PWNED\x9c\x7f\b\r\u202egpj\u2066\u200f\u2028\x85"
HOSTILE = f"{NAME}[/nope]<img src=x onerror=alert(1)></td>"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
OF_RICH = re.compile("\x1b\\[[0-9;]*[mAKJHhl]|\x1b\\[\\?25[hl]|\r")
"""What a live display writes itself: colours, moves of the cursor, its visibility."""


def steers(text: str) -> list[str]:
    return [text[max(0, found.start() - 40) : found.end() + 20] for found in STEERING.finditer(text)]


def check_terminal(text: str) -> None:
    """The text is shown, and nothing of it arrives as a command."""
    assert "PWNED" in text
    assert "[bold]x[nope]" in text, "square brackets are no markup"
    assert not steers(text)


def test_the_search_finds_each_of_them() -> None:
    assert len(steers(HOSTILE)) == 15
    with pytest.raises(AssertionError):
        check_terminal(HOSTILE)


@pytest.mark.parametrize("plain", [plain_text, plain_line])
def test_plain_text_keeps_everything_else(plain: Callable[[str], str]) -> None:
    kept = "é 漢字\u3000\u00a0👩\u200d👩 \u0645\u06cc\u200c\u062e 1 < 2 & [x]"  # joiners are part of words
    assert plain(kept) == kept
    assert plain_text("a\n\tb") == "a\n\tb"
    assert plain_line("a\n\tb") == "a\ufffd\ufffdb"
    assert plain(HOSTILE) == STEERING.sub("\ufffd", HOSTILE)


def test_plain_json_is_the_same_value_in_one_line() -> None:
    text = json.dumps({HOSTILE: [HOSTILE]}, ensure_ascii=False)
    assert len(plain_json(text).splitlines()) == 1
    assert json.loads(plain_json(text)) == {HOSTILE: [HOSTILE]}
    assert not steers(plain_json(text))


# Commands against a service


Answers = Mapping[str, tuple[int, object]]


@pytest.fixture
def service() -> Iterator[Callable[[Answers], str]]:
    """Starts a service that answers the paths that end as these do, and refuses all others in hostile words."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                path = self.path.partition("?")[0]
                refusal = (418, {"detail": HOSTILE, "code": HOSTILE})
                status, value = next((answers[end] for end in answers if path.endswith(end)), refusal)
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer  # noqa: N815  (the library's names)

            def log_message(self, *_: object) -> None:
                """Nothing is printed."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), name="hostile service").start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command as in a terminal, and returns all it prints."""
    monkeypatch.setenv("TINKER_API_KEY", "tml-a-key-of-the-tests")
    monkeypatch.setenv("COLUMNS", "4000")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), prog_name="tinkex-py", color=True)
        assert not result.exception or isinstance(result.exception, SystemExit), result.exception
        return result.output

    return run


CONNECTED: Answers = {"client/config": (200, {}), "create_session": (200, {"session_id": "s"}), "/finish": (200, {})}
CHECKPOINT = {
    "checkpoint_id": HOSTILE,
    "checkpoint_type": HOSTILE,
    "tinker_path": HOSTILE,
    "user_metadata": {HOSTILE: HOSTILE},
}
RUN = {
    "training_run_id": HOSTILE,
    "base_model": HOSTILE,
    "model_owner": HOSTILE,
    "last_checkpoint": CHECKPOINT,
    "user_metadata": {HOSTILE: HOSTILE},
}
PATH = "tinker://r/weights/n"
REFUSED = {
    "check": ["check"],
    "runs": ["runs"],
    "a run": ["runs", "r"],
    "checkpoints list": ["checkpoints", "list"],
    "checkpoints download": ["checkpoints", "download", PATH, "folder"],
    "checkpoints delete": ["checkpoints", "delete", "--yes", PATH],
    "checkpoints ttl": ["checkpoints", "ttl", PATH, "60"],
    "sample": ["sample", "tiny", "--prompt", "x"],
}


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["words", "JSON"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_service_says_in_a_refusal(name, options, service, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINKER_BASE_URL", service(CONNECTED))
    check_terminal(command(*REFUSED[name], *options))


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["words", "JSON"])
@pytest.mark.parametrize("name", ["check", "runs", "checkpoints list"])
def test_what_a_service_lists(name, options, service, command, monkeypatch):
    model = {"model_name": HOSTILE, "sampleable": False}
    answers = {
        **CONNECTED,
        "get_server_capabilities": (200, {"supported_models": [model]}),
        "training_runs": (200, {"training_runs": [RUN]}),
        "checkpoints": (200, {"checkpoints": [CHECKPOINT]}),
    }
    monkeypatch.setenv("TINKER_BASE_URL", service(answers))
    printed = command(*name.split(), *options)
    check_terminal(printed)
    if options:
        (line,) = printed.splitlines()
        assert HOSTILE in list(strings_of(json.loads(line)))


def strings_of(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["words", "JSON"])
def test_what_a_model_says(options, service, command, monkeypatch):
    tokens = load_tokenizer("tiny").encode(HOSTILE)
    answers = {
        **CONNECTED,
        "create_sampling_session": (200, {"sampling_session_id": "a"}),
        "asample": (200, {"request_id": "1"}),
        "retrieve_future": (200, {"sequences": [{"tokens": tokens, "stop_reason": "length"}]}),
    }
    monkeypatch.setenv("TINKER_BASE_URL", service(answers))
    check_terminal(command("sample", "tiny", "--prompt", "x", *options))


# Commands on files of others


def hostile_run(folder: Path) -> Path:
    """A run whose every text is hostile."""
    info = run_info(
        name=HOSTILE,
        model=HOSTILE,
        status="failed",
        reason=HOSTILE,
        versions={HOSTILE: HOSTILE},
        config={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
    )
    with RunFolder(folder) as run:
        run.write_run(info)
        for number in (1, 2):
            step = made_up_step(number, [HOSTILE], norms=False)
            run.append_step(step.model_copy(update={"evaluation": {HOSTILE: 1.0}, "samples": {HOSTILE: HOSTILE}}))
    return folder


async def recorded(folder: Path) -> None:
    async with AsyncServiceClient.local(model="tiny") as local:
        training = await local.create_lora_training_client("tiny", rank=2)
        datum = Datum(model_input=ModelInput.from_ints([1, 2, 3]), loss_fn_inputs={"target_tokens": [2, 3, 4]})
        specs = [RegularizerSpec(fn=L2(), weight=0.1, name=HOSTILE)]
        await training.forward_backward_custom([datum], NLL(), regularizers=specs, record=folder)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of somebody else."""
    folder = tmp_path_factory.mktemp("records") / "record"
    asyncio.run(recorded(folder))
    return folder


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["words", "JSON"])
@pytest.mark.parametrize("failed", [False, True])
def test_replay(options, failed, record, command, tmp_path):
    if failed:
        content = json.loads((record / "record.json").read_text())
        content |= {"output": None, "failure": {"error": HOSTILE, "term": HOSTILE, "message": HOSTILE}}
        for file in record.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "record.json").write_text(json.dumps(content))
        record = tmp_path
    check_terminal(command("replay", str(record), *options))


def test_a_record_is_text_that_can_be_looked_at(record):
    assert not steers((record / "record.json").read_text())


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["words", "JSON"])
def test_report(options, command, tmp_path):
    run = hostile_run(tmp_path / NAME)
    check_terminal(command("report", str(run), "--out", str(tmp_path / "report"), *options))
    page = (tmp_path / "report" / "index.html").read_text()
    parsed = Page(page)
    assert "img" not in parsed.sources, "only charts are images"
    assert not steers(page)
    assert "\ufffd]0;PWNED" in parsed.text


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["words", "JSON"])
def test_train(options, command, tmp_path):
    """The name of the run, and the data of an invalid configuration."""
    (tmp_path / "bad.yaml").write_text(json.dumps({"model": "tiny", HOSTILE: HOSTILE}))
    check_terminal(command("train", str(tmp_path / "bad.yaml"), "--name", "x", *options))
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    config = {
        "model": "tiny",
        "data": {"path": str(tmp_path / "data.jsonl"), "batch_size": 1},
        "loss": {"regularizers": [{"term": "L2", "weight": 0.1, "name": HOSTILE, "options": {"mask": "weights"}}]},
        "training": {"steps": 1},
    }
    (tmp_path / "good.yaml").write_text(json.dumps(config))
    printed = command("train", str(tmp_path / "good.yaml"), "--runs-dir", str(tmp_path), "--name", NAME, *options)
    assert "finished" in printed, printed
    check_terminal(printed)


class Page(HTMLParser):
    """The text of a page, and the tags that load something other than a chart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "onerror" in given or not str(given.get("src", "data:")).startswith("data:"):
            self.sources.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


# The progress of a run


def step() -> StepRecord:
    return made_up_step(1, [HOSTILE]).model_copy(update={"evaluation": {HOSTILE: 1.0}})


def views(stream: io.StringIO) -> dict[str, ProgressView]:
    def bar(**options: Any) -> Any:
        return notebook_bar()(file=stream, mininterval=0, ncols=4000, **options)

    console = Console(file=stream, force_terminal=True, width=1000)
    return {"lines": ProgressLines(stream), "bar": ProgressBar(bar), "table": RichProgress(console)}


@pytest.mark.parametrize("name", ["lines", "bar", "table"])
def test_progress(name):
    stream = io.StringIO()
    view = views(stream)[name]
    info = run_info(name=HOSTILE, status="failed", reason=HOSTILE, total_steps=2)
    view.start(info, 0)
    view.doing(f"waiting: {HOSTILE}")
    view.step(step())
    view.finish(info)
    check_terminal(OF_RICH.sub("", stream.getvalue()) if name != "lines" else stream.getvalue())


@pytest.mark.asyncio
async def test_a_training_run_with_a_live_table_and_its_files(tmp_path):
    stream = io.StringIO()
    view = RichProgress(Console(file=stream, force_terminal=True, width=1000))
    data = [Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]})]
    pipeline = Pipeline(NLL(), [RegularizerSpec(fn=L2(), weight=0.1, name=HOSTILE)])
    async with AsyncServiceClient.local(model="tiny") as local:
        training = await local.create_lora_training_client("tiny", rank=2)
        settings = TrainSettings(steps=2)
        sinks = [JsonlSink(tmp_path / "all.jsonl")]
        await train(
            local, training, [data] * 2, pipeline, folder=tmp_path / NAME, settings=settings, progress=view, sinks=sinks
        )
    check_terminal(OF_RICH.sub("", stream.getvalue()))
    for file in (tmp_path / NAME / "steps.jsonl", tmp_path / "all.jsonl"):
        assert len(file.read_text().splitlines()) == 2, "for every reader of lines"
        assert not steers(file.read_text())
    assert not steers((tmp_path / NAME / "run.json").read_text())
    assert [list(record.losses[0].regularizers) for record in read_steps(tmp_path / NAME)] == [[HOSTILE]] * 2
    assert read_run(tmp_path / NAME).name == NAME


# Logs, errors, notebooks


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    handler, logger = logging.FileHandler(tmp_path / "host.log", encoding="utf-8"), logging.getLogger("tinkex_py")
    logger.addHandler(handler)
    yield tmp_path / "host.log"
    logger.removeHandler(handler)
    handler.close()


def test_log_lines(log_file, capsys):
    write_line(HOSTILE, {"field": f"{HOSTILE}\nforged line", HOSTILE: [HOSTILE]}, logging.WARNING)
    text = log_file.read_text(encoding="utf-8")
    check_terminal(text)
    assert len(text.splitlines()) == 1
    before = structlog.get_config()
    structlog.configure(processors=[structlog.dev.ConsoleRenderer(colors=False)])
    try:
        write_line("event", {"field": f"{HOSTILE}\nforged line", "list": [HOSTILE]}, logging.WARNING)
    finally:
        structlog.configure(**before)
        structlog.reset_defaults()
    text = capsys.readouterr().out
    check_terminal(text)
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("error", [TinkexError(HOSTILE), InvalidResponse(f"a service said {HOSTILE}")])
def test_errors_in_a_traceback(error, capsys):
    sys.excepthook(type(error), error, None)
    check_terminal(capsys.readouterr().err)
    assert HOSTILE in error.args[0], "programs get the text unchanged"


@pytest.mark.parametrize(
    "html",
    [
        html_table(HOSTILE, [HOSTILE], [[HOSTILE]], below=HOSTILE),
        html_facts(HOSTILE, {HOSTILE: HOSTILE}),
        run_info(name=HOSTILE, status="failed", reason=HOSTILE, config={HOSTILE: HOSTILE})._repr_html_(),
        Pipeline(NLL(), [RegularizerSpec(fn=L2(), weight=0.1, name=HOSTILE)])._repr_html_(),
        RegularizerSpec(fn=L2(), weight=0.1, name=HOSTILE)._repr_html_(),
        made_up_step(1, [HOSTILE]).losses[0]._repr_html_(),
    ],
    ids=["table", "facts", "run", "pipeline", "spec", "output"],
)
def test_notebooks(html):
    page = Page(html)
    assert page.sources == []
    assert not steers(html)
    assert "\ufffd]0;PWNED" in page.text


# Servers


@pytest.mark.asyncio
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
async def test_dashboard(tmp_path):
    """In a browser: names are texts, and a cell of the CSV file is no formula."""
    hostile_run(tmp_path / NAME)
    hostile_run(tmp_path / "other")
    async with dashboard(tmp_path) as address, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        await page.goto(f"{address}/?{httpx.QueryParams({'run': NAME})}")
        await page.locator("#losses canvas").wait_for()
        assert await page.locator("#runs .name").count() == 2
        assert await page.locator("img").count() == 0
        for panel, place in (("#losses", "first"), ("#contributions", "only")):
            async with page.expect_download() as download:
                await page.locator(f"{panel} button", has_text="CSV").first.click()
            file = await download.value
            rows = list(csv.reader(io.StringIO(content_of(await file.path()))))
            assert not any(cell.startswith(("=", "+", "-", "@")) for cell in rows[0]), place
            assert not steers(file.suggested_filename)
        assert "'" + NAME[:4] in rows[0][1]
        await browser.close()
    assert wrong == []


def content_of(path: Path) -> str:
    return path.read_bytes().decode()


def test_serve(tmp_path):
    """Requests of anybody do not reach the terminal of the service."""
    with (tmp_path / "log").open("w") as log, serving("--state-dir", str(tmp_path / "state"), log=log) as (_, address):
        headers = {"x-hostile": "\x1b]0;PWNED\x07"}
        for path in ("create_model", "create_session", f"training_runs/{quote(HOSTILE)}", "nowhere"):
            body = {"session_id": HOSTILE, "base_model": HOSTILE, "tags": [HOSTILE], "seq_id": HOSTILE}
            httpx.post(f"{address}/api/v1/{path}", json=body, headers=headers)
    assert not steers((tmp_path / "log").read_text())


def test_commands_print_through_one_module():
    """`echo`, `echo_json` and `show_table` replace what steers; nothing else in the commands writes."""
    writers = {"print", "echo", "secho", "write"}
    folder = Path(tinkex_py.__file__).parent / "commands"
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in writers:
                assert file.name == "printing.py", f"{file.name}:{node.lineno} prints by itself"
