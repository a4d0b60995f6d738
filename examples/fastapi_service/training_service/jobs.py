"""The jobs. Each is a task of one task group and records its progress."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from tinkex_py import AsyncServiceClient, ClientClosed, RateLimited, TinkexError
from tinkex_py.integrations.fastapi import detail_of
from tinkex_py.runs import RunInfo, StepRecord, TrainedRun, scalars
from training_service.models import JobRequest, JobResult, JobState, Status, Step
from training_service.training import train_job

LOGGER = logging.getLogger("training_service")
KEPT = 100  # ended jobs


class Job:
    """One job. It is the `ProgressView` of its run; its followers wait for `_changed`."""

    def __init__(self, request: JobRequest) -> None:
        self.id = uuid4().hex[:12]
        self.request = request
        self.status: Status = "running"
        self.history: list[Step] = []
        self.error: str | None = None
        self.trained: TrainedRun | None = None
        self.followers = 0
        self.task: asyncio.Task[None] | None = None
        self.began = time.monotonic()
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self.status != "running"

    def state(self) -> JobState:
        return JobState(
            id=self.id,
            status=self.status,
            steps=self.request.steps,
            steps_made=len(self.history),
            loss=self.history[-1].metrics["loss/total"] if self.history else None,
            error=self.error,
            followers=self.followers,
        )

    def result(self) -> JobResult | None:
        if self.status != "finished" or self.trained is None:
            return None
        first, last = self.history[0].metrics, self.history[-1].metrics
        return JobResult(
            id=self.id,
            checkpoint=self.trained.checkpoint,
            first_loss=first["loss/total"],
            last_loss=last["loss/total"],
            history=self.history,
        )

    def end(self, status: Status, error: str | None = None) -> None:
        self.status, self.error = status, error
        self._tell()

    async def steps_after(self, last: int) -> AsyncIterator[Step]:
        """Yields the steps after step `last`, and later ones as they are made, until the job is over."""
        self.followers += 1
        try:
            while True:
                changed = self._changed
                while last < len(self.history):
                    last += 1
                    yield self.history[last - 1]
                if self.is_over:
                    return
                await changed.wait()
        finally:
            self.followers -= 1

    def seconds_left(self) -> float:
        """Estimates the rest from the steps made so far; 1 s before the first."""
        made = len(self.history)
        return (time.monotonic() - self.began) / made * (self.request.steps - made) if made else 1.0

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # The methods of a ProgressView

    def start(self, run: RunInfo, made: int) -> None:
        del self.history[made:]

    def doing(self, text: str) -> None:
        LOGGER.debug("job %s: %s", self.id, text)

    def step(self, record: StepRecord) -> None:
        del self.history[record.step - 1 :]  # a run that restarts from a checkpoint repeats steps
        numbers = {name: value for name, value in scalars(record).items() if math.isfinite(value)}  # JSON has no NaN
        self.history.append(Step(step=record.step, metrics=numbers))
        self._tell()

    def finish(self, run: RunInfo) -> None:
        LOGGER.info("job %s: %s", self.id, run.status)


class Jobs:
    """All jobs. All of them end with the `async with` block of `running_jobs`."""

    def __init__(
        self, group: asyncio.TaskGroup, service: AsyncServiceClient, base_model: str, folder: Path, limit: int
    ) -> None:
        self._group = group
        self._service = service
        self._base_model = base_model
        self._folder = folder
        self._limit = limit
        self._jobs: dict[str, Job] = {}
        self._is_closing = False

    def start(self, request: JobRequest) -> Job:
        """Starts a job.

        Raises:
            RateLimited: the limit of running jobs is reached.
            ClientClosed: the server is stopping.
        """
        if self._is_closing:
            raise ClientClosed("the server is stopping")
        running = [job for job in self._jobs.values() if not job.is_over]
        if len(running) >= self._limit:
            wait = max(1, math.ceil(min(job.seconds_left() for job in running)))
            raise RateLimited(f"{len(running)} jobs are running", status=429, retry_after=wait)
        job = Job(request)
        self._jobs[job.id] = job
        self._forget_old()
        job.task = self._group.create_task(self._run(job), name=f"job {job.id}")
        return job

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def all(self) -> list[Job]:
        return list(self._jobs.values())

    async def cancel(self, job: Job) -> None:
        """Cancels a job and waits until it is over; a job that is over stays as it is."""
        if job.task is not None and not job.is_over:
            job.task.cancel()
            await asyncio.wait([job.task])
            if not job.is_over:  # the task was cancelled before it started
                job.end("cancelled")

    async def close(self) -> None:
        """Cancels all jobs, which ends the streams of their followers; later jobs are refused."""
        self._is_closing = True
        async with asyncio.TaskGroup() as group:
            for job in self.all():
                group.create_task(self.cancel(job))

    async def _run(self, job: Job) -> None:
        try:
            folder = self._folder / job.id
            job.trained = await train_job(self._service, self._base_model, job.request, folder, job)
        except asyncio.CancelledError:
            job.end("cancelled")
            raise
        except TinkexError as error:
            job.end("failed", f"{type(error).__name__}: {detail_of(error)}")
        except Exception as error:
            LOGGER.exception("job %s failed", job.id)
            job.end("failed", type(error).__name__)
        else:
            job.end("finished")

    def _forget_old(self) -> None:
        over = [job.id for job in self.all() if job.is_over]
        for job_id in over[:-KEPT]:
            del self._jobs[job_id]


@asynccontextmanager
async def running_jobs(service: AsyncServiceClient, base_model: str, folder: Path, limit: int) -> AsyncIterator[Jobs]:
    """Yields the jobs; leaving the block cancels those that still run and waits for them."""
    async with asyncio.TaskGroup() as group:
        jobs = Jobs(group, service, base_model, folder, limit)
        try:
            yield jobs
        finally:
            await jobs.close()
