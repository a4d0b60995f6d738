"""Measurements on the embedded service, and a table of the faults that were injected into it."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.torch_threads import one_torch_thread  # noqa: F401
from tinkex_py import AsyncServiceClient, TinkexConfig
from tinkex_py.local.engine import Engine

Caught = tuple[str, str, str]
"""A fault, the check that found it, and what the check said."""
CAUGHT = pytest.StashKey[list[Caught]]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sends the list of a pytest-xdist worker to the process that prints it."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["caught"] = caught_of(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    caught_of(node.config).extend(getattr(node, "workeroutput", {}).get("caught", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    caught = sorted(caught_of(config))
    if caught:
        terminalreporter.section("faults of services, and the check that found each")
        for fault, check, said in caught:
            terminalreporter.write_line(f"{fault.ljust(36)}  {check.ljust(22)}  {said}")


def caught_of(config: pytest.Config) -> list[Caught]:
    return config.stash.setdefault(CAUGHT, [])


Embedded = Callable[..., AbstractAsyncContextManager[AsyncServiceClient]]


@pytest.fixture
def embedded(tmp_path: Path) -> Embedded:
    """Opens a client with an embedded service, and changes its engine."""

    @asynccontextmanager
    async def opened(inject: Callable[[Engine], None] | None = None) -> AsyncIterator[AsyncServiceClient]:
        config = TinkexConfig(base_url="http://embedded", api_key="tml-certify", certificates=tmp_path / "certificates")
        async with AsyncServiceClient.local("tiny", config=config) as service:
            if inject is not None:
                inject(engine_of(service))
            yield service

    return opened


def engine_of(service: AsyncServiceClient) -> Engine:
    """The engine of the embedded service of a client."""
    assert service._embedded is not None
    assert service._embedded.core is not None
    return service._embedded.core.engine
