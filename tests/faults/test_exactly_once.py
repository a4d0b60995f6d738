"""Every training write is applied exactly once under any fault: the weights equal those of a run without faults."""

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from tests.faults.catalogue import HINTS, IN_CHUNKS, RECOVERS, random_faults
from tests.faults.proxy import Fault, FaultProxy, Passing
from tests.faults.runs import NO_HANG, PLACES, assert_same, config, long_run, new_client, short_run, weights
from tests.faults.tally import Tally
from tinkex_py import AsyncServiceClient, AsyncTrainingClient
from tinkex_py.transport import failures

pytestmark = pytest.mark.asyncio

Weights = dict[str, np.ndarray]


@pytest.fixture
def check(served, tally: Tally) -> Callable[..., Awaitable[None]]:
    """Runs a client through a proxy, and compares its numbers and weights with those of a run without faults."""

    async def run_and_compare(
        proxy: FaultProxy,
        expected: Weights,
        run: Callable[[AsyncTrainingClient], Awaitable[str]] = short_run,
        faults: Mapping[str, Sequence[Fault]] = MappingProxyType({}),
        url: str | None = None,
    ) -> None:
        async with asyncio.timeout(2 * NO_HANG), AsyncServiceClient(config(url or proxy.url)) as service:
            training = await new_client(service)
            for place, of_place in faults.items():
                proxy.spoil(place, *of_place)
            path = await run(training)
            proxy.heal()
        for place, of_place in faults.items():
            for fault in of_place:
                assert proxy.injected[fault.name, place] == of_place.count(fault), (fault.name, place)
        proxy.check_numbers(training.model_id)
        assert_same(weights(served.state, path), expected)
        tally.checked["every write applied exactly once"] += 1

    return run_and_compare


@pytest.mark.parametrize("faults", RECOVERS.values(), ids=RECOVERS)
async def test_a_fault_at_every_place_of_a_step(proxy: FaultProxy, check, expected: Weights, faults: Sequence[Fault]):
    await check(proxy, expected, faults=dict.fromkeys(PLACES, faults))


@pytest.mark.parametrize("place", PLACES)
async def test_every_form_of_retry_after(proxy: FaultProxy, check, expected: Weights, monkeypatch, place: str):
    """The limit of an obeyed wait is made short, so that huge values and far dates are obeyed, too."""
    monkeypatch.setattr(failures, "LONGEST_RETRY_AFTER", 0.02)
    await check(proxy, expected, faults={place: HINTS})


@pytest.mark.parametrize("seed", range(4))
async def test_a_random_mix_of_faults(proxy: FaultProxy, check, expected_of_long_runs: Weights, seed: int):
    """Any request can fail, those that open sessions, create models and save included."""
    proxy.choose = random_faults(seed, 0.3)
    await check(proxy, expected_of_long_runs, long_run)
    assert sum(proxy.injected.values()) >= 5, proxy.injected


async def test_broken_tls_handshakes(served, check, expected: Weights, tally: Tally, trusted_certificate):
    """Handshakes without a response, with an alert, and with bytes that are not TLS."""
    async with FaultProxy(served.url, tls=trusted_certificate) as proxy:
        proxy.spoil("config", IN_CHUNKS)
        await check(proxy, expected, faults=dict.fromkeys(PLACES, RECOVERS["connections that break at once"]))
    assert proxy.injected["connection broken at its start", "any"] >= 3 * len(PLACES)
    tally.injected.update(proxy.injected)


async def test_temporary_failures_of_name_resolution(proxy: FaultProxy, check, expected: Weights, monkeypatch):
    """Every request opens a connection, and every third name resolution fails."""
    resolve, calls = socket.getaddrinfo, itertools.count(1)

    def resolve_sometimes(host: Any, *arguments: Any, **options: Any) -> Any:
        if host in ("localhost", b"localhost") and next(calls) % 3 == 0:
            proxy.injected["DNS failure", "any"] += 1
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_sometimes)
    proxy.choose = lambda passing: RECOVERS["closed after the answer"][0]
    await check(proxy, expected, url=proxy.url.replace("127.0.0.1", "localhost"))
    assert proxy.injected["DNS failure", "any"] >= 3


class Swap:
    """A fault for two requests: the first is answered after the second."""

    def __init__(self) -> None:
        self.fault = Fault("answered in swapped order", self._act, answers=True)
        self._second_is_answered: asyncio.Event | None = None

    async def _act(self, passing: Passing) -> None:
        answer = await passing.ask()
        if self._second_is_answered is None:
            self._second_is_answered = asyncio.Event()
            await passing.unless_client_leaves(self._second_is_answered.wait())
            await passing.answer(answer)
        else:
            await passing.answer(answer)
            self._second_is_answered.set()


async def test_two_requests_answered_in_swapped_order(proxy: FaultProxy, served, expected: Weights, tally: Tally):
    """Two clients of one service client step at the same time, over the same connections."""
    settings = config(proxy.url, timeout=NO_HANG, poll_timeout=NO_HANG)
    async with asyncio.timeout(2 * NO_HANG), AsyncServiceClient(settings) as service:
        for place in PLACES:
            clients = [await new_client(service), await new_client(service)]
            proxy.spoil(place, *[Swap().fault] * 2)
            paths = await asyncio.gather(*map(short_run, clients))
            assert proxy.injected["answered in swapped order", place] == 2
            for training, path in zip(clients, paths, strict=True):
                proxy.check_numbers(training.model_id)
                assert_same(weights(served.state, path), expected)
            tally.checked["each request gets its own answer"] += 2
