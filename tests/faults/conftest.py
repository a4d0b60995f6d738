"""A real service in its own process, a proxy in front of it, and the weights of runs without faults."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from tests.faults.catalogue import IN_CHUNKS
from tests.faults.proxy import FaultProxy
from tests.faults.runs import config, long_run, new_client, resumed_run, saved_run, short_run, weights
from tests.faults.tally import Tally, tally_of
from tests.support.served import serving
from tests.support.torch_threads import one_torch_thread  # noqa: F401
from tinkex_py import AsyncServiceClient, AsyncTrainingClient


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sends the counts of a pytest-xdist worker to the process that prints them."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["faults"] = tally_of(session.config).counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    counts = getattr(node, "workeroutput", {}).get("faults")
    if counts is not None:  # a worker that crashed sends nothing
        tally_of(node.config).add(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = tally_of(config)
    if tally.injected or tally.checked:
        terminalreporter.section("faults")
        for line in tally.lines():
            terminalreporter.write_line(line)


@dataclass(frozen=True)
class Served:
    """The service of these tests and its state folder."""

    url: str
    state: Path


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    return tally_of(pytestconfig)


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("state")
    with serving("--state-dir", str(state)) as (_, url):
        yield Served(url, state)


@pytest.fixture(scope="package")
def expected(served: Served) -> dict[str, np.ndarray]:
    """Weights after a short run without faults."""

    return quiet_run(served, lambda service: on_new_client(service, short_run))


@pytest.fixture(scope="package")
def expected_of_long_runs(served: Served) -> dict[str, np.ndarray]:
    """Weights after a long run without faults, its calls in chunks of two."""

    return quiet_run(served, lambda service: on_new_client(service, long_run))


@pytest.fixture(scope="package")
def twin(served: Served) -> dict[str, np.ndarray]:
    """Weights of a resumed run without faults, its calls in one chunk each."""

    async def run(service: AsyncServiceClient) -> str:
        return await resumed_run(service, await saved_run(service))

    return quiet_run(served, run, in_chunks=False)


async def on_new_client(service: AsyncServiceClient, run: Callable[[AsyncTrainingClient], Awaitable[str]]) -> str:
    return await run(await new_client(service))


def quiet_run(
    served: Served, run: Callable[[AsyncServiceClient], Awaitable[str]], *, in_chunks: bool = True
) -> dict[str, np.ndarray]:
    async def whole() -> str:
        async with FaultProxy(served.url) as proxy:
            if in_chunks:
                proxy.spoil("config", IN_CHUNKS)
            async with AsyncServiceClient(config(proxy.url, timeout=20.0, poll_timeout=20.0)) as service:
                return await run(service)

    return weights(served.state, asyncio.run(whole()))


@pytest_asyncio.fixture
async def proxy(served: Served, tally: Tally) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(served.url) as running:
        running.spoil("config", IN_CHUNKS)
        yield running
    tally.injected.update(running.injected)


@pytest.fixture(scope="package")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(file)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the openssl command to make a certificate")
    return file, key


@pytest.fixture
def trusted_certificate(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """The TLS context of a server that clients of this test trust."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    return context
