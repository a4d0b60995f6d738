"""Undisturbed runs: the numbers are those of a plain loop, and the folder records them."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.client.data import datum
from tests.client.recorder import after
from tests.runs.support import Calls, batch, batches, learning_rate, losses, pipeline, run_to
from tinkex_py import AdamParams, AsyncTrainingClient, ConfigError, InvalidData, Pipeline, RegularizerSpec, telemetry
from tinkex_py.base_losses import NLL
from tinkex_py.losses.controllers import AdaptiveKL
from tinkex_py.regularizers import L2
from tinkex_py.runs import EarlyStop, RunInfo, StepRecord, TrainSettings, read_run, read_steps, scalars
from tinkex_py.runs.folder import RunFolder

HOLD = {"initial": 0.2, "target": 3.0, "horizon": 1.0}
LOSSES = ("loss/total", "loss/base", "term/l2_weight_decay/value", "term/l2_weight_decay/weight")

pytestmark = pytest.mark.asyncio


async def by_hand(training: AsyncTrainingClient, steps: int, accumulate: int = 1) -> list[list[float]]:
    """The same run as a plain loop, one request after another; its means are those of a whole step."""
    composed, totals = pipeline(), []
    for step in range(steps):
        numbers = range(accumulate * step, accumulate * (step + 1))
        data = [datum for number in numbers for datum in batch(number)]
        tokens = sum(datum.model_input.length for datum in data)
        weight = math.fsum(float(one) for datum in data for one in datum.loss_fn_inputs["weights"].to_numpy())
        whole = Pipeline(
            NLL(reduction="token-mean", total=weight),
            [replace(spec, options={"total": tokens}) for spec in composed.regularizers],
        )
        totals.append([])
        for number in numbers:
            loss = whole if accumulate > 1 else composed
            totals[-1].append((await training.forward_backward_custom(batch(number), loss)).loss_total)
        await training.optim_step(learning_rate(step))
    return totals


@pytest.mark.parametrize("accumulate", [1, 3])
async def test_the_numbers_are_those_of_a_plain_loop(bench: Any, tmp_path: Path, accumulate: int) -> None:
    run = await run_to(bench.service, tmp_path, accumulate=accumulate)
    expected = await by_hand(await Calls(bench.service)(), 6, accumulate)
    assert np.array(losses(tmp_path)) == pytest.approx(np.array(expected), rel=0 if accumulate == 1 else 1e-5)
    steps = read_steps(tmp_path)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.learning_rate for step in steps] == [learning_rate(step).learning_rate for step in range(6)]
    assert all((step.datums, step.tokens) == (2 * accumulate, 10 * accumulate) for step in steps)
    assert all(step.seconds > 0 and step.queue_seconds == 0 for step in steps)
    assert run.last == steps[-1]
    assert run.info.objective == pipeline().fingerprint
    assert all(output.service_output is None for output in run.last.losses)
    assert run.info == read_run(tmp_path)
    assert (run.info.status, run.info.reason, run.info.model) == ("finished", None, "tiny")
    assert (run.info.name, run.info.total_steps, run.info.seed) == (tmp_path.name, 6, 3)
    assert set(run.info.versions) == {"python", "tinkex_py", "torch"}
    assert run.training.step == 6
    assert run.training.accumulated == 0


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
async def test_an_accumulated_step_is_that_of_one_batch(bench: Any, tmp_path: Path, reduction: Any) -> None:
    """4 + 12 answers of different lengths, in two calls or in one: the same losses, step by step."""
    answers = [datum(2 + at % 5, seed=at) for at in range(16)]
    numbers = []
    for name, step in (("whole", [answers]), ("parts", [answers[:4], answers[4:]])):
        distance = RegularizerSpec(fn=L2(mask=None, reduction=reduction), weight=AdaptiveKL(**HOLD))
        given = {"batches": step * 3, "pipeline": Pipeline(NLL(reduction=reduction), [distance])}
        await run_to(bench.service, tmp_path / name, steps=3, accumulate=len(step), checkpoint_every=None, **given)
        numbers.append([[scalars(made)[key] for key in LOSSES] for made in read_steps(tmp_path / name)])
    assert np.array(numbers[1]) == pytest.approx(np.array(numbers[0]), rel=1e-5)
    assert numbers[0][0] != numbers[0][2]


async def test_a_loss_by_name(bench: Any, tmp_path: Path) -> None:
    await run_to(bench.service, tmp_path / "name", steps=2, pipeline="cross_entropy", checkpoint_every=None)
    await run_to(bench.service, tmp_path / "class", steps=2, pipeline=NLL(), checkpoint_every=None)
    assert losses(tmp_path / "name") == losses(tmp_path / "class")


async def test_a_loss_that_couples_datums_is_not_accumulated(bench: Any, tmp_path: Path) -> None:
    coupled = Pipeline(NLL(), [RegularizerSpec(fn=L2(mask=None, center="mean"), weight=0.1)])
    with pytest.raises(ConfigError, match=r"the term 'l2_weight_decay' \(L2\) couples them: .*Use accumulate=1"):
        await run_to(bench.service, tmp_path / "run", pipeline=coupled, accumulate=2)
    assert not (tmp_path / "run").exists()
    await run_to(bench.service, tmp_path / "run", steps=1, pipeline=coupled)


async def test_a_step_is_sent_while_the_update_before_it_is_under_way(bench: Any, tmp_path: Path) -> None:
    # The result of the second update is held back until the third forward pass has arrived.
    seen = asyncio.Event()
    bench.recorder.faults["retrieve_future"] = [*[None] * 7, after(seen)]

    async def watch() -> None:
        await bench.recorder.until(lambda: len(bench.recorder.of("F")) == 3)
        seen.set()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(watch())
        made = group.create_task(run_to(bench.service, tmp_path, steps=3, checkpoint_every=None))
    kinds = bench.kinds(made.result().training)
    assert kinds == ["save_weights", *["F", "B", "optim_step"] * 3, "save_weights"]


async def test_old_checkpoints_are_deleted(bench: Any, tmp_path: Path) -> None:
    run = await run_to(bench.service, tmp_path, keep_checkpoints=2, checkpoint_ttl=3600)
    kept = [checkpoint async for checkpoint in bench.service.create_rest_client().checkpoints(run.training.model_id)]
    assert [checkpoint.checkpoint_id for checkpoint in kept] == ["weights/step-000006", "weights/step-000004"]
    assert all(checkpoint.expires_at is not None for checkpoint in kept)
    assert run.checkpoint == kept[0].tinker_path


async def test_a_checkpoint_that_cannot_be_deleted_is_told(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cannot(*arguments: object) -> None:
        raise InvalidData("no such form")

    seen: list[telemetry.Event] = []
    telemetry.attach(seen.append, events="tinkex.run.*")
    monkeypatch.setattr("tinkex_py.client.rest.AsyncRestClient.delete_checkpoint", cannot)
    await run_to(bench.service, tmp_path, steps=2, checkpoint_every=1, keep_checkpoints=1)
    told = [event.metadata for event in seen if event.name == "tinkex.run.checkpoint_not_deleted"]
    assert [metadata["reason"] for metadata in told] == ["InvalidData"] * 2
    assert told[0]["path"].endswith("weights/step-000000")


async def test_evaluation_stands_between_two_steps(bench: Any, tmp_path: Path) -> None:
    async def evaluate(training: AsyncTrainingClient, step: int) -> Mapping[str, float | str]:
        output = await training.forward(batch(50))
        return {"sum": output.metrics["loss:sum"], "step": step, "a prompt": str(step)}

    run = await run_to(bench.service, tmp_path, steps=5, evaluate=evaluate, evaluate_every=2, checkpoint_every=None)
    assert [step.samples for step in read_steps(tmp_path)] == [
        {},
        {"a prompt": "2"},
        {},
        {"a prompt": "4"},
        {"a prompt": "5"},
    ]
    evaluations = [step.evaluation for step in read_steps(tmp_path)]
    assert [evaluation.get("step") for evaluation in evaluations] == [None, 2.0, None, 4.0, 5.0]
    step = ["F", "B", "optim_step"]
    expected = ["save_weights", *step, *step, "F", *step, *step, "F", *step, "F", "save_weights"]
    assert bench.kinds(run.training) == expected
    again = await run.training.forward(batch(50))
    assert evaluations[-1]["sum"] == pytest.approx(again.metrics["loss:sum"])
    assert evaluations[1]["sum"] != evaluations[3]["sum"]


async def test_an_evaluation_without_numbers_fails_the_run(bench: Any, tmp_path: Path) -> None:
    async def evaluate(training: AsyncTrainingClient, step: int) -> Any:
        return 0.5

    with pytest.raises(ConfigError, match="evaluate must return a mapping of names to numbers, got a float"):
        await run_to(bench.service, tmp_path, evaluate=evaluate, evaluate_every=1)
    assert read_run(tmp_path).status == "failed"
    assert "got a float" in str(read_run(tmp_path).reason)


@pytest.mark.parametrize("kind", ["list", "generator", "async generator", "function", "async function"])
async def test_all_forms_of_data(bench: Any, tmp_path: Path, kind: str) -> None:
    ended: list[str] = []

    async def later(start: int) -> AsyncIterator[Any]:
        try:
            for given in batches(start, 4):
                yield given
        finally:
            ended.append("later")

    forms: dict[str, Any] = {
        "list": list(batches(0, 4)),
        "generator": batches(0, 4),
        "async generator": later(0),
        "function": lambda start: batches(start, 4),
        "async function": later,
    }
    run = await run_to(bench.service, tmp_path, steps=None, batches=forms[kind], accumulate=3, checkpoint_every=None)
    # Four batches: a step of three, then what is left.
    assert [len(step.losses) for step in read_steps(tmp_path)] == [3, 1]
    assert (run.info.status, run.info.reason, run.info.total_steps) == ("finished", None, None)
    assert ended == (["later"] if kind.startswith("async") else [])


async def test_batches_that_end_too_early_are_told(bench: Any, tmp_path: Path) -> None:
    run = await run_to(bench.service, tmp_path, batches=list(batches(0, 2)))
    assert (run.info.status, run.info.reason) == ("finished", "the batches ended after 2 of 6 steps")
    assert run.checkpoint.endswith("step-000002")


async def test_early_stop_by_a_loss(bench: Any, tmp_path: Path) -> None:
    rule = EarlyStop(metric="loss/base", patience=2, min_change=100.0)
    run = await run_to(bench.service, tmp_path, steps=20, early_stop=rule, checkpoint_every=None)
    # The first measurement is the best; two that are not 100 better follow.
    assert run.last is not None
    assert run.last.step == 3
    assert (run.info.status, run.info.reason) == ("stopped", "loss/base did not improve in 2 measurements")
    assert bench.kinds(run.training) == ["save_weights", *["F", "B", "optim_step"] * 3, "save_weights"]
    # What is over stays over, and more patience goes on.
    assert (await run_to(bench.service, tmp_path, steps=20, early_stop=rule)).last == run.last
    patient = rule.model_copy(update={"patience": 4})
    longer = await run_to(bench.service, tmp_path, steps=20, early_stop=patient)
    assert longer.last is not None
    assert longer.last.step == 5


async def test_early_stop_by_an_evaluation(bench: Any, tmp_path: Path) -> None:
    scores = {2: 0.1, 4: 0.5, 6: 0.5, 8: 0.4, 10: 0.9}

    async def evaluate(training: AsyncTrainingClient, step: int) -> Mapping[str, float]:
        return {"score": scores[step]}

    rule = EarlyStop(metric="evaluation/score", patience=2, better="higher")
    run = await run_to(bench.service, tmp_path, steps=20, evaluate=evaluate, evaluate_every=2, early_stop=rule)
    assert run.last is not None
    assert run.last.step == 8


async def test_early_stop_by_a_number_that_is_not_there_names_those_that_are(bench: Any, tmp_path: Path) -> None:
    words = r"no metric is named 'loss/totl' \(did you mean 'loss/total'\?\); use one of .*loss/base, .*loss/total"
    with pytest.raises(ConfigError, match=words):
        await run_to(bench.service, tmp_path, early_stop=EarlyStop(metric="loss/totl"))
    with pytest.raises(ConfigError, match="metric must begin with one of loss/, .*'time/step'"):
        EarlyStop(metric="time/step")
    with pytest.raises(ConfigError, match="TrainSettings: no setting is named 'step'"):
        TrainSettings(step=3)


async def test_progress_is_told_in_order(bench: Any, tmp_path: Path) -> None:
    told: list[str] = []

    class View:
        def start(self, run: RunInfo, made: int) -> None:
            told.append(f"start {made} of {run.total_steps}")

        def doing(self, text: str) -> None:
            told.append(text)

        def step(self, record: StepRecord) -> None:
            told.append(f"made {record.step}")

        def finish(self, run: RunInfo) -> None:
            told.append(run.status)

    await run_to(bench.service, tmp_path, steps=2, progress=View())
    save = "saving a checkpoint after step 2"
    begin = ["start 0 of 2", "saving a checkpoint after step 0"]
    assert told == [*begin, "step 1", "step 2", "made 1", "made 2", save, "finished"]


async def test_schedules_count_on_from_what_the_client_has_made(bench: Any, tmp_path: Path) -> None:
    training = await Calls(bench.service)()
    await training.forward_backward_custom(batch(7), pipeline())
    await training.optim_step()
    await run_to(bench.service, tmp_path, steps=3, model=training)
    weights = [step.losses[0].regularizers["entropy"].weight for step in read_steps(tmp_path)]
    assert weights == pytest.approx([0.1 * (1 - step / 6) for step in (1, 2, 3)])


async def test_a_model_in_the_middle_of_a_step_is_refused(bench: Any, tmp_path: Path) -> None:
    training = await Calls(bench.service)()
    await training.forward_backward_custom(batch(7), pipeline())
    with pytest.raises(InvalidData, match="holds 1 backward passes that no optimizer step applied"):
        await run_to(bench.service, tmp_path, model=training)
    assert not (tmp_path / "run.json").exists()


async def test_one_folder_is_one_run_at_a_time(bench: Any, tmp_path: Path) -> None:
    calls = Calls(bench.service)
    with RunFolder(tmp_path), pytest.raises(ConfigError, match="is being trained by another process"):
        await run_to(bench.service, tmp_path, model=calls)
    assert calls.made == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": 3}, "batches must be an iterable of batches, or a function .* got a int"),
        ({"batches": lambda start: 3}, r"batches\(0\) must return an iterable, got a int"),
        ({"sinks": [object()]}, "sinks: object needs the methods start, log and finish"),
        ({"progress": "yes"}, "progress must be True, False or a ProgressView, got a str"),
        ({"model": 3}, "model must be a training client or a function that creates one, got a int"),
        ({"config": {"set": {1}}}, "config must contain plain JSON values only"),
        ({"steps": 0}, "TrainSettings: steps: .*greater than or equal to 1, got 0"),
        ({"checkpoint_every": "often"}, "TrainSettings: checkpoint_every: .*got 'often'"),
    ],
)
async def test_bad_arguments_are_named(bench: Any, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        await run_to(bench.service, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "run.json").exists()


class Sink:
    """Remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, run: RunInfo) -> None:
        self.calls.append(("start", run.name, run.status))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((step, dict(metrics)))

    def finish(self, status: str) -> None:
        self.calls.append(("finish", status))


