"""One valid argument for every required parameter of a public callable."""

import inspect
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from rich.console import Console
from starlette.requests import HTTPConnection

from tests.client.data import datum, nll
from tests.data.chat_tokenizers import CHATML, byte_tokenizer
from tests.support.public_calls import PublicCall, constructor_of
from tinkex_py import (
    AsyncRestClient,
    AsyncSamplingClient,
    AsyncServiceClient,
    AsyncTrainingClient,
    BaseLossOutput,
    CustomLossOutput,
    Datum,
    EncodedTextChunk,
    InvalidData,
    ModelInput,
    Pipeline,
    PromptProvenanceSpan,
    RegularizerSpec,
    SamplingParams,
    WeightController,
)
from tinkex_py.base_losses import PPO
from tinkex_py.demo import DemoOptions
from tinkex_py.integrations import trackers
from tinkex_py.local import LocalOptions, LocalService
from tinkex_py.losses import controllers, schedules
from tinkex_py.losses.constraints import Constraint
from tinkex_py.runs import RunFolder, RunInfo, StepRecord, TrainedRun, TrainSettings
from tinkex_py.runs.records import RunState, SampledBatch, SavedCheckpoint
from tinkex_py.types import ModelData, SampledSequence, SampleResponse, SupportedModel

RUN = RunInfo(name="run", started_at=1.0, updated_at=1.0)
STEP = StepRecord(step=1, finished_at=1.0, seconds=1.0, datums=1, tokens=3, losses=())
STATE = RunState(checkpoints=(SavedCheckpoint(step=1, path="x"),), batches=1, client_step=1)
FIELD = np.full(3, -1.0, np.float32)
DATUM = datum(3, 1, weights=[1.0] * 3, logprobs=FIELD, advantages=FIELD, original_logprobs=FIELD)
LABELLED = datum(3, 1, weights=[1.0] * 3, logprobs=FIELD, label=[1.0])
CANDIDATES = Datum(
    model_input=ModelInput.from_ints([1]),
    loss_fn_inputs={"target_tokens": [[3, 4]], "weights": [[1.0, 0.0]], "logprobs": [[-1.0, -2.0]]},
)
SAMPLED = Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]})
SCORED = Datum(
    model_input=ModelInput.from_ints([1, 2]),
    loss_fn_inputs={"target_tokens": [2, 3], "logprobs": [-1.0, -1.0], "teacher_logprobs": [-1.0, -2.0]},
)
SAMPLED_BATCH = SampledBatch(datums=(DATUM,))
PAIR_TERMS = ("CPO", "DPO", "DPOP", "Hinge", "IPO", "ORPO", "SLiC", "SimPO")
SPAN = PromptProvenanceSpan(sequence_id="x", length=2)
OUTPUT = CustomLossOutput(loss_total=1.0, base_loss=BaseLossOutput(value=1.0))
_SIMPLE: Mapping[Any, Any] = {str: "x", int: 1, float: 1.0, bool: True, Path: Path("x")}


@dataclass(frozen=True)
class Clients:
    """The clients of one service, and a checkpoint that it has."""

    service: AsyncServiceClient
    training: AsyncTrainingClient
    sampling: AsyncSamplingClient
    rest: AsyncRestClient
    embedded: LocalService
    session_id: str
    checkpoint: str
    on_listening: Callable[..., None]


class Processor:
    """What a processor of images and text has."""

    image_processor = tokenizer = None
    image_token = "<image>"

    def __call__(self, **_options: Any) -> None: ...


def constant(data: Sequence[Datum], logprobs: Any) -> torch.Tensor:
    """A term that accepts everything."""
    return torch.tensor(1.0)


