"""Failed steps: a run sends the missing part, restarts from a checkpoint, or fails."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.client.data import bad_datum
from tests.client.recorder import answering
from tests.runs.support import Calls, batch, batches, calm, losses, pipeline, run_to
from tinkex_py import (
    AsyncTrainingClient,
    BadRequest,
    ConfigError,
    Datum,
    Pipeline,
    PipelineError,
    RegularizerError,
    RegularizerSpec,
    RequestFailed,
    RetryPolicy,
    SequenceLost,
    controllers,
    telemetry,
)
from tinkex_py.base_losses import NLL
from tinkex_py.local.engine import Engine
from tinkex_py.runs import TrainedRun, read_run

pytestmark = pytest.mark.asyncio
LOST_ON_THE_SERVICE = answering(200, {"error": "out of memory", "category": "server"})
STEP = ["B", "B", "B", "optim_step"]


@pytest.fixture
def told() -> list[tuple[str, dict[str, Any]]]:
    """What the run told of its troubles."""
    seen: list[tuple[str, dict[str, Any]]] = []
    telemetry.attach(
        lambda event: seen.append((event.name.removeprefix("tinkex.run."), dict(event.metadata))),
        events=["tinkex.run.resent", "tinkex.run.restarted"],
    )
    return seen


def changes(bench: Any, run: TrainedRun) -> list[str]:
    """What the service was asked for, without forward passes."""
    return [kind for kind in bench.kinds(run.training) if kind != "F"]


class Shaky:
    """A term that fails at some of its calls, and adds nothing to the loss."""

    name = "shaky"

    def __init__(self, *failing: int, error: type[Exception] = OSError) -> None:
        self._failing = failing
        self._error = error
        self._calls = 0

    async def compute(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if self._calls in self._failing:
            raise self._error("not now")
        return 0.0 * logprobs.sum()


def shaky_pipeline(*failing: int, error: type[Exception] = OSError) -> Pipeline:
    own = pipeline()
    return Pipeline(own.base_loss, [*own.regularizers, RegularizerSpec(fn=Shaky(*failing, error=error), weight=1.0)])


async def test_only_the_missing_batches_are_sent_again(bench: Any, tmp_path: Path, told: Any) -> None:
    options: dict[str, Any] = {"steps": 3, "accumulate": 3, "checkpoint_every": None}
    await run_to(bench.service, tmp_path / "calm", pipeline=shaky_pipeline(), **options)
    # The fifth call is the second batch of the second step; the third batch is behind it in the lane.
    run = await run_to(bench.service, tmp_path / "run", pipeline=shaky_pipeline(5), **options)
    # No gradient is sent twice, and no update with two of them.
    assert changes(bench, run) == ["save_weights", *STEP * 3, "save_weights"]
    assert told == [("resent", {"step": 2, "reason": "RegularizerError"})]
    # The gradients were added up in the same order, so that the numbers are the same to the last digit.
    assert losses(tmp_path / "run") == losses(tmp_path / "calm")


def fail_in_engine(monkeypatch: pytest.MonkeyPatch, method: str, *calls: int) -> None:
    """Lets these calls of an engine's method fail before they do anything; forward passes are not counted."""
    original, counted = getattr(Engine, method), itertools.count(1)

    def failing(self: Engine, *arguments: Any) -> Any:
        if not getattr(arguments[1], "forward_only", False) and next(counted) in calls:
            raise RuntimeError("CUDA out of memory")
        return original(self, *arguments)

    monkeypatch.setattr(Engine, method, failing)


