"""What a coroutine that suppresses its cancellation can hold up: nothing."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
import torch

from tests.losses.failing_terms import SHORT
from tests.losses.support import LIMIT, async_l2, async_nll, guide_logprobs, recorded, spec
from tinkex_py import Executor, Pipeline, RegularizerTimeout, execute
from tinkex_py.regularizers import SampledKL

Wait = Callable[[], Coroutine[Any, Any, object]]


class Stubborn:
    """A term that waits again after every exception, also after the one that closes it.

    Args:
        wait: what it awaits, again and again.
    """

    def __init__(self, wait: Wait) -> None:
        self.started = asyncio.Event()
        self.suppressed = 0
        self._wait = wait

    async def compute(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        while True:
            self.started.set()
            try:
                await self._wait()
            except:  # noqa: E722  # that is the point
                self.suppressed += 1


async def sleeping() -> None:
    await asyncio.sleep(3600)


async def on_an_event() -> None:
    await asyncio.Event().wait()


async def with_anyio() -> None:
    await anyio.sleep(3600)


async def in_an_anyio_scope() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 3600)
        await anyio.sleep(3600)


async def nested() -> None:
    try:
        await asyncio.sleep(3600)
    except:  # noqa: E722  # two of them suppress it
        await asyncio.sleep(3600)


async def with_a_deadline_of_its_own() -> None:
    async with asyncio.timeout(3600):
        await asyncio.sleep(3600)


WAITS: list[Wait] = [sleeping, on_an_event, with_anyio, in_an_anyio_scope, nested, with_a_deadline_of_its_own]


def pipeline(term: Any, **options: Any) -> Pipeline:
    return Pipeline(async_nll, [spec(term, "stubborn", timeout=SHORT), *options.pop("others", [])], **options)


@pytest.mark.asyncio
@pytest.mark.parametrize("wait", WAITS)
async def test_a_term_that_suppresses_everything_does_not_hold_up_the_step(wait: Wait):
    term, before = Stubborn(wait), asyncio.all_tasks()
    stubborn = pipeline(term, cancel_grace=SHORT)
    with recorded("tinkex.regularizer.abandoned") as events, pytest.raises(RegularizerTimeout) as caught:
        await asyncio.wait_for(stubborn.compute([], guide_logprobs()), LIMIT)
    assert caught.value.name == "stubborn"
    assert "it did not end within 0.02 s of its cancellation and is not resumed again" in str(caught.value)
    assert [event.metadata["regularizer_name"] for event in events] == ["stubborn"]
    suppressed = term.suppressed
    assert suppressed >= 1
    await asyncio.sleep(0)
    assert term.suppressed == suppressed
    assert asyncio.all_tasks() == before
    output = await Pipeline(async_nll).compute([], guide_logprobs())
    assert output.loss_total == pytest.approx(0.98)


@pytest.mark.asyncio
async def test_it_gives_its_permit_back():
    term = Stubborn(sleeping)
    options: dict[str, Any] = {"max_concurrency": 1, "cancel_grace": SHORT}
    stubborn = spec(term, "stubborn", timeout=SHORT, on_error="skip")
    waiting = Pipeline(async_nll, [stubborn, spec(async_l2, "l2")], **options)
    output = await asyncio.wait_for(waiting.compute([], guide_logprobs()), LIMIT)
    assert (list(output.regularizers), output.skipped) == (["l2"], {"stubborn": "RegularizerTimeout"})


@pytest.mark.asyncio
async def test_within_its_grace_a_term_cleans_up():
    cleaned: list[str] = []

    async def cleans_up(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(SHORT)  # suppressed, and yet it ends soon
        finally:
            await asyncio.sleep(SHORT)
            cleaned.append("all of it")
        return logprobs.sum()

    with recorded("tinkex.regularizer.*") as events, pytest.raises(RegularizerTimeout) as caught:
        await asyncio.wait_for(pipeline(cleans_up).compute([], guide_logprobs()), LIMIT)
    assert cleaned == ["all of it"]
    assert str(caught.value).endswith("increase timeout or make it faster")
    assert "tinkex.regularizer.abandoned" not in [event.name for event in events]


@pytest.mark.asyncio
@pytest.mark.parametrize("in_a_group", [False, True])
@pytest.mark.parametrize("suppresses", [False, True])
async def test_tasks_that_a_term_leaves_are_counted_and_named(in_a_group: bool, suppresses: bool):
    """A task that suppresses the cancellation holds up the term that awaits it, which itself suppresses nothing."""
    end = asyncio.Event()

    async def poll() -> None:
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                if not suppresses:
                    raise

    async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        asyncio.create_task(end.wait(), name="watcher")  # noqa: RUF006  # nobody awaits it: that is the point
        task = asyncio.create_task(poll(), name="poll")
        await (asyncio.gather(task) if in_a_group else task)
        return logprobs.sum()

    with recorded("tinkex.regularizer.abandoned") as events, pytest.raises(RegularizerTimeout) as caught:
        await asyncio.wait_for(pipeline(term, cancel_grace=SHORT).compute([], guide_logprobs()), LIMIT)
    left = [task for task in asyncio.all_tasks() if task.get_name() in ("poll", "watcher")]
    end.set()
    await asyncio.wait(left)
    named = "2 task(s) that it started still run: poll, watcher" if suppresses else "1 task(s) that it started still"
    assert named in str(caught.value)
    expected = [(2, "poll, watcher")] if suppresses else []
    found = [(event.measurements["tasks_left"], event.metadata["task_names"]) for event in events]
    assert found == expected


@pytest.mark.asyncio
async def test_a_task_that_ends_late_ends_its_term():
    """The grace covers what the term awaits, and its result is that of an ordinary cancellation."""
    ended: list[str] = []

    async def slow_to_end() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(SHORT)
            ended.append("task")

    async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            await asyncio.create_task(slow_to_end())
        finally:
            ended.append("term")
        return logprobs.sum()

    with pytest.raises(RegularizerTimeout):
        await asyncio.wait_for(pipeline(term).compute([], guide_logprobs()), LIMIT)
    assert ended == ["task", "term"]


@pytest.mark.asyncio
async def test_results_and_errors_of_tasks_reach_the_term():
    async def part(value: float) -> float:
        await asyncio.sleep(0)
        if value < 0:
            raise ValueError("negative")
        return value

    async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        numbers = await asyncio.gather(part(2.0), part(3.0))
        with pytest.raises(ValueError, match="negative"):
            await asyncio.create_task(part(-1.0))
        cancelled = asyncio.create_task(part(1.0))
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return logprobs.sum() * sum(numbers)

    output = await Executor.execute_one(spec(term, "parts"), [], guide_logprobs())
    assert output.value == pytest.approx(5.0 * -4.9)


@pytest.mark.asyncio
async def test_the_task_factory_of_the_loop_is_used_and_stays():
    made: list[str] = []

    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Task[Any]":
        task = asyncio.Task(work, loop=loop, **options)
        made.append(task.get_coro().__qualname__)  # type: ignore[union-attr]
        return task

    async def part() -> None:
        await asyncio.sleep(0)

    async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.create_task(part())
        return logprobs.sum()

    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        await Pipeline(term).compute([], guide_logprobs())
        assert loop.get_task_factory() is factory
    finally:
        loop.set_task_factory(None)
    assert part.__qualname__ in made


@pytest.mark.asyncio
async def test_a_retry_policy_that_suppresses_everything_does_not_hold_up_the_step():
    import tenacity

    class Patient(tenacity.AsyncRetrying):
        async def __call__(self, *_args: Any, **_options: Any) -> Any:
            while True:
                try:
                    await asyncio.sleep(3600)
                except:  # noqa: E722  # that is the point
                    continue

    stubborn = spec(async_l2, "stubborn", timeout=SHORT, retry=Patient())
    with pytest.raises(RegularizerTimeout):
        await asyncio.wait_for(Pipeline(async_nll, [stubborn], cancel_grace=SHORT).compute([], guide_logprobs()), LIMIT)


@pytest.mark.asyncio
async def test_an_async_reference_that_suppresses_everything_does_not_hold_up_the_step():
    stubborn = Stubborn(sleeping)

    async def reference(data: Any) -> torch.Tensor:
        return await stubborn.compute(data, guide_logprobs())

    term = spec(SampledKL(reference=reference, mask=None), "stubborn", timeout=SHORT)
    waiting = Pipeline(async_nll, [term], cancel_grace=SHORT)
    with pytest.raises(RegularizerTimeout):
        await asyncio.wait_for(waiting.compute([], guide_logprobs()), LIMIT)
    assert stubborn.suppressed == 2  # the cancellation and the end


@pytest.mark.asyncio
async def test_execute_is_bounded_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tinkex_py.losses.direct.DEFAULTS", {"cancel_grace": SHORT})
    term = Stubborn(sleeping)
    executing = asyncio.create_task(execute(term, [], guide_logprobs()))
    await term.started.wait()
    executing.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await asyncio.wait_for(executing, LIMIT)
    assert "it did not end within" in caught.value.__notes__[0]


PROGRAM = """
import asyncio, sys
from tinkex_py import Pipeline, RegularizerSpec, RegularizerTimeout
import torch

async def stubborn(data, logprobs):
    while True:
        try:
            await asyncio.sleep(0.01)
        except:
            pass

async def main():
    specs = [RegularizerSpec(fn=stubborn, weight=1.0, name="stubborn", timeout=0.05)]
    pipeline = Pipeline(lambda data, logprobs: -logprobs.mean(), specs, cancel_grace=0.05)
    for _ in range(2):
        try:
            await pipeline.compute([], -torch.ones(4))
        except RegularizerTimeout as error:
            print(error.name)

if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main(), debug=sys.argv[1] == "debug")
print("ended")
"""


@pytest.mark.parametrize("loop", ["asyncio", "debug", "uvloop"])
def test_the_program_ends_without_a_warning(loop: str):
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, loop], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (0, "stubborn\nstubborn\nended\n"), done.stderr
    lines = [line for line in done.stderr.splitlines() if "Executing <" not in line]  # slow steps, in debug mode
    assert lines == [] or loop == "debug"
    assert not any(word in done.stderr for word in ("ignored", "destroyed", "never awaited"))