class FailingSink(Sink):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        raise OSError("no network")


async def test_sinks_get_everything_in_order_and_a_failing_one_is_left_out(bench: Any, tmp_path: Path) -> None:
    seen: list[telemetry.Event] = []
    telemetry.attach(seen.append, events="tinkex.run.sink_failed")
    whole, failing = Sink(), FailingSink()
    await run_to(bench.service, tmp_path, steps=3, sinks=[failing, whole])
    steps = read_steps(tmp_path)
    name = tmp_path.name
    expected = [("start", name, "running"), *((step.step, scalars(step)) for step in steps), ("finish", "finished")]
    assert whole.calls == expected
    assert failing.calls == expected[:2]
    assert [dict(event.metadata) for event in seen] == [{"sink": "FailingSink", "reason": "OSError"}]


async def test_what_the_events_of_a_run_carry(bench: Any, tmp_path: Path) -> None:
    seen: list[telemetry.Event] = []
    telemetry.attach(seen.append, events="tinkex.run.*")
    await run_to(bench.service, tmp_path, steps=2, accumulate=2)
    told = [(event.name.removeprefix("tinkex.run."), dict(event.metadata)) for event in seen]
    # The second step may start before or after the end of the first, whose update is in flight then.
    for step in (1, 2):
        fields = {"step": step, "batches": 2}
        assert [event for event in told if event[1]["step"] == step] == [("step.start", fields), ("step.stop", fields)]
    assert len(told) == 4


async def test_two_runs_of_one_process_do_not_mix(bench: Any, tmp_path: Path) -> None:
    await asyncio.gather(
        run_to(bench.service, tmp_path / "one", steps=3),
        run_to(bench.service, tmp_path / "two", steps=3, optimizer=AdamParams(learning_rate=0.0)),
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one[0] == two[0]
    assert one[1:] != two[1:]
