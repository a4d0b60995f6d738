"""A failed heartbeat is reported and retried, whatever the response is, while training continues."""

import asyncio

import pytest

from tests.faults.catalogue import FINAL, HINTS, RECOVERS
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.runs import NO_HANG, assert_same, config, new_client, short_run, weights
from tinkex_py import AsyncServiceClient, telemetry
from tinkex_py.telemetry import Event

pytestmark = pytest.mark.asyncio
BEAT = "session_heartbeat"
# Faults that last as long as the timeout of a heartbeat, 10 s, are left out.
_SLOW = ("stall", "an endless response", "connection refused", "connections that break at once")
HOSTILE = [fault for name, faults in RECOVERS.items() if name not in _SLOW for fault in faults if not fault.answers]
REFUSALS = [fault for fault in FINAL if "410" not in fault.name]


@pytest.mark.parametrize(
    "faults", [HOSTILE, REFUSALS, HINTS[:6]], ids=["broken responses", "final responses", "Retry-After"]
)
async def test_failed_heartbeats_and_their_recovery_are_reported(
    proxy: FaultProxy, served, expected, tally, faults: list[Fault]
):
    events: list[Event] = []
    telemetry.attach(events.append, events="tinkex.session.*")
    settings = config(proxy.url, timeout=NO_HANG, poll_timeout=NO_HANG, heartbeat_interval=0.01)
    async with asyncio.timeout(NO_HANG), AsyncServiceClient(settings) as service:
        training = await new_client(service)
        await proxy.until(lambda: proxy.requests[BEAT] >= 1)
        proxy.spoil(BEAT, *faults)
        path = await short_run(training)
        await proxy.until(lambda: not proxy.faults[BEAT])
        beats = proxy.requests[BEAT]
        await proxy.until(lambda: proxy.requests[BEAT] >= beats + 2)  # the first of them succeeded
        assert service._session._session_id is not None
        assert any(task.get_name() == "tinkex.heartbeat" for task in asyncio.all_tasks())
    assert_same(weights(served.state, path), expected)
    names = [event.name.rsplit(".", 1)[-1] for event in events if "heartbeat" in event.name]
    spoiled = [fault for fault in faults if fault.name != "JSON of another type, after"]
    assert names.count("heartbeat_failed") == len(spoiled)
    assert "heartbeat_recovered" in names
    for before, event in zip([None, *events], events, strict=False):
        if event.name.endswith("heartbeat_recovered"):
            assert before is not None
            assert event.measurements["failures"] == before.measurements["failures"] >= 1
            assert event.measurements["silence"] >= before.measurements["silence"]
    tally.checked["a failed heartbeat is reported, and its recovery"] += names.count("heartbeat_failed")
