"""A run that ended at any moment resumes, with the numbers of an uninterrupted run.

A process that is really killed is in tests/commands/test_train.py.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs.support import Calls, Snapshots, batches, calm, losses, pipeline, run_to
from tinkex_py import AdamParams, AsyncServiceClient, ConfigError, InvalidSpec, NotFound, RequestFailed
from tinkex_py.runs import StepRecord, read_run, read_steps
from tinkex_py.runs.folder import STATE_FILE, STEPS_FILE
from tinkex_py.runs.progress import NoProgress

pytestmark = pytest.mark.asyncio


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_from_every_moment_the_same_numbers_come_out(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "original", tmp_path / "copies")
    async with AsyncServiceClient.local(model="tiny", state_dir=tmp_path / "original" / "service") as service:
        await run_to(service, tmp_path / "original" / "run", accumulate=2, progress=snapshots)
    whole = losses(tmp_path / "original" / "run")
    assert len(whole) == 6
    moments = [moment for moment, _ in snapshots.taken]
    assert "saving a checkpoint after step 4" in moments
    chosen = random.Random(7).sample(snapshots.taken, 2)
    chosen += [taken for taken in snapshots.taken if taken[0] in ("start", "saving a checkpoint after step 4")]
    for moment, copy in chosen:
        async with AsyncServiceClient.local(model="tiny", state_dir=copy / "service") as service:
            run = await run_to(service, copy / "run", accumulate=2)
        assert losses(copy / "run") == whole, moment
        assert [step.step for step in read_steps(copy / "run")] == [1, 2, 3, 4, 5, 6], moment
        assert run.info.status == "finished"


async def test_a_line_that_reached_the_disk_in_part_is_forgotten(bench: Any, tmp_path: Path) -> None:
    await run_to(bench.service, tmp_path / "run", steps=2)
    with (tmp_path / "run" / STEPS_FILE).open("ab") as file:
        file.write(b'{"step": ')
    await run_to(bench.service, tmp_path / "run", steps=4)
    assert losses(tmp_path / "run") == await calm(bench.service, 4)


async def test_a_run_that_was_asked_to_stop_goes_on(bench: Any, tmp_path: Path) -> None:
    stop = asyncio.Event()

    class Stopping(NoProgress):
        def doing(self, text: str) -> None:
            if text == "step 3":
                stop.set()

    first = await run_to(bench.service, tmp_path / "run", stop=stop, checkpoint_every=None, progress=Stopping())
    assert (first.info.status, first.info.reason) == ("stopped", "stop was requested")
    assert first.checkpoint.endswith("weights/step-000003")
    assert len(read_steps(tmp_path / "run")) == 3
    calls = Calls(bench.service)
    second = await run_to(bench.service, tmp_path / "run", model=calls)
    assert second.info.status == "finished"
    assert second.info.started_at == first.info.started_at
    assert calls.made == []
    assert losses(tmp_path / "run") == await calm(bench.service, 6)


@pytest.mark.parametrize("accumulate", [1, 2])
async def test_a_stop_while_a_batch_is_awaited_ends_the_run(bench: Any, tmp_path: Path, accumulate: int) -> None:
    """Nothing of the data is lost, also where a part of a step's batches had come."""
    stop = asyncio.Event()
    ended: list[str] = []

    async def slow(position: int) -> AsyncIterator[Any]:
        for number, batch in enumerate(batches(position), start=position):
            if number == 2 * accumulate + accumulate - 1:
                stop.set()
                try:
                    async with asyncio.timeout(60):  # belongs to the task that entered it
                        await asyncio.Event().wait()
                finally:
                    ended.append("source")
            yield batch

    options = {"stop": stop, "accumulate": accumulate, "checkpoint_every": None}
    first = await run_to(bench.service, tmp_path / "run", batches=slow, **options)
    assert (first.info.status, first.info.reason) == ("stopped", "stop was requested")
    assert ended == ["source"]
    assert len(read_steps(tmp_path / "run")) == 2
    second = await run_to(bench.service, tmp_path / "run", accumulate=accumulate)
    assert second.info.status == "finished"
    assert losses(tmp_path / "run") == await calm(bench.service, 6, accumulate)


async def test_a_stop_before_the_first_step_leaves_a_run_that_can_go_on(bench: Any, tmp_path: Path) -> None:
    stop = asyncio.Event()
    stop.set()
    run = await run_to(bench.service, tmp_path, stop=stop)
    assert (run.info.status, run.last) == ("stopped", None)
    assert (await run_to(bench.service, tmp_path)).info.status == "finished"


class Cancelling(NoProgress):
    """Cancels the run at a moment."""

    def __init__(self, moment: str) -> None:
        self.running: asyncio.Task[Any] | None = None
        self._moment = moment

    def doing(self, text: str) -> None:
        if text == self._moment and self.running is not None:
            self.running.cancel()

    def step(self, record: StepRecord) -> None:
        self.doing(f"made {record.step}")


