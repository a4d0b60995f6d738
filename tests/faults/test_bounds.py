"""Nothing waits or repeats for ever: every call ends in a typed error within its attempts or its deadline."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.client.data import nll
from tests.faults.catalogue import RECOVERS, RETRY_AFTER, answering, before, busy, endless_drip, stall
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.runs import ADAM, DATA, NO_HANG, config, new_client
from tinkex_py import (
    AsyncServiceClient,
    AsyncTrainingClient,
    ConnectionFailed,
    RetryPolicy,
    SequenceLost,
    TinkexError,
    telemetry,
)
from tinkex_py.telemetry import Event

pytestmark = pytest.mark.asyncio
THREE = RetryPolicy(deadline=20.0, max_attempts=3, initial_wait=0.001, max_wait=0.01)
_NOT_HERE = ("connection refused", "connections that break at once", "stall", "a drip without end")
LASTING = {name: faults[-1] for name, faults in RECOVERS.items() if not faults[-1].answers and name not in _NOT_HERE}

PATIENT = {"timeout": NO_HANG, "poll_timeout": NO_HANG}

Call = Callable[[AsyncTrainingClient], Awaitable[Any]]
CALLS: dict[str, Call] = {
    "F": lambda training: training.forward_backward_custom(DATA, nll),
    "B": lambda training: training.forward_backward_custom(DATA, nll),
    "optim_step": lambda training: training.optim_step(ADAM),
    "retrieve_future": lambda training: training.optim_step(ADAM),
}


class Attempts:
    """The numbers of attempts, by path, as events tell them."""

    def __init__(self) -> None:
        self.by_path: dict[str, list[int]] = {}
        self._handler = telemetry.attach(self._hear, events="tinkex.http.request.start")

    def _hear(self, event: Event) -> None:
        endpoint = event.metadata["path"].rsplit("/", 1)[-1]
        self.by_path.setdefault(endpoint, []).append(event.metadata["attempt"])


def lasts(proxy: FaultProxy, place: str, fault: Fault) -> None:
    """The fault happens at every request of a place from now on."""
    proxy.choose = lambda passing: fault if passing.place == place else None


@pytest.mark.parametrize("place", CALLS)
@pytest.mark.parametrize("name", LASTING)
async def test_a_fault_that_lasts_ends_the_call(proxy: FaultProxy, tally, name: str, place: str):
    proxy.heal()
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, **PATIENT, retry=THREE)) as service:
        training = await new_client(service)
        lasts(proxy, place, LASTING[name])
        attempts = Attempts()
        with pytest.raises(TinkexError) as caught:
            await CALLS[place](training)
        assert proxy.requests[place] - (place == "retrieve_future") == 3  # one poll was for the model
        if place != "retrieve_future":
            assert isinstance(caught.value, SequenceLost), caught.value
            assert "create_training_client_from_state" in str(caught.value)
            endpoint = place if place == "optim_step" else "forward_backward"
            assert attempts.by_path[endpoint][-3:] == [1, 2, 3]
            with pytest.raises(SequenceLost):
                await training.forward(DATA)
        proxy.heal()
        await (await new_client(service)).optim_step(ADAM)  # the others are not harmed
    tally.checked["a fault that lasts ends in a typed error"] += 1


@pytest.mark.parametrize(
    "fault", [before("stall", stall), before("a drip without end", endless_drip)], ids=["stall", "drip"]
)
async def test_the_deadline_ends_an_attempt_that_stalls(proxy: FaultProxy, tally, fault: Fault):
    """The exchange alone might last ten minutes."""
    retry = RetryPolicy(deadline=1.0, initial_wait=0.001, max_wait=0.01)
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, timeout=600.0, retry=retry)) as service:
        training = await new_client(service)
        lasts(proxy, "B", fault)
        with pytest.raises(SequenceLost, match=r"retry deadline of 1 s"):
            await training.forward_backward(DATA)
    tally.checked["a deadline ends the retries"] += 1


@pytest.mark.parametrize("place", ["B", "retrieve_future"])
async def test_no_wait_that_the_service_asks_for_goes_beyond_the_deadline(proxy: FaultProxy, tally, place: str):
    """It asks for a minute at each attempt; a client that obeyed would be here for an hour."""
    retry = RetryPolicy(deadline=20.0, initial_wait=0.001, max_wait=0.01)
    proxy.heal()
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, **PATIENT, retry=retry)) as service:
        training = await new_client(service)
        before_it = proxy.requests[place]
        lasts(proxy, place, before("a minute", answering(busy(503, retry_after="60"))))
        with pytest.raises(TinkexError, match="503"):
            await training.forward_backward(DATA)
        assert proxy.requests[place] == before_it + 1
    tally.checked["a deadline ends the retries"] += 1


@pytest.mark.parametrize("place", ["B", "retrieve_future"])
async def test_a_service_cannot_ask_to_be_asked_at_network_speed(proxy: FaultProxy, tally, place: str):
    """With our own waits of minutes, a hint that is no wait must not bring a second attempt."""
    names = ("zero", "almost zero", "negative", "garbage")
    hints = [before(name, answering(busy(503, **RETRY_AFTER[name]))) for name in names]
    retry = RetryPolicy(deadline=1e6, initial_wait=1e5, max_wait=1e5)
    proxy.heal()
    # The submission of a cancelled caller goes on, here for days: closing cuts it off.
    settings = config(proxy.url, **PATIENT, retry=retry, close_timeout=0.01)
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(settings) as service:
        for hint in hints:
            training = await new_client(service)
            before_it = proxy.requests[place]
            lasts(proxy, place, hint)
            step = asyncio.create_task(training.forward_backward(DATA))
            await proxy.until(lambda count=before_it: proxy.requests[place] == count + 1)
            await asyncio.wait([step], timeout=0.03)
            assert proxy.requests[place] == before_it + 1, hint.name
            step.cancel()
            await asyncio.wait([step])
            proxy.heal()
    tally.checked["hostile waits are not obeyed"] += len(hints)


async def test_waiting_for_a_result_ends_when_the_caller_wants(proxy: FaultProxy, tally):
    """A service may work on a request for hours, so this wait has no bound of its own."""
    proxy.heal()
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, poll_timeout=0.05)) as service:
        training = await new_client(service)
        for fault in (before("stall", stall), before("not yet", answering(busy(408)))):
            polls = proxy.requests["retrieve_future"]
            lasts(proxy, "retrieve_future", fault)
            step = asyncio.create_task(training.forward(DATA))
            await proxy.until(lambda count=polls: proxy.requests["retrieve_future"] >= count + 3)
            step.cancel()
            await asyncio.wait([step])
            assert step.cancelled()
            proxy.heal()
            await training.forward(DATA)
    proxy.check_numbers(training.model_id)
    tally.checked["a caller ends a wait for a result"] += 2


async def test_nobody_listens(proxy: FaultProxy, tally):
    """At the first contact, and in the middle of a run."""
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, **PATIENT, retry=THREE)) as service:
        training = await new_client(service)
        await proxy.refuse_for(1e6)
        with pytest.raises(SequenceLost, match="nothing answers there"):
            await training.forward_backward(DATA)
        attempts = Attempts()
        failure = await first_contact(proxy.url)
        assert "nothing answers there" in str(failure)
        assert failure.attempts == 3
        assert attempts.by_path["config"] == [1, 2, 3]
    tally.checked["a fault that lasts ends in a typed error"] += 2


async def first_contact(url: str) -> ConnectionFailed:
    """How a client fails that cannot reach its service."""
    service = AsyncServiceClient(config(url, **PATIENT, retry=THREE))
    async with asyncio.timeout(NO_HANG):
        with pytest.raises(ConnectionFailed) as caught:
            await service.get_server_capabilities()
        await service.aclose()
    return caught.value


async def test_a_name_that_nobody_has(tally):
    failure = await first_contact("http://no-such-host.invalid")
    assert "the host name cannot be resolved" in str(failure)
    assert failure.attempts == 3
    tally.checked["a fault that lasts ends in a typed error"] += 1


async def test_tls_that_cannot_be_trusted_or_spoken(proxy, served, trusted_certificate, monkeypatch, tally):
    monkeypatch.delenv("SSL_CERT_FILE")
    async with FaultProxy(served.url, tls=trusted_certificate) as tls_proxy:
        failure = await first_contact(tls_proxy.url)
        assert "the certificate of the service is not trusted" in str(failure)
        assert "SSL_CERT_FILE" in str(failure)
    failure = await first_contact(proxy.url.replace("http:", "https:"))
    assert "the TLS handshake failed" in str(failure)
    tally.checked["a fault that lasts ends in a typed error"] += 2
