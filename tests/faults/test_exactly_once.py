"""Every training write is applied exactly once, whatever happens on the way: the weights are those of a quiet run."""

import asyncio
import itertools
import socket
from typing import Any

import pytest

from tests.faults.catalogue import HINTS, IN_CHUNKS, RECOVERS, random_faults
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.runs import NO_HANG, PLACES, assert_same, config, long_run, new_client, short_run, weights
from tinkex_py import AsyncServiceClient
from tinkex_py.transport import messages

pytestmark = pytest.mark.asyncio


async def spoiled_run(proxy: FaultProxy, place: str, faults: list[Fault]) -> tuple[str, str]:
    """A short run with these faults at the first request of a place; the model's id and its last checkpoint."""
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url)) as service:
        training = await new_client(service)
        proxy.spoil(place, *faults)
        path = await short_run(training)
    for fault in faults:
        assert proxy.injected[fault.name, place] == faults.count(fault)
    proxy.check_numbers(training.model_id)
    return training.model_id, path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("faults", RECOVERS.values(), ids=RECOVERS)
async def test_a_fault_at_any_place_of_a_step(proxy: FaultProxy, served, expected, tally, faults, place: str):
    _, path = await spoiled_run(proxy, place, faults)
    assert_same(weights(served.state, path), expected)
    tally.checked["every write applied exactly once"] += 1


@pytest.mark.parametrize("place", PLACES)
async def test_every_form_of_retry_after(proxy: FaultProxy, served, expected, tally, monkeypatch, place: str):
    """The longest wait that is obeyed is made short, so that huge ones and far dates can be obeyed too."""
    monkeypatch.setattr(messages, "LONGEST_RETRY_AFTER", 0.02)
    _, path = await spoiled_run(proxy, place, HINTS)
    assert_same(weights(served.state, path), expected)
    tally.checked["every write applied exactly once"] += 1


@pytest.mark.parametrize("seed", range(5))
async def test_a_random_mix_of_faults(proxy: FaultProxy, served, expected_of_long_runs, tally, seed: int):
    """At every request, those too that open sessions, make models and save."""
    proxy.choose = random_faults(seed, 0.3)
    async with asyncio.timeout(2 * NO_HANG), AsyncServiceClient(config(proxy.url)) as service:
        training = await new_client(service)
        path = await long_run(training)
        proxy.heal()
    assert sum(proxy.injected.values()) >= 5, proxy.injected
    proxy.check_numbers(training.model_id)
    assert_same(weights(served.state, path), expected_of_long_runs)
    tally.checked["every write applied exactly once"] += 1


async def test_connections_over_tls_that_break(served, expected, tally, trusted_certificate):
    """Handshakes that get no answer, an alert, and bytes that are none."""
    async with FaultProxy(served.url, tls=trusted_certificate) as proxy:
        proxy.spoil("config", IN_CHUNKS)
        for place in PLACES:
            proxy.spoil(place, *RECOVERS["connections that break at once"])
        async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url)) as service:
            training = await new_client(service)
            path = await short_run(training)
    assert proxy.injected["connection broken at its start", "any"] >= 3 * len(PLACES)
    proxy.check_numbers(training.model_id)
    assert_same(weights(served.state, path), expected)
    tally.add(proxy)
    tally.checked["every write applied exactly once"] += 1


async def test_a_name_that_cannot_be_resolved_now_and_then(proxy: FaultProxy, served, expected, tally, monkeypatch):
    """Every request needs a connection of its own, and every third time the resolver knows no name."""
    resolve, asked = socket.getaddrinfo, itertools.count(1)

    def resolve_sometimes(host: Any, *arguments: Any, **options: Any) -> Any:
        if host in ("localhost", b"localhost") and next(asked) % 3 == 0:
            proxy.injected["DNS failure", "any"] += 1
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_sometimes)
    proxy.choose = lambda passing: RECOVERS["closed after the answer"][0]
    url = proxy.url.replace("127.0.0.1", "localhost")
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(url)) as service:
        training = await new_client(service)
        path = await short_run(training)
    assert proxy.injected["DNS failure", "any"] >= 3
    proxy.check_numbers(training.model_id)
    assert_same(weights(served.state, path), expected)
    tally.checked["every write applied exactly once"] += 1
