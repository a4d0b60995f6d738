"""Every call ends: in a typed error, within its attempts or its deadline."""

import asyncio
from collections import defaultdict
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
_OTHER_TESTS = ("connection refused", "connections that break at once", "stall", "an endless response")
PERMANENT = {
    name: faults[-1] for name, faults in RECOVERS.items() if not faults[-1].answers and name not in _OTHER_TESTS
}
PATIENT = {"timeout": NO_HANG, "poll_timeout": NO_HANG}

Call = Callable[[AsyncTrainingClient], Awaitable[Any]]
CALLS: dict[str, Call] = {
    "F": lambda training: training.forward_backward_custom(DATA, nll),
    "B": lambda training: training.forward_backward_custom(DATA, nll),
    "optim_step": lambda training: training.optim_step(ADAM),
    "retrieve_future": lambda training: training.optim_step(ADAM),
}


class Attempts:
    """Collects the attempt numbers of HTTP requests, by endpoint, from telemetry."""

    def __init__(self) -> None:
        self.by_endpoint: defaultdict[str, list[int]] = defaultdict(list)
        telemetry.attach(self._note, events="tinkex.http.request.start")

    def _note(self, event: Event) -> None:
        self.by_endpoint[event.metadata["path"].rsplit("/", 1)[-1]].append(event.metadata["attempt"])


def make_permanent(proxy: FaultProxy, place: str, fault: Fault) -> None:
    """The fault happens at every request of a place from now on."""
    proxy.choose = lambda passing: fault if passing.place == place else None


@pytest.mark.parametrize("fault", PERMANENT.values(), ids=PERMANENT)
async def test_a_permanent_fault_ends_the_call(proxy: FaultProxy, tally, fault: Fault):
    proxy.heal()
    attempts = Attempts()
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, **PATIENT, retry=THREE)) as service:
        for place, call in CALLS.items():
            training = await new_client(service)
            before_it = proxy.requests[place]
            make_permanent(proxy, place, fault)
            with pytest.raises(TinkexError) as caught:
                await call(training)
            assert proxy.requests[place] == before_it + 3
            if place != "retrieve_future":
                assert isinstance(caught.value, SequenceLost), caught.value
                assert "create_training_client_from_state" in str(caught.value)
                endpoint = place if place == "optim_step" else "forward_backward"
                assert attempts.by_endpoint[endpoint][-3:] == [1, 2, 3]
                with pytest.raises(SequenceLost):
                    await training.forward(DATA)
            proxy.heal()
            tally.checked["a permanent fault ends in a typed error"] += 1
        await (await new_client(service)).optim_step(ADAM)  # other clients are not affected


@pytest.mark.parametrize(
    "fault", [before("stall", stall), before("an endless response", endless_drip)], ids=["stall", "drip"]
)
async def test_the_deadline_ends_an_attempt_that_stalls(proxy: FaultProxy, tally, fault: Fault):
    """The timeout of the exchange alone is ten minutes."""
    retry = RetryPolicy(deadline=1.0, initial_wait=0.001, max_wait=0.01)
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, timeout=600.0, retry=retry)) as service:
        training = await new_client(service)
        make_permanent(proxy, "B", fault)
        with pytest.raises(SequenceLost, match=r"retry deadline of 1 s"):
            await training.forward_backward(DATA)
    tally.checked["a deadline ends the retries"] += 1


@pytest.mark.parametrize("place", ["B", "retrieve_future"])
async def test_no_wait_requested_by_the_service_exceeds_the_deadline(proxy: FaultProxy, tally, place: str):
    """The service requests a minute at each attempt, which would last for an hour."""
    retry = RetryPolicy(deadline=20.0, initial_wait=0.001, max_wait=0.01)
    proxy.heal()
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, **PATIENT, retry=retry)) as service:
        training = await new_client(service)
        before_it = proxy.requests[place]
        make_permanent(proxy, place, before("a minute", answering(busy(503, retry_after="60"))))
        with pytest.raises(TinkexError, match="503"):
            await training.forward_backward(DATA)
        assert proxy.requests[place] == before_it + 1
    tally.checked["a deadline ends the retries"] += 1


