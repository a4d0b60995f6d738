"""Batches that the model under training samples: what samples them, when, and where they are kept."""

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import TypeVar

from tinkex_py.arguments import as_number, shown
from tinkex_py.client.sampling import AsyncSamplingClient
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.data.samples import derived_seed
from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.runs.batches import Batch, Batches, checked_batch
from tinkex_py.runs.folder import RunFolder
from tinkex_py.runs.records import SampledBatch
from tinkex_py.runs.recovery import ModelLost, is_transient
from tinkex_py.runs.settings import TrainSettings
from tinkex_py.threads import FileThread
from tinkex_py.user_coroutines import in_own_task

Result = TypeVar("Result")


@dataclass(frozen=True)
class Rollout:
    """What an async function `batches` is called with: what it needs to sample one batch.

    Attributes:
        sampler: of the weights after `policy_step` optimizer steps; nothing changes them.
        training: the client of the model under training. Its weights are those of `sampler` only with a lag of 0.
        batch: number of the batch in the run, from 0.
        step: optimizer steps before the one that trains on the batch.
        policy_step: optimizer steps that the weights of `sampler` have made: `step - lag`, at least 0.
        run_seed: `config["seed"]` of `train`, or 0.
        metrics: numbers to record with the step, such as the mean reward; the function fills it. They appear among the
            scalars as `rollout/NAME`.
    """

    sampler: AsyncSamplingClient
    training: AsyncTrainingClient
    batch: int
    step: int
    policy_step: int
    run_seed: int = 0
    metrics: dict[str, float] = field(default_factory=dict[str, float])

    @cached_property
    def rng(self) -> random.Random:
        """A random generator whose seed depends on the run's seed and the batch."""
        return random.Random(self.seed())  # noqa: S311  # for data, not cryptography

    def seed(self, *place: int | str) -> int:
        """Returns a seed for a place in the batch, such as `(prompt, sample)`: of 31 bits, from the run's seed, too."""
        return derived_seed(self.run_seed, self.batch, *place)


RolloutFunction = Callable[[Rollout], Awaitable[Batch]]
Source = Batches | RolloutFunction


class Rollouts:
    """Samples the batches of a run, up to `lag` optimizer steps ahead of the training.

    Each batch is kept in the run's folder until a checkpoint contains what it was trained for, so that a resumed run
    trains on the same batches.

    Args:
        function: samples one batch.
        seed: of the run.
        settings: of the run.
        folder: of the run, in use.
        files: thread that reads and writes the folder.
        grace: seconds that the function has to end once it is cancelled.
    """

    def __init__(
        self,
        function: RolloutFunction,
        seed: int,
        settings: TrainSettings,
        folder: RunFolder,
        files: FileThread,
        grace: float,
    ) -> None:
        self.function = function
        self._seed = seed
        self._settings = settings
        self._folder = folder
        self._files = files
        self._grace = grace
        self._tasks: dict[int, asyncio.Task[SampledBatch]] = {}
        self._metrics: dict[int, dict[str, float]] = {}

    async def stream(self, position: int) -> AsyncGenerator[Batch]:
        """Yields the batches from `position` on, until none was begun by `refresh`."""
        for number in itertools.count(position):
            task = self._tasks.get(number)
            if task is None:
                return
            batch = await _result(task)
            del self._tasks[number]
            self._metrics[number] = batch.metrics
            yield batch.datums

    async def refresh(self, training: AsyncTrainingClient, made: int) -> None:
        """Begins the batches that the weights after `made` optimizer steps sample. No step is in flight.

        Raises:
            ModelLost: the service failed, but may not after a restart.
        """
        ends = made + self._settings.lag + 1
        steps = range(made, ends if self._settings.steps is None else min(ends, self._settings.steps))
        numbers = [number for step in steps for number in self._batches_of(step) if number not in self._tasks]
        kept = await self._files.run(self._folder.sampled_batches)
        sampler = None
        for number in numbers:
            if number in kept:
                work = self._read(number)
            else:
                sampler = sampler or await _restartable(training.save_weights_and_get_sampling_client())
                step = number // self._settings.accumulate
                work = self._sample(Rollout(sampler, training, number, step, made, self._seed))
            self._tasks[number] = asyncio.create_task(work, name="tinkex.rollout")

    async def settle(self, made: int) -> None:
        """Waits for the batches that weights before a checkpoint sample, which cannot be sampled after it.

        Raises:
            ModelLost: the service failed, but may not after a restart.
        """
        steps = range(made, made + self._settings.lag if made else 0)
        for number in [number for step in steps for number in self._batches_of(step) if number in self._tasks]:
            await _result(self._tasks[number])

    async def forget(self, made: int, *, changed: bool = False) -> None:
        """Deletes the batches that the first `made` steps were trained on.

        Args:
            made: optimizer steps of a checkpoint.
            changed: also delete those that weights after the checkpoint sampled, because these will be others.
        """
        first, last = (step * self._settings.accumulate for step in (made, made + self._settings.lag))
        await self._files.run(lambda: self._folder.keep_sampled(first, last if changed else None))

    def metrics_of(self, step: int) -> dict[str, float]:
        """Returns the metrics of the batches of the step with this number, from 1; means, if there are several."""
        found = [self._metrics.get(number, {}) for number in self._batches_of(step - 1)]
        names = dict.fromkeys(name for metrics in found for name in metrics)
        return {name: fmean(metrics[name] for metrics in found if name in metrics) for name in names}

    async def cancel(self) -> None:
        """Ends the batches in flight."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _batches_of(self, step: int) -> range:
        count = self._settings.accumulate
        return range(step * count, (step + 1) * count)

    async def _read(self, number: int) -> SampledBatch:
        return await self._files.run(lambda: self._folder.read_sampled(number))

    async def _sample(self, rollout: Rollout) -> SampledBatch:
        sampled = await in_own_task(self.function(rollout), grace=self._grace, name="batches")
        datums = checked_batch(sampled, rollout.batch)
        if not datums:
            raise InvalidData(f"batch {rollout.batch} is empty: batches must return at least one datum")
        batch = SampledBatch(datums=tuple(datums), metrics=_checked_metrics(rollout.metrics))
        await self._files.run(lambda: self._folder.write_sampled(rollout.batch, batch))
        return batch


def _checked_metrics(metrics: dict[str, float]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        number = as_number(value)
        if number is None:
            raise ConfigError(f"metrics of a rollout must be numbers, got {shown(value)} for {shown(name)}")
        numbers[str(name)] = number
    return numbers


async def _result(task: "asyncio.Task[SampledBatch]") -> SampledBatch:
    """Waits for a task, which goes on if the caller is cancelled."""
    await asyncio.wait([task])
    return await _restartable(task)


async def _restartable(work: Awaitable[Result]) -> Result:
    try:
        return await work
    except Exception as error:
        if is_transient(error):
            raise ModelLost(error) from error
        raise
