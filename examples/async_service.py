"""A small training service: several jobs at once, on one event loop, over one service client.

Shows how to submit jobs, follow their progress, cancel one and collect the results. Runs on the embedded
service, or on TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio
from dataclasses import dataclass, field

from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, RegularizerSpec, TinkexError


def nll(data, logprobs):
    return -logprobs.mean()


def l2(data, logprobs):
    return logprobs.pow(2).mean()


@dataclass(eq=False)
class Job:
    """One fine-tuning run. `status` is queued, running, done, cancelled or failed."""

    name: str
    texts: list[str]
    steps: int
    status: str = "queued"
    losses: list[float] = field(default_factory=list)
    error: str | None = None
    moved: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def move(self, *, status=None, loss=None):
        async with self.moved:
            self.status = status or self.status
            if loss is not None:
                self.losses.append(loss)
            self.moved.notify_all()

    @property
    def ended(self):
        return self.status not in ("queued", "running")

    async def reached(self, steps):
        """Waits until that many steps are done; False if the job ends before."""
        async with self.moved:
            await self.moved.wait_for(lambda: len(self.losses) >= steps or self.ended)
        return len(self.losses) >= steps


class TrainingService:
    """Runs jobs as tasks of one task group, which all end with the `async with` block."""

    def __init__(self, service):
        self._service = service
        self._tasks = {}
        self._group = asyncio.TaskGroup()

    async def __aenter__(self):
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *exc_info):
        return await self._group.__aexit__(*exc_info)

    def submit(self, job):
        self._tasks[job] = self._group.create_task(self._run(job), name=f"job {job.name}")
        return job

    def cancel(self, job):
        self._tasks[job].cancel()

    async def _run(self, job):
        try:
            await job.move(status="running")
            await self._train(job)
        except asyncio.CancelledError:
            await job.move(status="cancelled")
            raise
        except TinkexError as error:  # one failed job must not end the others
            job.error = str(error)
            await job.move(status="failed")
        else:
            await job.move(status="done")

    async def _train(self, job):
        model = (await self._service.get_server_capabilities()).supported_models[0].model_name
        training = await self._service.create_lora_training_client(model, rank=8)
        tokenizer = await training.get_tokenizer()
        data = [make_datum(text, tokenizer) for text in job.texts]
        regularizers = [RegularizerSpec(fn=l2, weight=0.01, name="l2")]
        for _ in range(job.steps):
            output = await training.forward_backward_custom(data, nll, regularizers=regularizers)
            await training.optim_step(AdamParams(learning_rate=5e-3))
            await job.move(loss=output.loss_total)


def make_datum(text, tokenizer):
    tokens = list(tokenizer.encode(text))
    return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})


async def follow(job):
    for step in range(1, job.steps + 1):
        if not await job.reached(step):
            return
        print(f"{job.name}: step {step} of {job.steps}, loss {job.losses[step - 1]:.4f}")


async def cancel_after(trainer, job, steps):
    if await job.reached(steps):
        trainer.cancel(job)


async def main():
    jobs = [
        Job("greetings", ["Hello, how are you?", "Good morning to you."], steps=6),
        Job("numbers", ["one two three four five", "six seven eight nine ten"], steps=6),
        Job("endless", ["This job is cancelled after two steps."], steps=1_000_000),
    ]
    async with (
        AsyncServiceClient.from_env(local="tiny") as service,
        TrainingService(service) as trainer,
        asyncio.TaskGroup() as watchers,
    ):
        for job in jobs:
            trainer.submit(job)
            watchers.create_task(follow(job))
        watchers.create_task(cancel_after(trainer, jobs[-1], steps=2))

    print("\n=== Results ===")
    for job in jobs:
        losses = f", loss {job.losses[0]:.4f} -> {job.losses[-1]:.4f}" if job.losses else ""
        print(f"{job.name}: {job.status} after {len(job.losses)} steps{losses}{f' ({job.error})' if job.error else ''}")


asyncio.run(main())
