"""The command line as a whole: version, help, completion, and the real command in a process of its own."""

import importlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tinkex_py import __version__, commands
from tinkex_py.cli import app


def test_version(plain_command):
    result = plain_command("version")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == f"tinkex_py {__version__}"
    versions = json.loads(plain_command("version", "--json").stdout)
    assert versions["tinkex_py"] == __version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "torch" in versions
    assert plain_command("--version").stdout == f"tinkex-py {__version__}\n"


@pytest.mark.parametrize(
    ("argument", "words"), [("version", __version__), ("--version", __version__), ("--help", "checkpoints")]
)
def test_small_things_load_nothing_heavy(argument: str, words: str):
    """Shells call the command at every press of the tab key."""
    program = """
import sys
from tinkex_py.cli import app
app(sys.argv[1:], standalone_mode=False)
print([name for name in ("torch", "httpx", "transformers", "numpy", "yaml") if name in sys.modules])
"""
    command = [sys.executable, "-W", "error", "-c", program, argument]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert words in finished.stdout
    assert finished.stdout.splitlines()[-1] == "[]"


def completed(words: str) -> list[str]:
    variables = {"_TINKEX_PY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    return CliRunner().invoke(app, [], env=variables, prog_name="tinkex-py").stdout.split()


def test_shells_complete_commands_and_options():
    assert completed("tinkex-py che") == ["check", "checkpoints"]
    assert completed("tinkex-py checkpoints d") == ["download", "delete"]
    assert completed("tinkex-py sample --te") == ["--temperature"]
    for shell in ("bash", "zsh", "fish"):
        result = CliRunner().invoke(app, [], env={"_TINKEX_PY_COMPLETE": f"source_{shell}"}, prog_name="tinkex-py")
        assert "_TINKEX_PY_COMPLETE" in result.stdout


def all_commands() -> list[str]:
    """The commands, those of a group with its name before them."""
    found: list[str] = []
    for name, command in typer.main.get_command(app).commands.items():
        found += [f"{name} {inner}" for inner in command.commands] if hasattr(command, "commands") else [name]
    return found


@pytest.mark.parametrize("name", all_commands())
def test_every_command_has_help_and_json(plain_command, name):
    result = plain_command(*name.split(), "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_every_command_is_the_file_of_its_name():
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize(("name", "arguments", "as_json"), [("serve", [], True), ("dashboard", ["."], False)])
def test_a_server_prints_its_address_and_ends_at_a_signal(plain_command, monkeypatch, name, arguments, as_json):
    module = importlib.import_module(f"tinkex_py.commands.{name}")
    announcement = module.announcement

    def announced_and_ended(words: str, *, as_json: bool) -> Callable[[str], None]:
        announce = announcement(words, as_json=as_json)

        def announce_and_end(address: str) -> None:
            announce(address)
            os.kill(os.getpid(), signal.SIGTERM)

        return announce_and_end

    monkeypatch.setattr(module, "announcement", announced_and_ended)
    result = plain_command(name, *arguments, *(["--json"] if as_json else []))
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    address = json.loads(line)["address"] if as_json else line.split(" on ")[1]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)


def test_a_wrong_option_is_unusable_input(plain_command):
    assert plain_command("check", "--colour").exit_code == 2
    assert plain_command("no-such-command").exit_code == 2


@pytest.mark.parametrize(
    ("words", "meant"),
    [("trian", "'train'"), ("checkpoints dowload", "'download'"), ("check --base-ulr x", "--base-url")],
)
def test_a_misspelt_command_or_option_is_corrected(plain_command, words, meant):
    result = plain_command(*words.split())
    assert result.exit_code == 2
    assert meant in result.stderr


DOCS = Path(__file__).parents[2] / "docs"


def documented_lines() -> list[str]:
    """Every call of a command in the pages."""
    found: list[str] = []
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            found += re.findall(r"^tinkex-py (\w.*)$", block, re.MULTILINE)  # not --install-completion: it acts at once
    return found


@pytest.mark.parametrize("line", documented_lines())
def test_the_pages_call_commands_and_options_that_exist(line):
    words = list(itertools.takewhile(lambda word: word not in ("|", "<"), shlex.split(line, comments=True)))
    node, context = typer.main.get_command(app), None
    while True:
        with node.make_context(node.name, words, parent=context) as context:  # raises for what it does not know
            if not hasattr(node, "commands") or not context._protected_args + context.args:
                return
            _, node, words = node.resolve_command(context, context._protected_args + context.args)


def test_the_page_lists_every_command():
    page = (DOCS / "guides" / "command_line.md").read_text()
    assert set(typer.main.get_command(app).commands) <= set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