@pytest.mark.parametrize("place", ["B", "retrieve_future"])
async def test_a_service_cannot_request_immediate_retries(proxy: FaultProxy, tally, place: str):
    """With own waits of hours, a hint without a usable wait must not cause a second attempt."""
    names = ("zero", "almost zero", "negative", "garbage")
    hints = [before(name, answering(busy(503, **RETRY_AFTER[name]))) for name in names]
    retry = RetryPolicy(deadline=1e6, initial_wait=1e5, max_wait=1e5)
    proxy.heal()
    # The submission of a cancelled caller continues, here for days, until closing ends it.
    settings = config(proxy.url, **PATIENT, retry=retry, close_timeout=0.01)
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(settings) as service:
        for hint in hints:
            training = await new_client(service)
            before_it = proxy.requests[place]
            make_permanent(proxy, place, hint)
            step = asyncio.create_task(training.forward_backward(DATA))
            await proxy.until(lambda count=before_it: proxy.requests[place] == count + 1)
            await asyncio.wait([step], timeout=0.03)
            assert proxy.requests[place] == before_it + 1, hint.name
            step.cancel()
            await asyncio.wait([step])
            proxy.heal()
    tally.checked["hostile waits are not obeyed"] += len(hints)


async def test_a_caller_can_stop_waiting_for_a_result(proxy: FaultProxy, tally):
    """A service may work on a request for hours, so this wait is unbounded."""
    proxy.heal()
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, poll_timeout=0.05)) as service:
        training = await new_client(service)
        for fault in (before("stall", stall), before("not yet", answering(busy(408)))):
            polls = proxy.requests["retrieve_future"]
            make_permanent(proxy, "retrieve_future", fault)
            step = asyncio.create_task(training.forward(DATA))
            await proxy.until(lambda count=polls: proxy.requests["retrieve_future"] >= count + 3)
            step.cancel()
            await asyncio.wait([step])
            assert step.cancelled()
            proxy.heal()
            await training.forward(DATA)
    proxy.check_numbers(training.model_id)
    tally.checked["a caller ends a wait for a result"] += 2


async def test_a_service_that_is_down(proxy: FaultProxy, tally):
    """Both at the first request and in the middle of a run."""
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(config(proxy.url, **PATIENT, retry=THREE)) as service:
        training = await new_client(service)
        await proxy.refuse_for(1e6)
        with pytest.raises(SequenceLost, match="nothing answers there"):
            await training.forward_backward(DATA)
        attempts = Attempts()
        failure = await first_request_fails(proxy.url)
        assert "nothing answers there" in str(failure)
        assert failure.attempts == 3
        assert attempts.by_endpoint["config"] == [1, 2, 3]
    tally.checked["a permanent fault ends in a typed error"] += 2


async def first_request_fails(url: str) -> ConnectionFailed:
    """Returns the error of a client that cannot reach its service."""
    service = AsyncServiceClient(config(url, **PATIENT, retry=THREE))
    async with asyncio.timeout(NO_HANG):
        with pytest.raises(ConnectionFailed) as caught:
            await service.get_server_capabilities()
        await service.aclose()
    return caught.value


async def test_an_unknown_host_name(tally):
    failure = await first_request_fails("http://no-such-host.invalid")
    assert "the host name cannot be resolved" in str(failure)
    assert failure.attempts == 3
    tally.checked["a permanent fault ends in a typed error"] += 1


async def test_tls_without_trust_or_without_tls(proxy, served, trusted_certificate, monkeypatch, tally):
    monkeypatch.delenv("SSL_CERT_FILE")
    async with FaultProxy(served.url, tls=trusted_certificate) as tls_proxy:
        failure = await first_request_fails(tls_proxy.url)
        assert "the certificate of the service is not trusted" in str(failure)
        assert "SSL_CERT_FILE" in str(failure)
    failure = await first_request_fails(proxy.url.replace("http:", "https:"))
    assert "the TLS handshake failed" in str(failure)
    tally.checked["a permanent fault ends in a typed error"] += 2