def by_name(clients: Clients, folder: Path) -> dict[str, Any]:
    """Returns valid arguments of the parameters that have no default."""
    record = folder / "record"
    run_folder = folder / "run"
    return {
        "base_loss": nll,
        "base_model": "tiny",
        "chunks": (EncodedTextChunk(tokens=[1]),),
        "chunk": EncodedTextChunk(tokens=[1]),
        "connection": HTTPConnection({"type": "http", "app": application(clients)}),
        "app": application(clients),
        "array": np.ones(3, np.float32),
        "console": Console(quiet=True),
        "data": [DATUM],
        "TensorData.data": [1.0, 2.0],
        "error": InvalidData("wrong"),
        "fields": {"path": "x", "checkpoint_id": "x", "checkpoint_type": "x", "tinker_path": "x"},
        "fn": nll,
        "sum_over_datums.fn": lambda logprobs, weights: (logprobs * weights).sum(),
        "Datum.of.datum": DATUM,
        "DmelChunk.dmel": bytes([0, 1, 1]),
        "ImageChunk.data": b"\xff\xd8\xff",
        "ImageChunk.of.image": b"\xff\xd8\xff",
        "image_tokens.processor": Processor(),
        "with_tokens.tokens": [1],
        "location": "x",
        "format": "png",
        "with_provenance.model_input": [SPAN],
        "with_provenance.loss_fn_inputs": [SPAN],
        "sequence_id": "x",
        "PromptProvenanceSpan.length": 1,
        "SampledProvenanceSpan.length": 1,
        "from_tokens.prompt": [1],
        "from_tokens.completion": [2],
        "from_text.prompt": "a",
        "from_text.completion": "b",
        "Datum.loss_fn_inputs": {"target_tokens": [1, 2]},
        "download_checkpoint.folder": folder / "download",
        "folder": folder / "sink",
        "download_adapter.folder": folder / "downloaded",
        "export_adapter.folder": folder / "exported",
        "handler": lambda event: None,
        "turns": "all",
        "handler_id": "none",
        "http_client": None,
        "JsonlSink.path": folder / "steps.jsonl",
        "kind": "weights",
        "ability": "train",
        "logprobs": torch.full((3,), -1.0, requires_grad=True),
        "loss_fn": torch.sum,
        "make": lambda: clients.service,
        "model_input": ModelInput.from_ints([1, 2]),
        "on_listening": clients.on_listening,
        "with_options.options": {},
        "check_options.options": {},
        "get_external_weights_urls.path": "tinker://x/external_weights/x",
        "options": DemoOptions(model="tiny", steps=1),
        "serve.options": LocalOptions(),
        "outputs": [OUTPUT],
        "replay.path": record,
        "path": clients.checkpoint,
        "prefix": "tinkex.training",
        "emit.name": "tinkex.billing.paused",
        "packed_field.name": "weights",
        "tokenizer_for.name": "tiny",
        "get_tokenizer.name": "tiny",
        "prompt": ModelInput.from_ints([1, 2]),
        "regularizers": [RegularizerSpec(fn=nll, weight=1.0, name="one")],
        "run": clients.training.model_id,
        "start.run": RUN,
        "runs_dir": folder,
        "sampler_id": clients.sampling.sampling_session_id,
        "session_id": clients.session_id,
        "spec": RegularizerSpec(fn=nll, weight=1.0, name="one"),
        "Pipeline.from_json.text": Pipeline("ppo").to_json(),
        "Pipeline.load_state_dict.state": {"controllers": {}},
        "WeightController.load_state_dict.state": {"weights": {}, "first_values": {}},
        "PIDMultiplier.load_state_dict.state": {"weights": {}, "sums": {}, "before": {}},
        "AdaptiveEntropy.load_state_dict.state": {"weights": {}, "coefficients": {}},
        "GradNormBalance.load_state_dict.state": {"weights": {}, "first_values": {}, "first_base_value": None},
        "DWA.load_state_dict.state": controllers.DWA().state_dict(),
        "FAMO.load_state_dict.state": controllers.FAMO().state_dict(),
        "UncertaintyWeighting.load_state_dict.state": controllers.UncertaintyWeighting().state_dict(),
        "Linear.end": 0.5,
        "severity": "error",
        "status": "finished",
        "Problem.status": 422,
        "statuses": 422,
        "tensor": torch.ones(3),
        "term": constant,
        "then": 0.5,
        "text": "x",
        "tokenizer": byte_tokenizer(CHATML),
        "items": no_items(),
        "training_events.start": finished_run,
        "tokens": [1, 2],
        "PromptAltTokens.tokens": [[1]],
        "PromptAltTokens.logprobs": [[1.0]],
        "values": {0: 1.0},
        "value": [1.0],
        "Constant.value": 1.0,
        "Constraint.at_most": 0.5,
        "Constraint.at_least": None,
        "BaseLossOutput.value": 1.0,
        "RegularizerOutput.value": 1.0,
        "metrics": {"loss/total": 1.0},
        "measurements": {"paused": 1.0},
        "metadata": {"request_id": "x"},
        "CustomLossOutput.base_loss": BaseLossOutput(value=1.0),
        "ids": ["x"],
        "model_data": ModelData(),
        "checkpoints": (),
        "sessions": (),
        "training_runs": (),
        "sequences": (),
        "url": "http://127.0.0.1:1/term",
        "urls": {},
        "last_created_at": 1,
        "created_at": 1,
        "stop_reason": "stop",
        "wire": "json",
        "beta": 0.1,
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.2,
        "groups": 1,
        "OffPolicyMask.limit": 0.1,
        "policy": PPO(),
        "rewards": [1.0],
        "statistic": "product",
        "target": 1.0,
        "overlong_penalty.tokens": 1,
        "weight": 1.0,
        "RegularizerOutput.weight": 1.0,
        "total_bytes": None,
        "model_path": None,
        "reason": None,
        "QueueState.state": "active",
        "OptimizerParams.type": "dimuon",
        "learning_rate": 1e-4,
        **{f"{name}.compute.data": [DATUM, DATUM] for name in PAIR_TERMS},
        "KTO.compute.data": [LABELLED],
        **{f"{name}.compute.data": [CANDIDATES] for name in ("Choice", "Distillation")},
        **{f"{name}.compute.logprobs": torch.full((1, 2), -1.0) for name in ("Choice", "Distillation")},
        "candidates_datum.prompt": [1, 2],
        "candidate_ids": [3, 4],
        "target_probs": [1.0, 0.0],
        "teacher": clients.sampling,
        "teacher_datums.data": [SAMPLED],
        "with_teacher_logprobs.data": [SAMPLED],
        "with_teacher_advantages.data": [SCORED],
        "with_role_masks.data": [DATUM, DATUM],
        "with_reference.model": clients.training,
        "batches.size": 1,
        "sampler": clients.sampling,
        "prompts": [[1, 2]],
        "n": 1,
        "sequence": SampledSequence(tokens=[1], logprobs=[-1.0], stop_reason="stop"),
        "advantage": 1.0,
        "reward": one_point,
        "answers": ["x"],
        "batches": lambda start: [[DATUM]] * 2,
        "write_run.run": RUN,
        "StepRecord.tokens": 3,
        **{f"{name}.compute.logprobs": torch.full((6,), -1.0) for name in PAIR_TERMS},
        "charts": (),
        "differing_settings": {},
        "folders": [run_folder],
        "read_run.folder": run_folder,
        "read_steps.folder": run_folder,
        "train.folder": folder / "trained",
        "info": RUN,
        "last": None,
        "checkpoint": clients.checkpoint,
        "export_adapter.checkpoint": folder / "checkpoint",
        "training": clients.training,
        "training_client": clients.training,
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "chosen": "y",
        "rejected": "z",
        "rows": [{"text": "x"}],
        "render": lambda row: DATUM,
        "losses": (),
        "metric": "loss/total",
        "model": clients.training,
        "out": folder / "report",
        "page": folder / "page",
        "pipeline": Pipeline(nll),
        "record": STEP,
        "RunFolder.path": run_folder,
        "append_step.step": STEP,
        "write_sampled.batch": SAMPLED_BATCH,
        "rest": clients.rest,
        "Report.runs": (),
        "service": clients.service,
        "write_state.state": STATE,
        "keep_steps.last": 0,
        "step": 1,
        "ttl_seconds": 60,
    }


