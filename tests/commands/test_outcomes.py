"""Exit codes, and the one line that says why."""

import asyncio
import itertools
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import typer

from tinkex_py import errors
from tinkex_py.commands.common.running import exit_code, one_line_errors, run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("one\ntwo"), 2),
        (errors.InvalidData("m"), 2),
        (errors.MissingExtra("peft", "huggingface"), 2),
        (errors.InvalidSpec("m"), 2),
        (errors.PipelineError("m"), 2),
        (PermissionError(13, "no"), 2),
        (errors.NonFiniteLoss("m", name="kl"), 1),
        (errors.ConnectionFailed("m"), 1),
        (errors.TimeoutExceeded("m"), 1),
        (errors.InvalidResponse("m"), 1),
        (errors.Authentication("m", status=401), 1),
        (errors.PermissionDenied("m", status=403), 1),
        (errors.RequestFailed("m"), 1),
        (errors.UnsupportedFeature("m"), 1),
    ],
)
def test_errors_and_their_codes(error, code, capsys):
    assert exit_code(error) == code
    with pytest.raises(typer.Exit) as caught, one_line_errors("thing"):
        raise error
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == f"tinkex-py thing: {str(error).replace(chr(10), ' ')}\n"


def test_a_missing_library_names_its_extra(capsys):
    with pytest.raises(typer.Exit) as caught, one_line_errors("thing", extra="local"):
        raise ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners")
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == ("tinkex-py thing: peft is not installed. Run: pip install 'tinkex-py[local]'\n")


LOCAL_TRAINING = "model: tiny\ndata: {path: pairs.jsonl}\n"
COMMANDS = [
    ("check", "rich", "cli"),
    ("runs", "rich", "cli"),
    ("checkpoints list", "rich", "cli"),
    ("checkpoints download tinker://r/weights/n", "rich", "cli"),
    ("checkpoints download tinker://r/weights/n --adapter", "peft", "huggingface"),
    ("dashboard .", "fastapi", "dashboard"),
    ("dashboard .", "uvicorn", "dashboard"),
    ("demo", "matplotlib", "demo"),
    ("demo", "peft", "demo"),
    ("lint local.yaml", "yaml", "cli"),
    ("replay step --pipeline nowhere:nothing", "safetensors", "replay"),
    ("report run", "jinja2", "report"),
    ("report run", "matplotlib", "report"),
    ("serve", "uvicorn", "local"),
    ("serve", "transformers", "local"),
    ("sample some/model --prompt x", "transformers", "local"),
    ("sample --local tiny --prompt x", "fastapi", "local"),
    ("train local.yaml", "yaml", "cli"),
    ("train local.yaml", "safetensors", "local"),
    ("train remote.yaml", "transformers", "local"),
]


@pytest.mark.parametrize(("words", "module", "extra"), COMMANDS)
def test_a_command_names_the_missing_extra_before_it_does_anything(
    words, module, extra, plain_command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:1")  # a request would fail
    Path("local.yaml").write_text(LOCAL_TRAINING)
    Path("remote.yaml").write_text(LOCAL_TRAINING + "base_url: http://127.0.0.1:1\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # not found by any import
    result = plain_command(*words.split())
    name = " ".join(itertools.takewhile(lambda word: word in ("checkpoints", "list", "download"), words.split()))
    expected = f"{module} is not installed. Run: pip install 'tinkex-py[{extra}]'"
    assert result.stderr == f"tinkex-py {name or words.split()[0]}: {expected}\n"
    assert result.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local.yaml", "remote.yaml"]


def test_errors_of_our_own_code_are_not_hidden():
    with pytest.raises(ZeroDivisionError), one_line_errors("thing"):
        raise ZeroDivisionError
    with pytest.raises(BrokenPipeError), one_line_errors("thing"):  # typer ends in silence
        raise BrokenPipeError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_work(number):
    ended = []

    async def work():
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    before = signal.getsignal(number)
    with pytest.raises(typer.Exit) as caught, one_line_errors("thing"):
        run(work())
    assert caught.value.exit_code == 130
    assert ended == [True]
    assert signal.getsignal(number) == before
    assert threading.current_thread() is threading.main_thread()


def test_a_cancellation_of_the_works_own_is_no_signal():
    async def work():
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(work())


def test_every_code_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "command_line.md").read_text()
    for code in (0, 1, 2, 3, 130):
        assert f"| {code} |" in page
