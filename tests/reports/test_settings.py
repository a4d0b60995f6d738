"""Settings are read the same everywhere: numbers, paths, wrong types, and the arguments of `train`."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from typer.testing import CliRunner

from tests.runs.support import batch
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    ConfigError,
    Datum,
    LoraConfig,
    ModelInput,
    Pipeline,
    RegularizerSpec,
    RetryPolicy,
    SamplingParams,
    TinkexConfig,
    controllers,
    schedules,
)
from tinkex_py.base_losses import DPO, NLL
from tinkex_py.cli import app
from tinkex_py.errors import TinkexError
from tinkex_py.integrations.trackers import JsonlSink
from tinkex_py.local import LocalOptions
from tinkex_py.losses import replay
from tinkex_py.regularizers import L2
from tinkex_py.runs import RunFolder, TrainedRun, TrainSettings, read_run, read_steps, train
from tinkex_py.runs.config import optimizer_of, pipeline_of, read_config
from tinkex_py.runs.report import write_report

# r15: numbers of YAML 1.2


def read(folder: Path, lines: str, *overrides: str) -> Any:
    file = folder / "run.yaml"
    file.write_text(f"model: tiny\ndata: {{path: data.jsonl}}\n{lines}\n")
    return read_config(file, overrides)


def optimizer(config: Any) -> Any:
    return optimizer_of(config.optimizer)


def regularizer(config: Any) -> Any:
    return pipeline_of(config.loss).regularizers[0]


PLACES: list[tuple[str, Callable[[Any], Any]]] = [
    ("optimizer: {learning_rate: NUMBER}", lambda c: optimizer(c).learning_rate),
    ("optimizer: {eps: NUMBER}", lambda c: optimizer(c).eps),
    (
        "optimizer: {learning_rate: {schedule: WarmUp, steps: 3, then: NUMBER}}",
        lambda c: optimizer(c).learning_rate.then,
    ),
    ("loss: {regularizers: [{term: L2, weight: NUMBER}]}", lambda c: regularizer(c).weight),
    (
        "loss: {regularizers: [{term: L2, weight: {schedule: Linear, start: NUMBER, end: 0.0, steps: 4}}]}",
        lambda c: regularizer(c).weight.start,
    ),
    (
        "loss: {regularizers: [{term: L2, weight: {schedule: Piecewise, values: {0: NUMBER}}}]}",
        lambda c: regularizer(c).weight.values[0],
    ),
    (
        "loss: {regularizers: [{term: L2, weight: {controller: AdaptiveKL, initial: 1, target: NUMBER}}]}",
        lambda c: regularizer(c).weight.target,
    ),
    ("loss: {regularizers: [{term: L2, weight: 1, timeout: NUMBER}]}", lambda c: regularizer(c).timeout),
    (
        "loss: {base: {term: DPO, options: {reference_field: r, beta: NUMBER}}}",
        lambda c: pipeline_of(c.loss).base_loss.beta,
    ),
    (
        "training: {early_stop: {metric: loss/base, min_change: NUMBER}}",
        lambda c: c.training.early_stop.min_change,
    ),
]


@pytest.mark.parametrize(("line", "value"), PLACES, ids=[f"r15-{line}" for line, _ in PLACES])
def test_r15_a_number_of_yaml_is_a_number_in_every_place(tmp_path: Path, line: str, value: Any) -> None:
    for text, number in (("1e-3", 1e-3), ("1E-3", 1e-3), (".5e-2", 0.005), ("1.e+1", 10.0), ("2", 2.0), ("2e0", 2.0)):
        assert value(read(tmp_path, line.replace("NUMBER", text))) == number, text
    with pytest.raises(ConfigError, match="got '1e-3'"):
        value(read(tmp_path, line.replace("NUMBER", "'1e-3'")))


def test_r15_whole_numbers_and_texts_of_yaml(tmp_path: Path) -> None:
    lines = "training: {steps: 1e2, keep_checkpoints: 2}\nlora: {rank: 1.6e1}\nseed: 7"
    config = read(tmp_path, lines)
    assert (config.training.steps, config.lora.rank, config.seed) == (100, 16, 7)
    # What looks like a number but is none in YAML 1.2 stays a text.
    for text in ("1e", "e3", "1e-3x", "1.5.2", "1_0.5"):
        assert read(tmp_path, "", f"model={text}").model == text
    linear = "loss: {regularizers: [{term: L2, weight: {schedule: Linear, start: 1, end: 0, steps: 1e1}}]}"
    assert regularizer(read(tmp_path, linear)).weight.steps == 10
    with pytest.raises(ConfigError, match=r"training: TrainSettings: steps: must be a valid integer, got 1\.5"):
        read(tmp_path, "training: {steps: 1.5}")


# r21: numbers of numpy, and wrong types

CONFIG = {"base_url": "http://h", "api_key": "tml-none"}
INTEGERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "max_tokens": (lambda n: SamplingParams(max_tokens=n), lambda made: made.max_tokens),
    "seed": (lambda n: SamplingParams(seed=n), lambda made: made.seed),
    "top_k": (lambda n: SamplingParams(top_k=n), lambda made: made.top_k),
    "stop": (lambda n: SamplingParams(stop=[n]), lambda made: made.stop[0]),
    "rank": (lambda n: LoraConfig(rank=n), lambda made: made.rank),
    "steps": (lambda n: TrainSettings(steps=n), lambda made: made.steps),
    "restarts": (lambda n: TrainSettings(restarts=n), lambda made: made.restarts),
    "Linear steps": (lambda n: schedules.Linear(1.0, 0.0, n), lambda made: made.steps),
    "WarmUp steps": (lambda n: schedules.WarmUp(n, 1.0), lambda made: made.steps),
    "Piecewise values": (lambda n: schedules.Piecewise({0: 1.0, n: 0.5}), lambda made: max(made.values)),
    "max_polls": (lambda n: TinkexConfig(**CONFIG, max_polls=n), lambda made: made.max_polls),
    "max_attempts": (lambda n: RetryPolicy(max_attempts=n), lambda made: made.max_attempts),
    "max_concurrency": (lambda n: Pipeline(NLL(), max_concurrency=n), lambda made: made.max_concurrency),
    "max_models": (lambda n: LocalOptions(max_models=n), lambda made: made.max_models),
}
FLOATS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "learning_rate": (lambda x: AdamParams(learning_rate=x), lambda made: made.learning_rate),
    "temperature": (lambda x: SamplingParams(temperature=x), lambda made: made.temperature),
    "weight": (lambda x: RegularizerSpec(fn=L2(), weight=x), lambda made: made.weight),
    "max_grad_norm": (lambda x: RegularizerSpec(fn=L2(), weight=1, max_grad_norm=x), lambda made: made.max_grad_norm),
    "clip": (lambda x: L2(clip=x), lambda made: made.clip),
    "center": (lambda x: L2(center=x), lambda made: made.center),
    "beta": (lambda x: DPO(beta=x, reference_field="r"), lambda made: made.beta),
    "Linear start": (lambda x: schedules.Linear(x, 0.0, 3), lambda made: made.start),
    "Constant value": (schedules.Constant, lambda made: made.value),
    "AdaptiveKL target": (lambda x: controllers.AdaptiveKL(initial=1, target=x), lambda made: made.target),
    "timeout": (lambda x: TinkexConfig(**CONFIG, timeout=x), lambda made: made.timeout),
    "deadline": (lambda x: RetryPolicy(deadline=x), lambda made: made.deadline),
    "Pipeline timeout": (lambda x: Pipeline(NLL(), timeout=x), lambda made: made.timeout),
    "hold_seconds": (lambda x: LocalOptions(hold_seconds=x), lambda made: made.hold_seconds),
}


@pytest.mark.parametrize("name", INTEGERS, ids=lambda name: f"r21-{name}")
def test_r21_an_integer_of_any_library_is_an_integer(name: str) -> None:
    make, value = INTEGERS[name]
    for given in (2, np.int64(2), np.uint8(2), np.float32(2), 2.0, torch.tensor(2)):
        assert value(make(given)) == 2
        assert type(value(make(given))) is int
    for wrong in (True, np.True_, 2.5, np.float64(2.5), object(), *(["2"] if name != "stop" else [])):
        with pytest.raises(TinkexError, match=name.split()[-1]) as caught:
            make(wrong)
        in_words(caught.value)


@pytest.mark.parametrize("name", FLOATS, ids=lambda name: f"r21-{name}")
def test_r21_a_number_of_any_library_is_a_number(name: str) -> None:
    make, value = FLOATS[name]
    for given in (0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), 1, np.int32(1)):
        made = value(make(given))
        assert made == given
        assert type(made) in (float, int)
    for wrong in (True, np.True_, [0.5], object(), *(["0.5"] if name != "center" else [])):
        with pytest.raises(TinkexError, match=name.split()[-1]) as caught:
            make(wrong)
        in_words(caught.value)


def in_words(error: Exception) -> None:
    """Fails if a message shows how pydantic describes a schema, or takes more than a line."""
    assert not re.search(r"pydantic|\[type=|https?://|python=|function-|Input should|\n", str(error)), error


@pytest.mark.parametrize("stop", [["a", 5], 5, [1.5], [True], {1}, [[1]], object()])
def test_r21_a_wrong_stop_is_described_in_words(stop: Any) -> None:
    with pytest.raises(TinkexError, match="stop: must be a text, a list of texts or a list of token ids") as caught:
        SamplingParams(stop=stop)
    in_words(caught.value)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: AdamParams(learning_rat=0.1), "did you mean 'learning_rate'"),  # type: ignore[call-arg]
        (lambda: TrainSettings(evaluate_evry=3), "did you mean 'evaluate_every'"),
        (lambda: LocalOptions(max_model=3), "did you mean 'max_models'"),
    ],
)
def test_r21_an_unknown_setting_suggests_one(make: Callable[[], Any], hint: str) -> None:
    with pytest.raises(TinkexError, match=hint) as caught:
        make()
    in_words(caught.value)


@pytest_asyncio.fixture
async def service() -> AsyncIterator[AsyncServiceClient]:
    async with AsyncServiceClient.local(model="tiny", device="cpu") as service:
        yield service


@pytest.mark.asyncio
async def test_r21_requests_accept_numbers_of_numpy(service: AsyncServiceClient) -> None:
    sampler = await service.create_sampling_client(base_model="tiny")
    prompt, one = ModelInput.from_ints([1, 2, 3]), SamplingParams(max_tokens=np.int64(1))
    response = await sampler.sample(
        prompt, num_samples=np.int64(2), sampling_params=one, topk_sample_logprobs=np.uint8(2)
    )
    assert len(response.sequences) == 2
    training = await service.create_lora_training_client("tiny", rank=np.int64(2), seed=np.int32(1))
    saved = await training.save_state("first", ttl_seconds=np.int64(60))
    await service.create_rest_client().set_checkpoint_ttl(saved.path, np.int64(90))
    config = {"clip_low_threshold": np.float32(0.5)}
    rollout = Datum(
        model_input=ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": [2, 3], "logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]},
    )
    await training.forward([rollout], "ppo", loss_fn_config=config)


# r23: `~` in paths


@pytest.mark.asyncio
async def test_r23_a_tilde_is_the_home_folder_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: AsyncServiceClient
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(here)
    settings = TrainSettings(steps=1)
    run = await train(service, lambda: new_model(service), [batch(0)], NLL(), folder="~/runs/x", settings=settings)
    assert run.folder == home / "runs" / "x"
    assert read_run("~/runs/x").status == "finished"
    assert len(read_steps("~/runs/x")) == 1
    write_report(["~/runs/x"], "~/report")
    JsonlSink("~/sink/all.jsonl").start(run.info)
    output = await run.training.forward_backward_custom(batch(0), NLL(), record="~/record")
    assert (await replay("~/record")).loss_total == output.loss_total
    await service.create_rest_client().download_checkpoint(run.checkpoint, "~/checkpoint")
    async with AsyncServiceClient.local(model="tiny", state_dir="~/state"):
        pass
    config = read(here, "", "data.path=~/data.jsonl", "data.held_out=~/more.jsonl")
    assert (config.data.path, config.data.held_out) == (home / "data.jsonl", home / "more.jsonl")
    assert read(here, "").data.path == here / "data.jsonl"
    assert sorted(path.name for path in here.iterdir()) == ["run.yaml"]
    assert {path.name for path in home.iterdir()} == {"runs", "report", "sink", "record", "checkpoint", "state"}


@pytest.mark.parametrize("path", [None, 5, b"runs", ["runs"], "a\0b", "~nobody-has-this-name/x"])
def test_r23_what_is_no_path_is_refused_by_name(path: Any) -> None:
    uses: list[tuple[str, Callable[[], Any]]] = [
        ("folder", lambda: RunFolder(path)),
        ("path", lambda: JsonlSink(path)),
        ("path", lambda: asyncio.run(replay(path))),
    ]
    for name, use in uses:
        with pytest.raises(TinkexError, match=f"^{name}[ :]") as caught:
            use()
        in_words(caught.value)


# r22 and the other arguments of `train`


async def new_model(service: AsyncServiceClient) -> Any:
    return await service.create_lora_training_client("tiny", rank=2, seed=1)


async def trained(own: AsyncServiceClient, parent: Path, **arguments: Any) -> TrainedRun:
    given = {
        "service": own,
        "model": lambda: new_model(own),
        "batches": [batch(0), batch(1)],
        "pipeline": NLL(),
        "settings": TrainSettings(steps=1, evaluate_every=1, checkpoint_every=None),
        "folder": parent / "run",
        **arguments,
    }
    return await train(**given)


@pytest.mark.asyncio
async def test_r22_plain_meanings_of_arguments_are_accepted(service: AsyncServiceClient, tmp_path: Path) -> None:
    threads: list[str] = []

    def evaluate(training: Any, step: int) -> Any:
        threads.append(threading.current_thread().name)
        return {"accuracy": np.float32(0.5), "count": step, "a prompt": "an answer"}

    run = await trained(
        service,
        tmp_path,
        pipeline=lambda data, logprobs: -logprobs.sum(),
        optimizer=np.float32(0.25),
        settings={"steps": np.int64(2), "evaluate_every": 2},
        config={"seed": np.int64(3)},
        evaluate=evaluate,
    )
    assert run.last is not None
    assert (run.last.step, run.last.learning_rate, run.info.seed) == (2, 0.25, 3)
    assert (run.last.evaluation, run.last.samples) == ({"accuracy": 0.5, "count": 2.0}, {"a prompt": "an answer"})
    assert len(threads) == 1
    assert threads[0].startswith("tinkex-evaluate")
    assert threads[0] not in {thread.name for thread in threading.enumerate()}
    # A schedule of learning rates, and a function that returns the coroutine of another one.

    async def later(training: Any, step: int) -> Any:
        return {"sum": (await training.forward(batch(5))).metrics["loss:sum"]}

    again = await trained(
        service,
        tmp_path / "again",
        optimizer=schedules.Linear(0.5, 0.0, 2),
        evaluate=lambda *arguments: later(*arguments),  # noqa: PLW0108
    )
    assert again.last is not None
    assert again.last.learning_rate == 0.5
    assert "sum" in again.last.evaluation


DATUM = batch(0)[0]
WRONG: list[tuple[str, Any, str]] = [
    ("service", None, "service must be an AsyncServiceClient, got a NoneType"),
    ("model", "tiny", "model must be a training client or a function that creates one, got a str"),
    ("model", lambda base: base, r"model .* called as model\(\): missing a required argument: 'base'"),
    ("batches", "data.jsonl", "batches must be lists of datums, got a str"),
    ("batches", {"a": []}, "batches must be lists of datums, got a dict"),
    ("batches", [DATUM], "batch 0 must be a sequence of Datum, got a Datum: pass lists of datums"),
    ("batches", [[DATUM], [1]], "batch 1 must be a sequence of Datum, got a list with a int"),
    ("batches", [[DATUM], None], "batch 1 must be a sequence of Datum, got a NoneType"),
    ("batches", lambda: iter(()), r"called as batches\(0\): too many positional arguments"),
    ("pipeline", None, "pipeline must be a Pipeline or a base loss, got a NoneType"),
    ("pipeline", "cross_entrpy", "pipeline: no base loss is named 'cross_entrpy' .did you mean 'cross_entropy'"),
    ("pipeline", [NLL()], "pipeline must be a Pipeline or a base loss, got a list"),
    ("pipeline", NLL, r"pipeline .* pass an instance, NLL\(\)"),
    ("pipeline", lambda logprobs: logprobs.sum(), r"pipeline .* must accept the arguments \(data, logprobs\)"),
    ("folder", None, "folder must be the path of a file or folder, got None"),
    ("folder", 5, "folder must be the path .* got 5"),
    ("optimizer", "adam", "optimizer must be AdamParams, OptimizerParams or a learning rate, got a str"),
    ("optimizer", True, "optimizer must be AdamParams, .* got a bool"),
    ("optimizer", -1.0, "learning_rate: must be greater than or equal to 0, got -1.0"),
    ("optimizer", lambda: 1e-3, r"optimizer .* called as optimizer\(0\): too many positional arguments"),
    ("settings", 3, "settings must be TrainSettings or a dict of its settings, got a int"),
    ("settings", {"step": 3}, "no setting is named 'step' .did you mean 'steps'"),
    ("settings", {3: 3}, "no setting is named '3'"),
    ("settings", {"steps": "many"}, "steps: must be a valid integer, got 'many'"),
    ("config", 3, "config must be a mapping of names to plain values, got a int"),
    ("config", {"a": object()}, "config must contain plain JSON values only"),
    ("evaluate", 3, "evaluate must be a function, got a int"),
    ("evaluate", lambda training: {}, r"called as evaluate\(training, step\): too many positional arguments"),
    ("sinks", 3, "sinks must be a list of metric sinks, got a int"),
    ("sinks", [JsonlSink], "sinks: type needs the methods"),
    ("stop", threading.Event(), "stop must be an asyncio.Event, got a Event"),
    ("progress", "yes", "progress must be True, False or a ProgressView, got a str"),
]


@pytest.mark.asyncio
async def test_r22_arguments_without_a_plain_meaning_are_refused_before_anything_is_made(
    service: AsyncServiceClient, tmp_path: Path
) -> None:
    made: list[int] = []

    async def counted() -> Any:
        made.append(1)
        return await new_model(service)

    for argument, value, words in WRONG:
        with pytest.raises(TinkexError, match=words) as caught:
            await trained(service, tmp_path, **{"model": counted, argument: value})
        in_words(caught.value)
        assert not (tmp_path / "run").exists(), argument
    assert made == []


RESULTS: list[tuple[Any, str]] = [
    ({"accuracy": None}, "'accuracy' with a NoneType"),
    ({"accuracy": "x"}, "'accuracy' is a text"),
    ({"accuracy": {"a": 1.0}}, "'accuracy' with a dict"),
    ({"loss": 1.0, "accuracy": [1.0, 2.0]}, "'accuracy' with a list"),
    ({"accuracy": torch.zeros(2)}, "'accuracy' with a Tensor"),
    ({3: 1.0}, "3 with a float"),
    (None, "got a NoneType"),
    ([0.5], "got a list"),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("is_async", [True, False])
async def test_r22_a_wrong_result_of_evaluate_is_named(
    service: AsyncServiceClient, tmp_path: Path, is_async: bool
) -> None:
    model = await new_model(service)
    for number, (value, words) in enumerate(RESULTS):

        async def later(training: Any, step: int, value: Any = value) -> Any:
            return value

        hook = later if is_async else lambda training, step, value=value: value
        with pytest.raises(ConfigError, match="^evaluate must return a mapping of names to numbers") as caught:
            await trained(service, tmp_path / str(number), model=model, evaluate=hook)
        assert words in str(caught.value)
        assert read_run(tmp_path / str(number) / "run").status == "failed"


@pytest.mark.asyncio
async def test_r22_a_function_that_returns_no_settings_or_no_model_is_named(
    service: AsyncServiceClient, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"the result of optimizer\(0\) must be AdamParams, .* got a NoneType"):
        await trained(service, tmp_path, optimizer=lambda step: None)
    with pytest.raises(ConfigError, match=r"model\(\) must return a training client, got a str"):
        await trained(service, tmp_path / "other", model=lambda: "tiny")


# The command line

FILE = "model: tiny\ndata: {path: pairs.jsonl, batch_size: 2}\nlora: {rank: 4}\ntraining: {steps: 9}\n"


def command(folder: Path, *arguments: str) -> Any:
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    (folder / "run.yaml").write_text(FILE)
    result = CliRunner().invoke(app, ["train", str(folder / "run.yaml"), "--runs-dir", str(folder), *arguments])
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def test_set_replaces_settings_of_the_file(tmp_path: Path) -> None:
    overrides = [
        "training.steps=2e0",
        "optimizer.learning_rate={schedule: WarmUp, steps: 2, then: 1e-3}",
        "loss.regularizers=[{term: L2, weight: 0.5, options: {mask: weights}}]",
        "loss.regularizers.0.weight=1e-2",
    ]
    result = command(tmp_path, *(part for override in overrides for part in ("--set", override)))
    assert result.code == 0, result.err
    steps = read_steps(tmp_path / "run")
    assert [step.learning_rate for step in steps] == [0.0, 5e-4]
    term = steps[-1].losses[0].regularizers["l2_weight_decay"]
    assert term.weight == 1e-2
    assert f"l2_weight_decay {term.value:.4f} (weight 0.01)" in result.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepz=3", "no setting is named 'stepz' (did you mean 'steps'?)"),
        ("trainin.steps=3", "with --set: no setting is named 'trainin' (did you mean 'training'?)"),
        ("loss.base.term=NLL", None),
        ("loss.base={term: NLL, options: {reductio: mean}}", "did you mean 'reduction'?"),
        ("optimizer.learning_rat=1e-3", "did you mean 'learning_rate'?"),
        ("loss.regularizers=[{term: L2, weight: 1, timeot: 3}]", "did you mean 'timeout'?"),
        ("training.steps=many", "steps: must be a valid integer, got 'many'"),
        ("training.steps", "--set must be KEY=VALUE, such as optimizer.learning_rate=1e-3, got 'training.steps'"),
        ("training..steps=3", "--set must be KEY=VALUE"),
        ("model.name=3", "--set model.name: model is 'tiny', which has no settings"),
        ("data.path=[1", "--set data.path=[1 is not valid YAML"),
        ("loss.regularizers=3", "loss.regularizers: must be a list, got 3"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, words: str | None) -> None:
    if words is None:
        assert command(tmp_path, "--set", override, "--set", "training.steps=1").code == 0
        return
    result = command(tmp_path, "--set", override)
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("batches", "steps", "reason"),
    [
        ([], None, "batches is empty: no step was made"),
        ([], 3, "the batches ended after 0 of 3 steps"),
        ([batch(0)], 3, "the batches ended after 1 of 3 steps"),
        ([batch(0)], 1, None),
        ([batch(0)], None, None),
    ],
)
async def test_a_run_whose_batches_end_early_says_so(
    service: AsyncServiceClient, tmp_path: Path, batches: Any, steps: int | None, reason: str | None
) -> None:
    run = await trained(service, tmp_path, batches=batches, settings={"steps": steps})
    assert (run.info.status, run.info.reason) == ("finished", reason)
    if batches and reason is not None:
        report = write_report([run.folder], tmp_path / "report")
        assert report.runs[0].outcome == run.info.outcome
        assert reason in report.page.read_text()