_REFERENCE = {"reference": torch.zeros(3)}
_REFERENCE_FIELD = {"reference_field": "logprobs"}
EXTRA: Mapping[str, Mapping[str, Any]] = {
    "config.TinkexConfig": {"api_key": "tml-x"},
    "train": {"settings": TrainSettings(steps=1, checkpoint_every=None)},
    "preference_datums": {"prompt": "x"},
    "export_adapter": {"overwrite": True},
    "spec.RegularizerSpec": {"weight": 1.0},
    "constraints.DualAscent": {"at_most": 0.5},
    "constraints.LogDualAscent": {"at_most": 0.5},
    "constraints.PIDMultiplier": {"at_most": 0.5},
    "replay": {"pipeline": Pipeline(nll)},
    "sample_groups": {"sampling_params": SamplingParams(max_tokens=1)},
    "preference.DPO": _REFERENCE_FIELD,
    "preference.DPOP": _REFERENCE_FIELD,
    "preference.Hinge": _REFERENCE_FIELD,
    "preference.IPO": _REFERENCE_FIELD,
    "distillation.Distillation": _REFERENCE_FIELD,
    "unpaired.KTO": {**_REFERENCE_FIELD, "reference_point": 0.0},
    "correction.Rejection": {"high": 2.0},
    "distributions.KLDivergence": _REFERENCE,
    "distributions.JensenShannon": _REFERENCE,
    "sampled.SampledKL": _REFERENCE,
    "AsyncSamplingClient.sample": {"sampling_params": SamplingParams(max_tokens=1)},
    "AsyncRestClient.copy_checkpoint": {"project_id": "x"},
    "AsyncServiceClient.create_sampling_client": {"base_model": "tiny"},
}
"""Further arguments of a valid call."""


async def one_point(_answer: str) -> float:
    """A reward that every answer gets."""
    return 1.0


async def no_items() -> AsyncGenerator[int, None]:
    """Yields nothing."""
    return
    yield 0


async def finished_run(_view: object) -> TrainedRun:
    """Returns a run that has ended."""
    return TrainedRun(info=RUN, folder=Path("x"), last=STEP, checkpoint="x", training=None)