async def test_a_cancelled_run_says_so_and_goes_on(bench: Any, tmp_path: Path) -> None:
    expected = await calm(bench.service, 4)
    for moment in ("step 1", "step 4", "saving a checkpoint after step 2", "made 3"):
        folder, view = tmp_path / moment, Cancelling(moment)
        view.running = asyncio.create_task(run_to(bench.service, folder, steps=4, progress=view))
        with pytest.raises(asyncio.CancelledError):
            await view.running
        info = read_run(folder)
        assert (info.status, info.reason) == ("stopped", "cancelled"), moment
        left = [task for task in asyncio.all_tasks() if task.get_name().startswith(("tinkex.step", "tinkex.sink"))]
        assert left == [], moment
        run = await run_to(bench.service, folder, steps=4)
        assert run.info.status == "finished", moment
        assert losses(folder) == expected, moment


async def test_a_run_that_was_cancelled_before_its_first_checkpoint_says_so(bench: Any, tmp_path: Path) -> None:
    arrived, never = asyncio.Event(), asyncio.Event()

    async def hold(*arguments: Any) -> None:
        arrived.set()
        await never.wait()

    bench.recorder.faults["save_weights"] = [hold]
    running = asyncio.create_task(run_to(bench.service, tmp_path))
    await arrived.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    never.set()
    assert (read_run(tmp_path).status, read_run(tmp_path).reason) == ("stopped", "cancelled")
    assert not (tmp_path / STATE_FILE).exists()
    assert (await run_to(bench.service, tmp_path)).info.status == "finished"


async def test_a_finished_run_stays_as_it_is_and_can_be_made_longer(bench: Any, tmp_path: Path) -> None:
    first = await run_to(bench.service, tmp_path / "run", steps=3)
    again = await run_to(bench.service, tmp_path / "run", steps=3)
    assert (again.last, again.checkpoint) == (first.last, first.checkpoint)
    assert bench.kinds(again.training) == []
    longer = await run_to(bench.service, tmp_path / "run", steps=6)
    assert longer.info.status == "finished"
    assert losses(tmp_path / "run") == await calm(bench.service, 6)


async def test_other_settings_are_refused_by_name(bench: Any, tmp_path: Path) -> None:
    config = {"data": {"file": "a.jsonl"}}
    options: dict[str, Any] = {"optimizer": AdamParams(learning_rate=1e-3), "config": config}
    await run_to(bench.service, tmp_path, steps=1, **options)
    before = contents(tmp_path)
    other_pipeline = pipeline()
    other_pipeline.regularizers[1].weight.__init__(0.2, 0.0, 6)
    calls = Calls(bench.service)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"optimizer": AdamParams(learning_rate=2e-3)}, "optimizer.learning_rate was 0.001 and is 0.002"),
        ({"config": {"data": {"file": "b.jsonl"}}}, "config.data.file was 'a.jsonl' and is 'b.jsonl'"),
        ({"config": {}}, "config.data.file was 'a.jsonl' and is not set"),
        ({"accumulate": 2, "execution": "auto"}, "accumulate was 1 and is 2; .*execution was 'client' and is 'auto'"),
        ({"pipeline": other_pipeline}, r"pipeline.regularizers.entropy.weight was 'Linear\(start=0.1.* and is 'Linear"),
    ]
    for change, words in changes:
        with pytest.raises(ConfigError, match=words):
            await run_to(bench.service, tmp_path, model=calls, **{**options, **change})
        assert contents(tmp_path) == before, words
    assert calls.made == []
    free: dict[str, Any] = {"checkpoint_every": 1, "keep_checkpoints": 1, "checkpoint_ttl": 60, "resends": 0}
    assert (await run_to(bench.service, tmp_path, steps=2, **free, **options)).info.status == "finished"


async def test_a_checkpoint_that_is_gone_is_told_and_nothing_changes(bench: Any, tmp_path: Path) -> None:
    run = await run_to(bench.service, tmp_path, steps=1)
    await bench.service.create_rest_client().delete_checkpoint(run.checkpoint)
    before = contents(tmp_path)
    with pytest.raises((RequestFailed, NotFound), match="step-000001"):
        await run_to(bench.service, tmp_path)
    assert contents(tmp_path) == before


async def test_shorter_data_is_told(bench: Any, tmp_path: Path) -> None:
    await run_to(bench.service, tmp_path, steps=3)
    with pytest.raises(ConfigError, match="batches ended after 2 batches, but the run has already read 3"):
        await run_to(bench.service, tmp_path, batches=list(batches(0, 2)))


async def test_a_state_of_another_pipeline_or_run_is_refused(bench: Any, tmp_path: Path) -> None:
    await run_to(bench.service, tmp_path, steps=1)
    state = tmp_path / STATE_FILE
    state.write_text(state.read_text().replace('"l2_weight_decay": {', '"other": {'))
    with pytest.raises(InvalidSpec, match="other"):
        await run_to(bench.service, tmp_path)
    os.unlink(tmp_path / "run.json")  # noqa: PTH108
    with pytest.raises(ConfigError, match=r"has a state\.json, but no run\.json"):
        await run_to(bench.service, tmp_path)
