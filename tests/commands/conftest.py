"""A running embedded service on loopback, and the command line in front of it."""

from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from tests.support.served import serving
from tinkex_py.cli import app

KEY = "tml-secret-of-the-tests"


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of a service of the tiny model in its own process; it requires a key."""
    with serving("--api-key", KEY, "--custom-losses") as (_, address):
        yield address


Command = Callable[..., Result]


@pytest.fixture
def plain_command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process; its output must not contain the key."""
    monkeypatch.setenv("TINKER_API_KEY", KEY)

    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=stdin, prog_name="tinkex-py")
        assert KEY not in result.output
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def command(plain_command: Command, address: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command against the service."""
    monkeypatch.setenv("TINKER_BASE_URL", address)
    return plain_command
