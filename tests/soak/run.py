"""Runs the segments of a plan with and without faults, and checks the results after each."""

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
from tests.soak.resources import MIB, Look, check_counts, check_growth, growth, look, release_memory, settled_look
from tests.soak.watch import SoakFailed, Watch
from tests.support.served import serving
from tinkex_py import AsyncServiceClient

WARM_UP = 3
"""Segments before the first look whose memory counts."""
GROWTH_BOUNDS = {"rss": 6 * MIB, "service_rss": 20 * MIB}
"""Bytes by which memory may grow after the warm-up. The service keeps its newest 4096 results: about 16 MiB here."""
STALLED = 0.5
"""Timeout of an exchange in the run with faults, in seconds."""
PATIENT = 20.0


@dataclass(frozen=True)
class Settings:
    """Settings of one soak.

    Attributes:
        seed: seed of the plan and the faults.
        seconds: no segment starts after this time.
        segments: the maximum number of segments.
        trainers: how many training clients are compared.
        moves: how many moves each makes in a segment.
        share: which share of the requests of steps gets a fault.
        rare_share: the same for other requests, which are few.
        on_start: receives the address of the service.
    """

    seed: int
    seconds: float = float("inf")
    segments: int | None = None
    trainers: int = 3
    moves: int = 10
    share: float = 0.04
    rare_share: float = 0.12
    on_start: Callable[[str], None] = field(default=lambda _: None)


@dataclass
class Tally:
    """Counts of what happened and was checked.

    Attributes:
        planned: failures in the plan, by error class.
        leavers: callers that the plan cancels at any moment.
        injected: faults by name and place.
        requests: requests that reached the proxies, by place.
        checked: how often each property was checked.
        looks: resources at "start", "warm" and "end".
        sizes: memory at every look after the warm-up.
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
    sizes: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in GROWTH_BOUNDS})
    watch: Watch = field(default_factory=Watch)


class SeededFaults:
    """Chooses recoverable faults for some requests; the choice depends on the request alone.

    A numbered request is identified by the number of its model in the session, its own number and its attempt, so the
    same plan gets the same faults in whatever order the requests of several clients arrive.
    """

    def __init__(self, seed: str, share: float, rare_share: float) -> None:
        self._seed = seed
        self._shares = {**dict.fromkeys(PLACES, share), "session_heartbeat": share}
        self._rare_share = rare_share
        self._attempts: Counter[str] = Counter()
        self._choices = [fault for faults in RECOVERS.values() for fault in dict.fromkeys(faults)]

    def __call__(self, passing: Passing) -> Fault | None:
        """Returns the fault of this request."""
        if passing.place == "config":
            return IN_CHUNKS
        number = "" if passing.number is None else f"{passing.number[0].partition(':')[2]} {passing.number[1]}"
        request = f"{passing.place} {number}"
        self._attempts[request] += 1
        dice = random.Random(f"{self._seed}/{request}/{self._attempts[request]}")
        share = self._shares.get(passing.place, self._rare_share)
        return dice.choice(self._choices) if dice.random() < share else None


def always_in_chunks(passing: Passing) -> Fault | None:
    """Injects no fault; sends calls of three datums as two requests, as on the other side."""
    return IN_CHUNKS if passing.place == "config" else None


@asynccontextmanager
async def side(
    url: str, state: Path, watch: Watch, faults: SeededFaults | None
) -> AsyncGenerator[tuple[Side, FaultProxy]]:
    """Opens a service client behind its own proxy; closes both at the end."""
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
            SoakFailed: a promise does not hold.
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
                tally.checked["no warning, no unhandled error"] += 1
        for name, bound in GROWTH_BOUNDS.items():
            check_growth(name, tally.sizes[name], bound)
            tally.checked[f"{name} does not grow"] += growth(tally.sizes[name]) is not None

    async def segment(self, index: int) -> None:
        """Plays one segment on both sides at the same time, and compares the results."""
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
        tally.checked["clients usable after callers were cancelled at any moment"] += wandering.result()
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
        """Checks that nothing is left of the closed clients and proxies."""
        tally = self.tally
        now = await settled_look(self.process, tally.looks["start"])
        if tally.segments <= WARM_UP:
            tally.looks["warm"] = now
        else:
            for name, sizes in tally.sizes.items():
                sizes.append(getattr(now, name))
        tally.looks["end"] = now
        check_counts(tally.looks["start"], now)
        tally.checked["tasks, threads and descriptors as at the start"] += 1


async def soak(settings: Settings, tally: Tally) -> None:
    """Starts a service, and runs a soak against it.

    Raises:
        SoakFailed: a promise does not hold.
    """
    torch.set_num_threads(1)  # the matrices of the tiny model are too small for a second thread
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, tempfile.TemporaryFile("w+") as log:
        state = Path(folder)
        with serving("--custom-losses", "--state-dir", folder, log=log, own_session=True) as (process, url):
            settings.on_start(f"listening at {url}")
            await Soak(settings, url, state, process.pid, tally).run()
        log.seek(0)
        output = log.read().strip()
        if output:
            raise SoakFailed(f"the service wrote to its log: {output[:2000]}")
    tally.checked["the service wrote nothing to its log"] += 1
