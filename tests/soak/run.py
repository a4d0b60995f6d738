"""The run: segments of a plan with faults and without, and what is checked after each."""

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.faults.catalogue import IN_CHUNKS, RECOVERS
from tests.faults.proxy import Fault, FaultProxy, Passing
from tests.faults.runs import PLACES, config, weights
from tests.soak.outcomes import check_same, check_same_weights
from tests.soak.plan import SegmentPlan, draw_segment, planned_failures, planned_leavers
from tests.soak.player import Played, Side
from tests.soak.resources import MIB, Look, Memory, check_counts, growth, look, release_memory, settled_look
from tests.soak.watch import SoakFailed, Watch
from tests.support.served import serving
from tinkex_py import AsyncServiceClient

WARM_UP = 3
"""Segments before the first look whose memory counts."""
CLIENT_GROWTH = 6 * MIB
"""What memory may grow between the first and the last third of the looks after the warm-up."""
SERVICE_GROWTH = 20 * MIB
"""The same of the service, which keeps its newest 4096 results to be asked for again: about 16 MiB here."""
STALLED = 0.5
"""Seconds after which a client of the run with faults gives an exchange up."""
PATIENT = 20.0


@dataclass(frozen=True)
class Settings:
    """Of one soak.

    Attributes:
        seed: of the plan and of the faults.
        seconds: no segment begins after these.
        segments: no more than these.
        trainers: training clients whose weights are compared.
        moves: of each of them in a segment.
        share: of the requests of steps that meet a fault.
        rare_share: the same of all others, of which there are few.
        tell: hears where the service is.
    """

    seed: int
    seconds: float = float("inf")
    segments: int | None = None
    trainers: int = 3
    moves: int = 10
    share: float = 0.04
    rare_share: float = 0.12
    tell: Callable[[str], None] = field(default=lambda _: None)


@dataclass
class Tally:
    """What was done and checked.

    Attributes:
        planned: failures that the plan holds, by class.
        leavers: callers that were to leave at any moment.
        injected: faults by name and place.
        requests: that reached the proxies, by place.
        checked: how often something was checked, by what.
        looks: by moment: "start", "warm", "end".
    """

    segments: int = 0
    seconds: float = 0.0
    planned: Counter[str] = field(default_factory=Counter[str])
    seen: Counter[str] = field(default_factory=Counter[str])
    leavers: int = 0
    left: Counter[str] = field(default_factory=Counter[str])
    injected: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    requests: Counter[str] = field(default_factory=Counter[str])
    checked: Counter[str] = field(default_factory=Counter[str])
    looks: dict[str, Look] = field(default_factory=dict[str, Look])
    memory: Memory = field(default_factory=Memory)
    watch: Watch = field(default_factory=Watch)


class SeededFaults:
    """Some requests meet a fault that a client gets over; which ones and what faults hangs on the request alone.

    A numbered request is known by its model's number in the session, its own number and how often it came, so that the
    same plan meets the same faults, whatever the order in which requests of several clients come.
    """

    def __init__(self, seed: str, share: float, rare_share: float) -> None:
        self._seed = seed
        self._shares = {**dict.fromkeys(PLACES, share), "session_heartbeat": share}
        self._rare_share = rare_share
        self._came: Counter[str] = Counter()
        self._choices = [fault for faults in RECOVERS.values() for fault in dict.fromkeys(faults)]

    def __call__(self, passing: Passing) -> Fault | None:
        """What happens to this request."""
        if passing.place == "config":
            return IN_CHUNKS
        who = "" if passing.number is None else f"{passing.number[0].partition(':')[2]} {passing.number[1]}"
        request = f"{passing.place} {who}"
        self._came[request] += 1
        dice = random.Random(f"{self._seed}/{request}/{self._came[request]}")
        share = self._shares.get(passing.place, self._rare_share)
        return dice.choice(self._choices) if dice.random() < share else None


def always_in_chunks(passing: Passing) -> Fault | None:
    """No fault; calls of three datums go out in two requests, as on the other side."""
    return IN_CHUNKS if passing.place == "config" else None


@asynccontextmanager
async def side(
    url: str, state: Path, watch: Watch, faults: SeededFaults | None
) -> AsyncGenerator[tuple[Side, FaultProxy]]:
    """A service client behind a proxy of its own; both are closed at the end."""
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultProxy(url))
        proxy.choose = faults or always_in_chunks
        patience = STALLED if faults else PATIENT
        settings = config(
            proxy.url,
            timeout=patience,
            poll_timeout=patience,
            close_timeout=PATIENT,
            heartbeat_interval=1.0,
            max_threads=8,
        )
        client = AsyncServiceClient(settings)
        service = await watch.clock.timed("open a service client", client.__aenter__)
        stack.push_async_callback(lambda: watch.clock.timed("close a service client", client.aclose))
        yield Side(service, state, watch.clock), proxy


