"""A real service in a process of its own, a proxy in front of it, and the weights of a run without faults."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from tests.faults.proxy import FaultProxy
from tests.faults.runs import config, new_client, short_run, weights
from tests.faults.tally import TALLY, Tally
from tests.support.served import serving
from tinkex_py import AsyncServiceClient


@dataclass(frozen=True)
class Served:
    """The service of these tests, with its state folder."""

    url: str
    state: Path


@pytest.fixture(scope="package", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The tiny model's matrices are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash.setdefault(TALLY, Tally())


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("state")
    with serving("--state-dir", str(state)) as (_, url):
        yield Served(url, state)


@pytest.fixture(scope="package")
def expected(served: Served) -> dict[str, np.ndarray]:
    """The weights after a run straight to the service."""

    async def run() -> str:
        async with AsyncServiceClient(config(served.url, timeout=20.0, poll_timeout=20.0)) as service:
            return await short_run(await new_client(service))

    return weights(served.state, asyncio.run(run()))


@pytest_asyncio.fixture
async def proxy(served: Served, tally: Tally) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(served.url) as running:
        yield running
    tally.add(running)
