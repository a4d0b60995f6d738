"""Many cancellations: no connection slot is lost, and requests that were not cancelled are not affected."""

import asyncio
import gc
import random
from collections import Counter

import pytest

from tests.client.data import datum, nll
from tests.faults.proxy import FaultProxy
from tests.faults.runs import ADAM, NO_HANG, assert_same, config, new_client, smooth, weights
from tests.support.scripted_server import ScriptedServer, answer, drip, held, stall, stop_reading
from tinkex_py import AsyncServiceClient, AsyncTrainingClient, PrecedingRequestFailed, RegularizerSpec, telemetry
from tinkex_py.telemetry import Event
from tinkex_py.transport.http import HttpClient
from tinkex_py.transport.messages import request

pytestmark = pytest.mark.asyncio
REQUESTS, SLOTS, WAVE = 1000, 8, 50
LARGE = bytes(4 << 20)


class Storm:
    """Sends requests and records where each is when it is cancelled."""

    def __init__(self, server: ScriptedServer, client: HttpClient) -> None:
        self.at: Counter[str] = Counter()
        self._server = server
        self._client = client
        self._has_connection: set[int] = set()
        telemetry.attach(self._note_connection, events="tinkex.http.request.start")

    def _note_connection(self, event: Event) -> None:
        self._has_connection.add(event.metadata["attempt"])

    async def send(self, number: int, path: str) -> None:
        content = LARGE if path == "/unread" else b"small"
        # The attempt number identifies the request in its events.
        await self._client.exchange(request("POST", f"{path}?{number}", content=content), attempt=number)

    def note(self, number: int, path: str, task: asyncio.Task[None]) -> None:
        """Records where a request is just before its cancellation."""
        if task.done():
            self.at["answered"] += 1
        elif number not in self._has_connection:
            self.at["waiting for a connection"] += 1
        elif f"{path}?{number}" not in self._server.started:
            self.at["connecting"] += 1
        else:
            self.at[
                {"/unread": "sending", "/drip": "receiving the response"}.get(path, "waiting for the response")
            ] += 1


async def test_a_thousand_cancelled_requests(tally):
    dice = random.Random(1)
    async with asyncio.timeout(2 * NO_HANG), ScriptedServer() as server:
        release = asyncio.Event()
        server.reading_again.set()
        server.script("/stall", stall())
        server.script("/unread", stop_reading())
        server.script("/drip", drip(bytes(1000), first=500))
        server.script("/good", answer(json={}))
        server.script("/held", held(release, answer(json={})))
        client = HttpClient(base_url=server.url, max_connections=SLOTS)
        storm = Storm(server, client)
        for start in range(0, REQUESTS, WAVE):
            paths = [dice.choice(["/stall", "/unread", "/drip", "/good"]) for _ in range(WAVE)]
            wave = list(zip(range(start + 1, start + WAVE + 1), paths, strict=True))
            server.reading_again.clear()
            tasks = {number: asyncio.create_task(storm.send(number, path)) for number, path in wave}
            dice.shuffle(wave)
            for number, path in wave:
                for _ in range(dice.choice([0, 0, 1, 3, 10, 30])):
                    await asyncio.sleep(0)
                storm.note(number, path, tasks[number])
                tasks[number].cancel()
            await asyncio.wait(tasks.values())
            server.reading_again.set()  # the server notices that their clients left
        # Uses all slots at once: a single lost one would hang.
        last = [asyncio.create_task(client.exchange(request("GET", "/held"))) for _ in range(SLOTS)]
        await server.until(lambda: len(server.requests_to("/held")) == SLOTS)
        release.set()
        assert [response.status for response in await asyncio.gather(*last)] == [200] * SLOTS
        await client.aclose()
        await server.until(lambda: server.open_connections == 0)
        # httpcore leaves the generators of partly sent bodies to the garbage collector, which ends each in a task.
        del tasks, last
        gc.collect()
        for _ in range(3):
            await asyncio.sleep(0)
    assert storm.at.total() == REQUESTS
    for moment in (
        "waiting for a connection",
        "connecting",
        "sending",
        "waiting for the response",
        "receiving the response",
    ):
        assert storm.at[moment] >= 10, storm.at
        tally.injected["cancelled", moment] += storm.at[moment]
    tally.checked["no connection is lost to cancellations"] += SLOTS


async def one_step(training: AsyncTrainingClient, number: int) -> None:
    specs = [RegularizerSpec(fn=smooth, weight=0.5, name="smooth")]
    await training.forward_backward_custom([datum(3, number), datum(2, number)], nll, regularizers=specs)


async def test_a_storm_of_cancelled_custom_steps(proxy: FaultProxy, served, tally):
    """Bursts of three steps, one of them cancelled at some moment: a twin repeats only the steps that took effect."""
    dice = random.Random(1)
    happened: list[int] = []
    ended: Counter[str] = Counter()
    patient = {"timeout": NO_HANG, "poll_timeout": NO_HANG}
    async with asyncio.timeout(2 * NO_HANG), AsyncServiceClient(config(proxy.url, **patient)) as service:
        training = await new_client(service)
        for first in range(0, 60, 3):
            numbers = range(first, first + 3)
            burst: list[tuple[int, asyncio.Task[None], asyncio.Task[object]]] = []
            for number in numbers:
                step = asyncio.create_task(one_step(training, number))
                burst.append((number, step, asyncio.create_task(training.optim_step(ADAM))))
            requests = proxy.requests.total()
            enough = requests + dice.randrange(12)
            await proxy.until(lambda enough=enough: proxy.requests.total() >= enough)
            for _ in range(1 + dice.randrange(10)):  # a task that never ran has no turn in the order
                await asyncio.sleep(0)
            dice.choice(burst)[1].cancel()
            await asyncio.wait([task for _, *tasks in burst for task in tasks])
            for number, step, update in burst:
                if update.exception() is None:
                    happened.append(number)
                    ended["cancelled after it took effect" if step.cancelled() else "happened"] += 1
                else:
                    assert isinstance(update.exception(), PrecedingRequestFailed), update
                    assert step.cancelled() or isinstance(step.exception(), PrecedingRequestFailed), step
                    ended["cancelled" if step.cancelled() else "not sent"] += 1
        assert training.accumulated == 0
        path = (await training.save_state("after")).path
        twin = await new_client(service)
        for number in happened:
            await one_step(twin, number)
            await twin.optim_step(ADAM)
        expected = (await twin.save_state("after")).path
    proxy.check_numbers(training.model_id)
    assert all(ended[name] >= 3 for name in ("happened", "cancelled", "not sent")), ended
    assert_same(weights(served.state, path), weights(served.state, expected))
    tally.injected["cancelled", "custom step"] += ended["cancelled"] + ended["cancelled after it took effect"]
    tally.checked["cancelled steps leave no gap and no effect"] += ended.total()
