"""Plays a plan on one service client."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.client.data import bad_datum
from tests.faults.runs import weights
from tests.soak.outcomes import Outcome, digest, numbers_of
from tests.soak.plan import (
    BuiltIn,
    Burst,
    Call,
    Custom,
    DataPlan,
    Forward,
    Leaving,
    Optim,
    Reopen,
    Samples,
    Save,
    Trainer,
    Wandering,
)
from tests.soak.terms import BASES, Stage, datums, spec
from tests.soak.watch import Clock, SoakFailed
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    AsyncTrainingClient,
    ModelInput,
    SamplingParams,
    TinkexError,
)

DEADLINE = 0.15
"""Deadline of a call with a term that waits forever, in seconds."""
TIME_TO_LIVE = 600
"""Time to live of a checkpoint, in seconds."""
USABILITY_DATA = DataPlan(seed=1, lengths=(3, 2), candidates=None, container="numpy")


@dataclass(frozen=True)
class Ready:
    """A call that can be started.

    Attributes:
        kind: kind of the call.
        start: starts it.
        stage: the stage of its terms.
        leaving: how its caller leaves.
        leaves_after: seconds after which the caller leaves, in any state of the call.
    """

    kind: str
    start: Callable[[], Awaitable[object]]
    stage: Stage
    leaving: Leaving = "stays"
    leaves_after: float | None = None

    @property
    def compared(self) -> bool:
        """Whether its outcome depends on the plan alone."""
        return self.leaves_after is None


@dataclass(frozen=True)
class Played:
    """The outcomes, optimizer steps and last checkpoint of a trainer."""

    outcomes: list[Outcome]
    steps: int
    path: str


@dataclass
class Side:
    """One service client that plays; the other side is its twin.

    Attributes:
        service: the client.
        state: folder of the service.
        clock: measures every call.
        seen: how often calls ended in a planned failure, by error class; "skipped" counts skipped terms.
        left: the same for calls that may be cancelled at any moment.
        numbered: ids of the trained models.
    """

    service: AsyncServiceClient
    state: Path
    clock: Clock
    seen: Counter[str] = field(default_factory=Counter[str])
    left: Counter[str] = field(default_factory=Counter[str])
    numbered: list[str] = field(default_factory=list[str])
    _saves: int = 0

    # Trainers

    async def train(self, plan: Trainer, last: Played | None) -> Played:
        """Plays the moves of one trainer, from a new adapter or from its last checkpoint."""
        training = await self._opened(plan, last)
        outcomes: list[Outcome] = []
        for move in plan.moves:
            if isinstance(move, Reopen):
                training, saved = await self._reopened(training)
                outcomes.append(saved)
            else:
                outcomes += await self._burst(training, move)
                outcomes.append(Outcome("accumulated", None, str(training.accumulated)))
        path = await self._saved(training)
        outcomes.append(Outcome("weights", None, digest(weights(self.state, path))))
        played = Played(outcomes, training.step, path)
        await self.clock.timed("close a training client", training.aclose)
        return played

    async def _opened(self, plan: Trainer, last: Played | None) -> AsyncTrainingClient:
        if plan.fresh is not None or last is None:
            seed = plan.fresh
            return await self._new(
                lambda: self.service.create_lora_training_client("tiny", rank=2, seed=seed),
                "create_lora_training_client",
            )
        training = await self._resumed(last.path)
        training.step = last.steps
        return training

    async def _new(self, make: Callable[[], Awaitable[AsyncTrainingClient]], kind: str) -> AsyncTrainingClient:
        training = await self.clock.timed(kind, make)
        self.numbered.append(training.model_id)
        return training

    async def _resumed(self, path: str) -> AsyncTrainingClient:
        return await self._new(
            lambda: self.service.create_training_client_from_state(path, with_optimizer=True),
            "create_training_client_from_state",
        )

    async def _reopened(self, training: AsyncTrainingClient) -> tuple[AsyncTrainingClient, Outcome]:
        path = await self._saved(training)
        await self.clock.timed("close a training client", training.aclose)
        again = await self._resumed(path)
        again.step = training.step
        return again, Outcome("reopened", None, digest(weights(self.state, path)))

    async def _saved(self, training: AsyncTrainingClient) -> str:
        saved = await self.clock.timed("save_state", lambda: training.save_state("last", ttl_seconds=TIME_TO_LIVE))
        return saved.path

    async def _burst(self, training: AsyncTrainingClient, burst: Burst) -> list[Outcome]:
        ready = [self.ready(training, call) for call in burst.calls]
        if burst.gathered:
            outcomes = await self._run(ready)
        else:
            outcomes = [outcome for one in ready for outcome in await self._run([one])]
        for outcome, call, failure in zip(outcomes, burst.calls, burst.failures(), strict=True):
            if outcome.compared and outcome.failure != failure:
                raise SoakFailed(f"{call} was planned to end in {failure}, but: {outcome}\n  in {burst}")
        return outcomes

    # Calls

    def ready(self, training: AsyncTrainingClient, call: Call) -> Ready:
        """Prepares one call without sending anything."""
        stage = Stage()
        if isinstance(call, Custom):
            return self._ready_custom(training, call, stage)
        if isinstance(call, BuiltIn):
            data = [*datums(call.data), bad_datum()] if call.refused else datums(call.data)
            kind = "forward_backward, refused" if call.refused else "forward_backward"
            return Ready(kind, lambda: training.forward_backward(data), stage)
        if isinstance(call, Forward):
            data = datums(call.data)
            return Ready("forward", lambda: training.forward(data), stage, leaves_after=call.leaves_after)
        if isinstance(call, Optim):
            params = AdamParams(learning_rate=call.learning_rate)
            return Ready("optim_step", lambda: training.optim_step(params), stage)
        if isinstance(call, Save):
            return Ready("save_state", lambda: self._saved_digest(training), stage)
        return Ready("sampling", lambda: self._sampled(training, call), stage)

    def _ready_custom(self, training: AsyncTrainingClient, call: Custom, stage: Stage) -> Ready:
        data = datums(call.data)
        regularizers = [spec(term, stage) for term in call.terms]

        def start() -> Awaitable[object]:
            return training.forward_backward_custom(
                data,
                BASES[call.base],
                regularizers=regularizers,
                track_grad_norms=call.norms,
                parallel=call.parallel,
                overlap=call.overlap,
                deadline=DEADLINE if call.leaving == "deadline" else None,
                execution="server" if call.on_service else "client",
            )

        kind = "custom step on the service" if call.on_service else "custom step"
        return Ready(kind, start, stage, call.leaving)

    async def _saved_digest(self, training: AsyncTrainingClient) -> str:
        """Saves a checkpoint under a new name and returns its digest."""
        self._saves += 1
        saved = await training.save_state(f"kept{self._saves}", ttl_seconds=TIME_TO_LIVE)
        return digest(weights(self.state, saved.path))

    async def _sampled(self, training: AsyncTrainingClient, call: Samples) -> str:
        client = await training.save_weights_and_get_sampling_client()
        prompt = ModelInput.from_ints(np.random.default_rng(call.seed).integers(0, 256, 6).tolist())

        async def draw(number: int) -> str:
            params = SamplingParams(max_tokens=6, seed=call.seed + number, temperature=1.0)
            response = await client.sample(prompt, num_samples=2, sampling_params=params)
            return str([sequence.tokens for sequence in response.sequences])

        draws = [
            Ready("sample", lambda number=number: draw(number), Stage(), leaves_after=moment)
            for number, moment in enumerate(call.leave_after)
        ]
        drawn = await self._run(draws)
        await client.aclose()
        if failed := [outcome for outcome in drawn if outcome.compared and outcome.failure]:
            raise SoakFailed(f"a sample failed: {failed[0]}")
        return str([outcome.numbers for outcome in drawn if outcome.compared])

    async def _run(self, ready: Sequence[Ready]) -> list[Outcome]:
        """Starts calls in order, without waiting between them; returns when all have ended and no term waits."""
        tasks = [asyncio.create_task(self._call(one), name=f"soak.{one.kind}") for one in ready]
        leavers: list[asyncio.Task[None]] = []
        try:
            await asyncio.sleep(0)  # every call has taken its turn in the order
            leavers = [
                asyncio.create_task(_leave(one, task), name="soak.leaver")
                for one, task in zip(ready, tasks, strict=True)
                if one.leaving in ("at once", "inside a term") or one.leaves_after is not None
            ]
            await asyncio.wait(tasks)
        finally:
            for task in (*tasks, *leavers):
                task.cancel()
            await asyncio.gather(*tasks, *leavers, return_exceptions=True)
            for one in ready:
                one.stage.let_go.set()
        return [self._outcome(one, task) for one, task in zip(ready, tasks, strict=True)]

    async def _call(self, one: Ready) -> object:
        return await self.clock.timed(one.kind, one.start)

    def _outcome(self, one: Ready, task: asyncio.Task[object]) -> Outcome:
        seen = self.seen if one.compared else self.left
        if task.cancelled():
            seen["CancelledError"] += 1
            return Outcome(one.kind, "CancelledError", "", one.compared)
        error = task.exception()
        if error is None:
            output = task.result()
            seen["skipped"] += len(getattr(output, "skipped", ()))
            return Outcome(one.kind, None, numbers_of(output), one.compared)
        if not isinstance(error, TinkexError):
            raise error
        seen[type(error).__name__] += 1
        return Outcome(one.kind, type(error).__name__, str(getattr(error, "name", "")), one.compared)

    # The wanderer

    async def wander(self, plans: Sequence[Wandering]) -> int:
        """Cancels calls of one client at any moment, and checks that the client stays usable.

        Returns:
            How often that was checked.
        """
        training = await self._new_wanderer()
        for plan in plans:
            ready = [
                Ready(one.kind, one.start, one.stage, leaves_after=math.inf if moment is None else moment)
                for one, moment in zip(
                    (self.ready(training, call) for call in plan.calls), plan.leave_after, strict=True
                )
            ]
            allowed = {None, "CancelledError", "PrecedingRequestFailed", *(["ClientClosed"] if plan.closes else [])}
            closing = asyncio.create_task(self._close_soon(training)) if plan.closes else None
            outcomes = await self._run(ready)
            if closing is not None:
                await closing
            for outcome in outcomes:
                if outcome.failure not in allowed:
                    raise SoakFailed(
                        f"unexpected outcome of a call that may be cancelled at any moment: {outcome}\n  in {plan}"
                    )
            if plan.closes:
                training = await self._new_wanderer()
            await self._check_usable(training)
        await self.clock.timed("close a training client", training.aclose)
        return len(plans)

    async def _new_wanderer(self) -> AsyncTrainingClient:
        return await self._new(
            lambda: self.service.create_lora_training_client("tiny", rank=2, seed=1), "create_lora_training_client"
        )

    async def _close_soon(self, training: AsyncTrainingClient) -> None:
        await asyncio.sleep(0.02)
        await self.clock.timed("close a training client", training.aclose)

    async def _check_usable(self, training: AsyncTrainingClient) -> None:
        ordering = training._ordering
        await ordering.drain(self.clock.bound)
        if not ordering.is_empty:
            raise SoakFailed("a request is left in the order of a client after its callers were cancelled")
        for call in (BuiltIn(USABILITY_DATA), Optim(1e-3)):
            (outcome,) = await self._run([self.ready(training, call)])
            if outcome.failure is not None:
                raise SoakFailed(f"a client is not usable after its callers were cancelled: {outcome}")


async def _leave(one: Ready, task: asyncio.Task[object]) -> None:
    """Cancels a call when its plan says so."""
    if one.leaving == "inside a term":
        await one.stage.entered.wait()
    if one.leaves_after is not None:
        if math.isinf(one.leaves_after):
            return
        await asyncio.sleep(one.leaves_after)
    task.cancel()
