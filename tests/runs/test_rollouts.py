"""Runs whose batches are sampled by the model under training: which weights sample, resuming, and failures."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from tests.runs.support import Snapshots, run_to
from tinkex_py import (
    AsyncServiceClient,
    ConfigError,
    Datum,
    InvalidData,
    ModelInput,
    Pipeline,
    RegularizerSpec,
    SamplingParams,
    ServerError,
)
from tinkex_py.base_losses import ImportanceSampling, group_advantages
from tinkex_py.data import datum_from_sample, sample_groups
from tinkex_py.regularizers import L2
from tinkex_py.runs import Rollout, RunFolder, read_run, read_steps
from tinkex_py.runs.folder import SAMPLED_FOLDER
from tinkex_py.runs.progress import NoProgress
from tinkex_py.runs.records import SampledBatch
from tinkex_py.types.chunks import EncodedTextChunk, ImageChunk

pytestmark = pytest.mark.asyncio
PROMPTS = [[1, 2, 3], [4, 5]]
PROBE = ModelInput.from_ints([7, 8, 9, 10])


def policy() -> Pipeline:
    mean: dict[str, Any] = {"mask": "weights", "reduction": "token-mean"}
    return Pipeline(ImportanceSampling(**mean), [RegularizerSpec(fn=L2(**mean), weight=0.001)])


async def sampled(run: Rollout) -> list[Datum]:
    """Two groups of three answers; the reward is the share of small tokens, and some noise of the run."""
    params = SamplingParams(max_tokens=4, seed=run.seed())
    groups = await sample_groups(run.sampler, PROMPTS, 3, sampling_params=params)
    answers = [(prompt, answer) for prompt, group in zip(PROMPTS, groups, strict=True) for answer in group]
    rewards = [sum(token < 128 for token in answer.tokens) + run.rng.random() for _, answer in answers]
    run.metrics["reward"] = fmean(rewards)
    advantages = group_advantages(rewards, 3)
    return [datum_from_sample(*answer, own) for answer, own in zip(answers, advantages, strict=True)]


def numbers(folder: Path) -> list[Any]:
    return [(step.rollout, step.batches, [output.loss_total for output in step.losses]) for step in read_steps(folder)]


async def run_policy(service: AsyncServiceClient, folder: Path, steps: int = 5, **options: Any) -> Any:
    return await run_to(service, folder, steps, **{"batches": sampled, "pipeline": policy(), **options})


@pytest.mark.parametrize(("lag", "accumulate"), [(0, 1), (1, 1), (1, 2)])
async def test_from_every_moment_the_same_rewards_and_losses(tmp_path: Path, lag: int, accumulate: int) -> None:
    settings = {"lag": lag, "accumulate": accumulate}
    snapshots = Snapshots(tmp_path / "original", tmp_path / "copies")
    async with AsyncServiceClient.local(model="tiny", state_dir=tmp_path / "original" / "service") as service:
        await run_policy(service, tmp_path / "original" / "run", progress=snapshots, **settings)
    whole = numbers(tmp_path / "original" / "run")
    assert len({rollout["reward"] for rollout, _, _ in whole}) == 5
    assert not list((tmp_path / "original" / "run" / SAMPLED_FOLDER).iterdir())
    by_moment = dict(snapshots.taken)
    chosen = ["saving a checkpoint after step 2", "sampling for step 4", random.Random(lag).choice(list(by_moment))]
    for moment in chosen:
        copy = by_moment[moment]
        async with AsyncServiceClient.local(model="tiny", state_dir=copy / "service") as service:
            run = await run_policy(service, copy / "run", **settings)
        assert numbers(copy / "run") == whole, moment
        assert run.info.status == "finished"


@pytest.mark.parametrize("lag", [0, 1, 2])
async def test_the_weights_of_a_batch_are_so_many_steps_old(bench: Any, tmp_path: Path, lag: int) -> None:
    seen: list[tuple[int, int, int]] = []
    scores: dict[int, list[float | None]] = {}
    trained: dict[int, list[float | None]] = {}

    async def scored(run: Rollout) -> list[Datum]:
        seen.append((run.batch, run.step, run.policy_step))
        scores[run.policy_step] = await run.sampler.compute_logprobs(PROBE)
        return await sampled(run)

    async def evaluate(training: Any, step: int) -> dict[str, float]:
        async with await training.save_weights_and_get_sampling_client() as sampler:
            trained[step] = await sampler.compute_logprobs(PROBE)
        return {"step": step}

    await run_policy(bench.service, tmp_path / "run", 4, batches=scored, lag=lag, evaluate=evaluate, evaluate_every=1)
    assert seen == [(number, number, max(0, number - lag)) for number in range(4)]
    assert {step: own for step, own in scores.items() if step} == {
        step: own for step, own in trained.items() if step in scores
    }
    assert trained[1] != trained[2]


async def test_with_a_lag_the_next_batch_is_sampled_while_a_step_trains(bench: Any, tmp_path: Path) -> None:
    made = asyncio.Event()

    class Made(NoProgress):
        def step(self, record: Any) -> None:
            made.set()

    async def waits_for_the_first_step(run: Rollout) -> list[Datum]:
        if run.batch == 1:
            await made.wait()
        return await sampled(run)

    async with asyncio.timeout(60):
        await run_policy(bench.service, tmp_path / "run", 2, batches=waits_for_the_first_step, lag=1, progress=Made())


async def test_a_checkpoint_waits_for_the_batches_of_older_weights(bench: Any, tmp_path: Path) -> None:
    made, kept = asyncio.Event(), []

    class AtTheCheckpoint(NoProgress):
        def step(self, record: Any) -> None:
            if record.step == 2:
                made.set()

        def doing(self, text: str) -> None:
            if text == "saving a checkpoint after step 2":
                kept.extend(path.name for path in (tmp_path / "run" / SAMPLED_FOLDER).iterdir())

    async def slow(run: Rollout) -> list[Datum]:
        if run.batch == 2:
            await made.wait()
        return await sampled(run)

    async with asyncio.timeout(60):
        await run_policy(bench.service, tmp_path / "run", 3, batches=slow, lag=1, progress=AtTheCheckpoint())
    assert "000002.json" in kept


async def test_a_service_that_fails_while_it_samples_costs_a_restart(bench: Any, tmp_path: Path) -> None:
    failed: list[int] = []

    async def failing_once(run: Rollout) -> list[Datum]:
        if run.batch == 3 and not failed:
            failed.append(run.batch)
            raise ServerError("down", status=503)
        return await sampled(run)

    await run_policy(bench.service, tmp_path / "calm", 4, lag=1)
    await run_policy(bench.service, tmp_path / "run", 4, lag=1, batches=failing_once)
    assert failed == [3]
    assert numbers(tmp_path / "run") == numbers(tmp_path / "calm")


async def test_a_run_that_stops_while_a_batch_is_sampled_goes_on(bench: Any, tmp_path: Path) -> None:
    stop = asyncio.Event()

    async def stuck(run: Rollout) -> list[Datum]:
        if run.batch == 2 and not stop.is_set():
            stop.set()
            await asyncio.Event().wait()
        return await sampled(run)

    await run_policy(bench.service, tmp_path / "calm", 3)
    stopped = await run_policy(bench.service, tmp_path / "run", 3, batches=stuck, stop=stop)
    assert (stopped.info.status, stopped.steps) == ("stopped", 2)
    await run_policy(bench.service, tmp_path / "run", 3, batches=stuck)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "calm")


async def test_another_function_is_noticed_and_samples_again_if_that_is_allowed(bench: Any, tmp_path: Path) -> None:
    async def other(run: Rollout) -> list[Datum]:
        run.metrics["other"] = 1.0
        return await sampled(run)

    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        await run_policy(bench.service, folder, 6, lag=1, evaluate=killed, evaluate_every=3)
    assert len(read_steps(folder)) == 2
    with pytest.raises(ConfigError, match="captured values of batches changed"):
        await run_policy(bench.service, folder, 6, batches=other, lag=1)
    await run_policy(bench.service, folder, 6, batches=other, lag=1, allow_changes=True)
    # The first batch after the checkpoint was sampled before it, by weights that no longer exist.
    assert ["other" in step.rollout for step in read_steps(folder)] == [False, False, False, True, True, True]


def killed(_training: Any, _step: int) -> dict[str, float]:
    raise RuntimeError("killed")


async def no_datum(_run: Rollout) -> Sequence[Datum]:
    return []


async def no_list(_run: Rollout) -> Any:
    return 3


async def no_number(run: Rollout) -> list[Datum]:
    run.metrics["mean"] = "good"  # pyright: ignore[reportArgumentType]
    return await sampled(run)


async def no_argument() -> list[Datum]:
    return []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": no_datum}, InvalidData, "batch 0 is empty"),
        ({"batches": no_list}, InvalidData, "batch 0 must be a sequence of Datum, got a int"),
        ({"batches": no_number}, ConfigError, "metrics of a rollout must be numbers, got 'good' for 'mean'"),
        ({"batches": no_argument}, ConfigError, r"an async function of a Rollout, called as batches\(run\)"),
        ({"batches": [[]], "lag": 1}, ConfigError, "settings.lag=1 needs an async function batches"),
    ],
)
async def test_functions_that_sample_no_batch(
    bench: Any, tmp_path: Path, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await run_policy(bench.service, tmp_path / "run", **options)
    assert not (tmp_path / "run" / SAMPLED_FOLDER).exists()


async def test_an_error_of_the_function_ends_the_run_which_goes_on_later(bench: Any, tmp_path: Path) -> None:
    mended = asyncio.Event()

    async def judged(run: Rollout) -> list[Datum]:
        if run.batch == 2 and not mended.is_set():
            raise OSError("the judge is away")
        return await sampled(run)

    await run_policy(bench.service, tmp_path / "calm", 3)
    with pytest.raises(OSError, match="the judge is away"):
        await run_policy(bench.service, tmp_path / "run", 3, batches=judged)
    assert read_run(tmp_path / "run").outcome == "failed: OSError"
    mended.set()
    await run_policy(bench.service, tmp_path / "run", 3, batches=judged)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "calm")


async def test_a_sampled_batch_is_read_as_it_was_written(tmp_path: Path) -> None:
    picture = ModelInput(chunks=(ImageChunk(data=b"\xff\xd8\xff", expected_tokens=2), EncodedTextChunk(tokens=[5])))
    datums = (
        Datum.from_tokens([1], [2, 3]).with_inputs(logprobs=np.array([-0.1, -np.inf], np.float32)),
        Datum(model_input=picture, loss_fn_inputs={"target_tokens": [[1, 2**40]] * 3}),
    )
    with RunFolder(tmp_path) as folder:
        folder.write_sampled(7, SampledBatch(datums=datums, metrics={"reward": 0.1}))
        assert folder.sampled_batches() == {7}
        read = folder.read_sampled(7)
        assert (read.datums, read.metrics) == (datums, {"reward": 0.1})
        for damaged in ("", "{}", '{"datums": [3]}', '{"datums": [{"model_input": {"chunks": [{"data": "="}]}}]}'):
            (tmp_path / SAMPLED_FOLDER / "000007.json").write_text(damaged)
            with pytest.raises(ConfigError, match="000007.json is not a valid SampledBatch"):
                folder.read_sampled(7)


async def test_seeds_depend_on_the_run_the_batch_and_the_place() -> None:
    def rollout(batch: int, seed: int) -> Rollout:
        return Rollout(sampler=None, training=None, batch=batch, step=batch, policy_step=batch, run_seed=seed)  # pyright: ignore[reportArgumentType]

    places: list[tuple[int, ...]] = [(), (0,), (1,), (0, 1), (1, 0)]
    seeds = [rollout(batch, seed).seed(*place) for batch in (0, 1) for seed in (0, 1) for place in places]
    assert len({*seeds}) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert rollout(3, 1).seed(2) == rollout(3, 1).seed(2)
    assert rollout(3, 1).rng.random() == rollout(3, 1).rng.random() != rollout(4, 1).rng.random()