@dataclass
class Soak:
    """A run against one service."""

    settings: Settings
    url: str
    state: Path
    process: int
    tally: Tally
    last: tuple[Sequence[Played], Sequence[Played]] | None = None

    async def run(self) -> None:
        """Plays segments until the time is over.

        Raises:
            SoakFailed: something that was promised does not hold.
        """
        tally, settings = self.tally, self.settings
        began = time.monotonic()
        release_memory()
        tally.looks["start"] = look(self.process)
        with tally.watch.watching():
            while (settings.segments is None or tally.segments < settings.segments) and (
                tally.segments == 0 or time.monotonic() - began < settings.seconds
            ):
                await self.segment(tally.segments)
                tally.segments += 1
                tally.seconds = time.monotonic() - began
                await self.check_resources()
                tally.watch.check()
                tally.checked["every start of telemetry has one end"] = tally.watch.ledger.units
                tally.checked["calls within their bound"] = sum(tally.watch.clock.calls.values())
                tally.checked["no warning, no error that nobody heard"] += 1
        for name, sizes, bound in (
            ("the client", tally.memory.client, CLIENT_GROWTH),
            ("the service", tally.memory.service, SERVICE_GROWTH),
        ):
            found = growth(name, sizes, bound)
            found.check()
            tally.checked[f"memory of {name} does not grow"] += found.grown is not None

    async def segment(self, index: int) -> None:
        """Plays one segment on both sides at the same time, and compares."""
        tally, settings = self.tally, self.settings
        plan = draw_segment(settings.seed, index, trainers=settings.trainers, moves=settings.moves)
        faults = SeededFaults(f"{settings.seed}/{index}", settings.share, settings.rare_share)
        async with (
            side(self.url, self.state, tally.watch, faults) as (spoiled, proxy),
            side(self.url, self.state, tally.watch, None) as (quiet, quiet_proxy),
        ):
            try:
                async with asyncio.TaskGroup() as group:
                    wandering = group.create_task(spoiled.wander(plan.wanderings), name="soak.wanderer")
                    ends = [
                        [
                            group.create_task(one.train(trainer, self._last_of(number, turn)), name="soak.trainer")
                            for turn, trainer in enumerate(plan.trainers)
                        ]
                        for number, one in enumerate((spoiled, quiet))
                    ]
            finally:
                tally.injected += Counter({key: count for key, count in proxy.injected.items() if key[1] != "config"})
                tally.requests.update(proxy.requests + quiet_proxy.requests)
            for model_id in spoiled.numbered:
                proxy.check_numbers(model_id)
        tally.checked["numbers of a model without a gap, each with one payload"] += len(spoiled.numbered)
        tally.checked["clients in order after callers left at any moment"] += wandering.result()
        self._note(plan, spoiled)
        self.last = ([task.result() for task in ends[0]], [task.result() for task in ends[1]])
        self._compare(index)

    def _last_of(self, number: int, turn: int) -> Played | None:
        return None if self.last is None else self.last[number][turn]

    def _note(self, plan: SegmentPlan, spoiled: Side) -> None:
        self.tally.planned += planned_failures(plan)
        self.tally.seen += spoiled.seen
        self.tally.leavers += planned_leavers(plan)
        self.tally.left += spoiled.left

    def _compare(self, index: int) -> None:
        assert self.last is not None
        for turn, (one, other) in enumerate(zip(*self.last, strict=True)):
            where = f"segment {index}, training client {turn}"
            checked = self.tally.checked
            checked["outcomes equal to those of the twin"] += check_same(where, one.outcomes, other.outcomes)
            own, others = weights(self.state, one.path), weights(self.state, other.path)
            checked["tensors equal to those of the twin"] += check_same_weights(where, own, others)

    async def check_resources(self) -> None:
        """All clients and proxies are closed: everything is as it was before they were there."""
        tally = self.tally
        now = await settled_look(self.process, tally.looks["start"])
        if tally.segments <= WARM_UP:
            tally.looks["warm"] = now
        else:
            tally.memory.add(now)
        tally.looks["end"] = now
        check_counts(tally.looks["start"], now)
        tally.checked["tasks, threads, sockets and descriptors as at the start"] += 1


async def soak(settings: Settings, tally: Tally) -> None:
    """Starts a service, and runs a soak against it.

    Raises:
        SoakFailed: something that was promised does not hold.
    """
    torch.set_num_threads(1)  # the tiny model's matrices are so small that a second thread only waits
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, tempfile.TemporaryFile("w+") as log:
        state = Path(folder)
        with serving("--custom-losses", "--state-dir", folder, log=log, own_session=True) as (process, url):
            settings.tell(f"listening at {url}")
            await Soak(settings, url, state, process.pid, tally).run()
        log.seek(0)
        told = log.read().strip()
        if told:
            raise SoakFailed(f"the service complained: {told[:2000]}")
    tally.checked["the service wrote nothing to its log"] += 1