def folder_with_batch(path: Path) -> RunFolder:
    """Returns the folder of a run that has sampled a batch."""
    folder = RunFolder(path)
    folder.write_sampled(1, SAMPLED_BATCH)
    return folder


def application(clients: Clients) -> FastAPI:
    """Returns an application that has a service client."""
    app = FastAPI()
    app.state.tinkex_service = clients.service
    return app


def instances(clients: Clients, folder: Path) -> dict[type, Callable[[], Any]]:
    """Returns functions that make the objects whose methods are called."""
    return {
        AsyncServiceClient: lambda: clients.service,
        AsyncTrainingClient: lambda: clients.training,
        AsyncSamplingClient: lambda: clients.sampling,
        AsyncRestClient: lambda: clients.rest,
        LocalService: lambda: clients.embedded,
        Pipeline: lambda: Pipeline(nll),
        controllers.GradNormBalance: controllers.GradNormBalance,
        Constraint: lambda: controllers.DualAscent(at_most=0.5),
        controllers.AdaptiveEntropy: lambda: controllers.AdaptiveEntropy(target=1.0),
        WeightController: controller_with_weight,
        schedules.Constant: lambda: schedules.Constant(1.0),
        schedules.Linear: lambda: schedules.Linear(1.0, 0.0, 3),
        schedules.Cosine: lambda: schedules.Cosine(1.0, 0.0, 3),
        schedules.WarmUp: lambda: schedules.WarmUp(3, 1.0),
        schedules.Piecewise: lambda: schedules.Piecewise({0: 1.0}),
        ModelInput: lambda: ModelInput.from_ints([1]),
        SampleResponse: lambda: SampleResponse(sequences=[SampledSequence(tokens=[1], stop_reason="stop")]),
        SupportedModel: lambda: SupportedModel(capabilities=("training",)),
        trackers.JsonlSink: lambda: started(trackers.JsonlSink(folder / "steps.jsonl")),
        trackers.TensorBoardSink: lambda: started(trackers.TensorBoardSink(folder / "board")),
        trackers.WandbSink: lambda: started(trackers.WandbSink("x")),
        trackers.MlflowSink: lambda: started(trackers.MlflowSink("x", tracking_uri="http://x")),
        trackers.TrackioSink: lambda: started(trackers.TrackioSink("x")),
        RunFolder: lambda: folder_with_batch(folder / "run"),
    }


def controller_with_weight() -> WeightController:
    """Returns a controller that a regularizer uses."""
    controller = controllers.GradNormBalance()
    controller.weight_of("one")
    return controller


def started(sink: Any) -> Any:
    """Returns a sink that has a run."""
    sink.start(RUN)
    return sink


async def prepared(clients: Clients, folder: Path) -> "ValidArguments":
    """Returns valid arguments, and writes the files that they name."""
    await Pipeline(nll).compute([DATUM], torch.full((3,), -1.0), record=folder / "record")
    with RunFolder(folder / "run") as run:
        run.write_run(RUN)
        run.append_step(STEP)
        run.write_state(STATE)
    await clients.rest.download_checkpoint(clients.checkpoint, folder / "checkpoint")
    return ValidArguments(clients, folder)


class ValidArguments:
    """Valid arguments by `function.parameter`, else by the name of the parameter, else by its annotation."""

    def __init__(self, clients: Clients, folder: Path) -> None:
        self._instances = instances(clients, folder)
        self._by_name = by_name(clients, folder)

    def instance(self, owner: type) -> Any:
        """Returns an object of a class, for its methods."""
        made = self._instances.get(owner)
        return owner(**self.required(constructor_of(owner))) if made is None else made()

    def required(self, call: PublicCall) -> dict[str, Any]:
        """Returns the arguments that a valid call needs."""
        given = {
            parameter.name: self._of(call, parameter)
            for parameter in call.parameters
            if parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        }
        return given | EXTRA.get(_last(call.name, 2), EXTRA.get(_last(call.name, 1), {}))

    def _of(self, call: PublicCall, parameter: inspect.Parameter) -> Any:
        for name in (
            f"{_last(call.name, 2)}.{parameter.name}",
            f"{_last(call.name, 1)}.{parameter.name}",
            parameter.name,
        ):
            if name in self._by_name:
                return self._by_name[name]
        wanted = parameter.annotation
        if wanted in _SIMPLE:
            return _SIMPLE[wanted]
        raise LookupError(
            f"{call.name}: add a valid `{parameter.name}` ({wanted}) to `by_name` in {Path(__file__).name}, so that "
            "the grid of wrong arguments covers this function"
        )


def _last(name: str, count: int) -> str:
    return ".".join(name.split(".")[-count:])