async def test_an_update_that_the_service_failed_is_sent_again(
    bench: Any, tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await calm(bench.service, 4)
    fail_in_engine(monkeypatch, "optim_step", 2)
    run = await run_to(bench.service, tmp_path / "run", steps=4, checkpoint_every=None)
    assert told == [("resent", {"step": 2, "reason": "RequestFailed"})]
    step = ["B", "optim_step"]
    assert changes(bench, run) == ["save_weights", *step, *step, "optim_step", *step, *step, "save_weights"]
    assert losses(tmp_path / "run") == expected


async def test_a_refused_update_that_the_service_waits_for_takes_the_run_back(
    local_bench: Any, tmp_path: Path, told: Any
) -> None:
    bench = local_bench({"hold_seconds": 0.2})
    async with bench.service:
        expected = await calm(bench.service, 3)
        # Somebody in between refuses the number, so that the service waits for it for ever.
        bench.recorder.faults["optim_step"] = [None, answering(404, {"detail": "no such model"})]
        await run_to(bench.service, tmp_path / "run", steps=3)
    assert told == [
        ("resent", {"step": 2, "reason": "NotFound"}),
        ("restarted", {"step": 2, "checkpoint_step": 0, "reason": "SequenceLost"}),
    ]
    assert losses(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("call", "with_controller", "expected"),
    [
        # Two steps of two backward passes. The first of the second step: if the update is sent before the failure is
        # known, it has run without that gradient.
        (3, False, {"resent", "restarted"}),
        (3, True, {"resent", "restarted"}),
        # The second one: the update is always sent with the last gradient.
        (4, False, {"restarted"}),
    ],
)
async def test_gradients_that_the_service_failed(
    bench: Any,
    tmp_path: Path,
    told: Any,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    with_controller: bool,
    expected: set[str],
) -> None:
    def composed() -> Pipeline:
        return pipeline() if with_controller else Pipeline(NLL(reduction="token-mean"))

    await run_to(bench.service, tmp_path / "calm", steps=3, accumulate=2, pipeline=composed())
    fail_in_engine(monkeypatch, "run_pass", call)
    await run_to(bench.service, tmp_path / "run", steps=3, accumulate=2, pipeline=composed())
    assert [name for name, _ in told][-1] in expected
    assert losses(tmp_path / "run") == losses(tmp_path / "calm")


async def test_a_step_the_service_lost_takes_the_run_back_to_its_checkpoint(
    bench: Any, tmp_path: Path, told: Any
) -> None:
    expected = await calm(bench.service, 5)
    calls = Calls(bench.service)
    # create_model, checkpoint, F B U, F B U, checkpoint, F, then the backward pass of step 3.
    bench.recorder.faults["retrieve_future"] = [*[None] * 10, LOST_ON_THE_SERVICE]
    run = await run_to(bench.service, tmp_path / "run", steps=5, model=calls)
    assert told == [("restarted", {"step": 3, "checkpoint_step": 2, "reason": "RequestFailed"})]
    assert len(calls.made) == 1
    assert run.training is not calls.made[0]
    assert losses(tmp_path / "run") == expected
    assert run.info.status == "finished"


async def test_a_lost_number_takes_the_run_back_to_its_start(local_bench: Any, tmp_path: Path, told: Any) -> None:
    bench = local_bench(retry=RetryPolicy(max_attempts=2, initial_wait=0.0, max_wait=0.01))
    async with bench.service:
        expected = await calm(bench.service, 3)
        unreachable = answering(503)
        bench.recorder.faults["optim_step"] = [unreachable, unreachable]
        await run_to(bench.service, tmp_path / "run", steps=3, model=await Calls(bench.service)())
    assert told == [("restarted", {"step": 1, "checkpoint_step": 0, "reason": "SequenceLost"})]
    assert losses(tmp_path / "run") == expected


async def test_a_run_goes_back_only_so_often(local_bench: Any, tmp_path: Path, told: Any) -> None:
    bench = local_bench(retry=RetryPolicy(max_attempts=1))
    async with bench.service:
        bench.recorder.always["optim_step"] = answering(503)
        with pytest.raises(SequenceLost):
            await run_to(bench.service, tmp_path, steps=3, restarts=2)
        assert [name for name, _ in told] == ["restarted"] * 2
        assert read_run(tmp_path).status == "failed"
        assert str(read_run(tmp_path).reason).startswith("SequenceLost: ")
        del bench.recorder.always["optim_step"]
        assert (await run_to(bench.service, tmp_path, steps=3)).info.status == "finished"


async def test_data_that_cannot_begin_again_ends_the_run_with_a_note(local_bench: Any, tmp_path: Path) -> None:
    bench = local_bench(retry=RetryPolicy(max_attempts=1))
    async with bench.service:
        bench.recorder.always["optim_step"] = answering(503)
        with pytest.raises(SequenceLost) as caught:
            await run_to(bench.service, tmp_path, batches=batches(0))
    assert any("batches is an iterator" in note for note in caught.value.__notes__)


async def test_a_term_that_goes_on_failing_ends_the_run(bench: Any, tmp_path: Path, told: Any) -> None:
    calls = Calls(bench.service)
    with pytest.raises(RegularizerError) as caught:
        await run_to(bench.service, tmp_path, model=calls, pipeline=shaky_pipeline(3, 4, 5, 6), resends=2)
    assert caught.value.name == "shaky"
    assert [name for name, _ in told] == ["resent"] * 2
    assert (read_run(tmp_path).status, read_run(tmp_path).reason) == ("failed", "RegularizerError of 'shaky'")
    # Two whole steps, then three forward passes without a gradient behind them, and no update.
    assert bench.kinds(calls.made[0])[-5:] == ["optim_step", "save_weights", "F", "F", "F"]
    # A term that fails in other calls is another term.
    with pytest.raises(ConfigError, match="captured values of regularizer 'shaky' changed"):
        await run_to(bench.service, tmp_path, pipeline=shaky_pipeline())
    resumed = await run_to(bench.service, tmp_path, pipeline=shaky_pipeline(), allow_changes=True)
    assert resumed.info.status == "finished"
    assert [(change.step, "shaky" in change.what) for change in read_run(tmp_path).changes] == [(3, True)]


async def test_what_would_fail_again_is_not_repeated(bench: Any, tmp_path: Path, told: Any) -> None:
    def not_a_number(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return (logprobs - logprobs).log().sum() * 0

    bad = {"pipeline": Pipeline(NLL(), [RegularizerSpec(fn=not_a_number, weight=1.0, name="nan")])}
    unusable: list[tuple[dict[str, Any], type[Exception]]] = [
        (bad, PipelineError),
        ({"batches": [batch(1), [], batch(2)]}, ValueError),
        ({"batches": [batch(1), [bad_datum()]]}, RequestFailed),
        ({"optimizer": lambda step: 1 / step}, ZeroDivisionError),
    ]
    for number, (options, error) in enumerate(unusable):
        with pytest.raises(error):
            await run_to(bench.service, tmp_path / str(number), **options)
        assert read_run(tmp_path / str(number)).status == "failed"
    bench.recorder.faults["optim_step"] = [answering(400)]
    with pytest.raises(BadRequest):
        await run_to(bench.service, tmp_path / "refused")
    assert told == []


async def test_a_controller_that_fails_ends_the_run(bench: Any, tmp_path: Path) -> None:
    class Broken(controllers.AdaptiveKL):
        def next_weights(self, weights: Any, outputs: Any) -> Any:
            raise ValueError("no weight")

    spec = RegularizerSpec(fn=NLL(), weight=Broken(initial=0.1, target=1.0), name="held")
    with pytest.raises(PipelineError, match="Broken"):
        await run_to(bench.service, tmp_path, pipeline=Pipeline(NLL(), [spec]))
    assert read_run(tmp_path).status == "failed"


async def test_a_failed_save_is_tried_again_under_another_name(bench: Any, tmp_path: Path, told: Any) -> None:
    # create_model, checkpoint, F B U F B U: then the save of step 2.
    bench.recorder.faults["retrieve_future"] = [*[None] * 8, LOST_ON_THE_SERVICE]
    run = await run_to(bench.service, tmp_path, steps=2)
    assert run.checkpoint.endswith("weights/step-000002-2")
    assert run.info.status == "finished"
    assert told == []


async def test_batches_that_raise_leave_a_failed_run_and_no_task(bench: Any, tmp_path: Path) -> None:
    def broken(start: int) -> Any:
        yield from batches(start, 3)
        raise KeyError("secret words of the data")

    with pytest.raises(KeyError):
        await run_to(bench.service, tmp_path, batches=broken)
    assert (read_run(tmp_path).status, read_run(tmp_path).reason) == ("failed", "KeyError")
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "tinkex.step"] == []


@pytest.mark.parametrize("hook", ["evaluate", "model"])
async def test_a_hook_that_suppresses_everything_is_left(bench: Any, tmp_path: Path, hook: str) -> None:
    started = asyncio.Event()

    async def stubborn(*_: Any) -> Any:
        asyncio.create_task(asyncio.sleep(3600), name="watcher")  # noqa: RUF006  # nobody awaits it
        while True:
            started.set()
            try:
                await asyncio.sleep(3600)
            except:  # noqa: E722  # that is the point
                continue

    loss = Pipeline(NLL(), cancel_grace=0.02)
    hooks: dict[str, Any] = {hook: stubborn}
    running = asyncio.create_task(run_to(bench.service, tmp_path, pipeline=loss, evaluate_every=1, **hooks))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await asyncio.wait_for(running, 30)
    (watcher,) = [task for task in asyncio.all_tasks() if task.get_name() == "watcher"]
    watcher.cancel()
    await asyncio.wait([watcher])
    (note,) = caught.value.__notes__
    assert note == (
        f"{hook} was cancelled; it did not end within 0.02 s of its cancellation and is not resumed again; "
        "1 task(s) that it started still run: watcher"
    )
    if hook == "evaluate":
        assert (read_run(tmp_path).status, read_run(tmp_path).reason) == ("stopped", "cancelled")


async def test_a_hook_cleans_up_within_its_grace(bench: Any, tmp_path: Path) -> None:
    started, cleaned = asyncio.Event(), asyncio.Event()

    async def evaluate(training: AsyncTrainingClient, step: int) -> dict[str, float]:
        try:
            started.set()
            await asyncio.sleep(3600)
        finally:
            await training.forward(batch(50))
            cleaned.set()
        return {}

    running = asyncio.create_task(run_to(bench.service, tmp_path, evaluate=evaluate, evaluate_every=1))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 30)
    assert cleaned.is_set()


async def test_a_resumed_run_may_have_another_grace(bench: Any, tmp_path: Path) -> None:
    """It changes no number, and runs of earlier versions have none in their run.json."""
    await run_to(bench.service, tmp_path, steps=2, pipeline=Pipeline(NLL()))
    run = await run_to(bench.service, tmp_path, steps=3, pipeline=Pipeline(NLL(), cancel_grace=1.0))
    assert run.steps == 3
