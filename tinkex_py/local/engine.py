"""The engine: operations on models, as synchronous calls from one thread.

Every operation activates its adapter before anything else.
"""

import json
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tinkex_py.errors import InvalidData
from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.custom_losses import CUSTOM_LOSS, CustomLosses
from tinkex_py.local.data import EnginePass, PassResult, SampleRequest, SampleResult
from tinkex_py.local.encryption import encryption_to
from tinkex_py.local.graphs import GraphKeeper, GraphMeter, KeptGraph, fingerprint, weight_storages
from tinkex_py.local.lora import LORA_ALPHA, Adapter, AdapterBank, AdapterOptimizer
from tinkex_py.local.losses import DatumLoss, Loss, find_loss
from tinkex_py.local.models import LoadedModel
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.passes import (
    Example,
    Microbatch,
    forward,
    gradients,
    in_order,
    merged_metrics,
    microbatch_losses,
    prepare,
    split,
)
from tinkex_py.local.records import CheckpointInfo, TrainingRunInfo
from tinkex_py.local.sampling import SampleBatch, can_pad, room_for
from tinkex_py.local.worker import EngineClosing
from tinkex_py.types import AdamParams, LoraConfig

ADAPTER_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
SAMPLER_ADAPTERS = 4


@dataclass
class TrainingModel:
    """The engine's state of one training client."""

    run: TrainingRunInfo
    adapter: Adapter
    optimizer: AdapterOptimizer
    touched: bool = False


class Engine:
    """One base network with many adapters. Operations raise InvalidData for models that are not loaded.

    Args:
        model: the base network.
        store: where checkpoints are stored.
        options: limits and seed.
        closing: set when the service stops; long operations then raise EngineClosing.
    """

    def __init__(
        self, model: LoadedModel, store: CheckpointStore, options: LocalOptions, closing: threading.Event
    ) -> None:
        self.model = model
        self.store = store
        self.graphs = GraphKeeper(options.graph_budget_bytes)
        self.custom_losses = CustomLosses(model.device)
        self.passes_run = 0
        self._options = options
        self._closing = closing
        self._bank = AdapterBank(model)
        self._models: dict[str, TrainingModel] = {}
        self._samplers: dict[str, Adapter] = {}

    # Models

    def check_model(self, base_model: str, settings: LoraConfig) -> None:
        """Raises InvalidData for another base model, or unusable settings; may be called from any thread."""
        self._check_base(base_model)
        self._bank.check(settings)

    def create_model(self, run: TrainingRunInfo, settings: LoraConfig, seed: int) -> None:
        """Creates a training model; InvalidData: another base model, or unusable settings."""
        self.check_model(run.base_model, settings)
        adapter = self._bank.create(settings, seed)
        with self._dropped_on_failure(adapter):
            self._add(run, adapter)

    def create_from_checkpoint(self, run: TrainingRunInfo, source: CheckpointInfo, *, with_optimizer: bool) -> None:
        """Creates a training model from a checkpoint, with the checkpoint's LoRA settings.

        Raises:
            InvalidData: the checkpoint belongs to another base model, is damaged, or has no wanted optimizer state.
        """
        self._check_base(run.base_model)
        adapter = self._bank.create(lora_settings(source.run), 0)
        with self._dropped_on_failure(adapter):
            self._add(run, adapter, self._restored(adapter, source, with_optimizer=with_optimizer))

    def load_into(self, model_id: str, source: CheckpointInfo, *, with_optimizer: bool) -> None:
        """Loads a checkpoint into an unused model; InvalidData: it was used, or the checkpoint does not fit."""
        model = self._model(model_id)
        if model.touched:
            raise InvalidData(
                f"load_weights onto {model_id!r} must be its first request: create a new training client from the state"
            )
        self._check_base(source.run.base_model)
        model.optimizer = self._restored(model.adapter, source, with_optimizer=with_optimizer)
        model.touched = True

    def unload_model(self, model_id: str) -> None:
        """Frees a training model; unknown ids are ignored."""
        model = self._models.pop(model_id, None)
        if model is not None:
            self.graphs.drop(model_id)
            self._bank.delete(model.adapter)
            self.store.delete_ephemeral(model_id)

    def run_info(self, model_id: str) -> TrainingRunInfo | None:
        """Returns the run of a loaded training model; may be called from any thread."""
        model = self._models.get(model_id)
        return None if model is None else model.run

    def save(
        self, model_id: str, info: CheckpointInfo, *, overwrite: bool, recipients: Sequence[str] = ()
    ) -> CheckpointInfo:
        """Writes a checkpoint, a training one with the optimizer's moments.

        Raises:
            InvalidData: its name or a recipient that it is encrypted to is invalid.
            UnsupportedFeature: it cannot be encrypted.
        """
        model = self._used(model_id)
        files: dict[str, Mapping[str, Any]] = {ADAPTER_FILE: model.adapter.weights()}
        if info.kind == "weights":
            files[OPTIMIZER_FILE] = model.optimizer.state()
        texts = {"adapter_config.json": self._peft_config(model)}
        described = info.model_copy(update={"run": model.run, "has_optimizer": info.kind == "weights"})
        return self.store.write(described, files, texts, overwrite=overwrite, encrypt=encryption_to(recipients))

    # Training

    def run_pass(self, model_id: str, request: EnginePass) -> PassResult:
        """Runs a forward or forward_backward pass. Gradients are added only if the whole pass succeeds.

        Raises:
            InvalidData: unknown loss, invalid datum or non-finite loss; no gradient was added.
        """
        model = self._model(model_id)
        loss = self._loss(model, request)
        examples = prepare(request.data(), loss, self.model, finite=not request.forward_only)
        self._bank.activate(model.adapter)
        model.touched = True
        if request.forward_only:
            microbatches = self._forward_only(model_id, examples, keep=request.keep_graph)
            losses = [microbatch_losses(part, examples, loss) for part in microbatches]
        else:
            microbatches, losses = self._forward_backward(model_id, model, examples, loss)
        return _pass_result(microbatches, losses, len(examples))

    def optim_step(self, model_id: str, settings: AdamParams) -> dict[str, float]:
        """Runs an AdamW step on the accumulated gradients; InvalidData: they are not finite."""
        model = self._used(model_id)
        self.graphs.drop(model_id)
        self._bank.activate(model.adapter)
        return model.optimizer.step(settings)

    def gradient(self, model_id: str) -> dict[str, torch.Tensor]:
        """Returns a copy of the gradients accumulated since the last optim_step, by file key."""
        return {key: value.clone() for key, value in self._model(model_id).adapter.gradients.items()}

    def _loss(self, model: TrainingModel, request: EnginePass) -> Loss:
        if request.loss_fn == CUSTOM_LOSS:
            return self.custom_losses.find(model.run.session_id, request.config)
        return find_loss(request.loss_fn, request.config)

    def _forward_only(self, model_id: str, examples: Sequence[Example], *, keep: bool) -> list[Microbatch]:
        keep = keep and self.graphs.budget_bytes > 0
        meter = GraphMeter(weight_storages(self.model.network) if keep else frozenset())
        microbatches: list[Microbatch] = []
        for group in split(examples, self._options.max_tokens_per_microbatch):
            if keep:
                with torch.enable_grad(), meter.measuring():
                    microbatches.append(self._forward(examples, group))
                keep = meter.total <= self.graphs.budget_bytes
                if not keep:
                    microbatches = [part.without_graph() for part in microbatches]
            else:
                with torch.no_grad():
                    microbatches.append(self._forward(examples, group))
        if keep:
            self.graphs.keep(KeptGraph(model_id, fingerprint(examples), tuple(microbatches), meter.total))
        return [part.without_graph() for part in microbatches]

    def _forward_backward(
        self, model_id: str, model: TrainingModel, examples: Sequence[Example], loss: Loss
    ) -> tuple[list[Microbatch], list[list[DatumLoss]]]:
        kept = self.graphs.take(model_id, fingerprint(examples)) if len(self.graphs) else None
        makers: list[Callable[[], Microbatch]]
        if kept is not None:
            makers = [lambda part=part: part for part in kept.microbatches]
            kept = None
        else:
            groups = split(examples, self._options.max_tokens_per_microbatch)
            makers = [lambda group=group: self._forward(examples, group) for group in groups]
        summed: dict[str, torch.Tensor] = {}
        finished: list[Microbatch] = []
        losses: list[list[DatumLoss]] = []
        for make in makers:
            with torch.enable_grad():
                part = make()
                given = microbatch_losses(part, examples, loss)
                total = torch.stack([datum_loss.value for datum_loss in given]).sum()
            for key, gradient in gradients(total, model.adapter):
                held = summed.get(key)
                summed[key] = gradient if held is None else held.add_(gradient)
            finished.append(part.without_graph())
            losses.append([replace(datum_loss, value=datum_loss.value.detach()) for datum_loss in given])
        model.adapter.add_gradients(summed)
        return finished, losses

    def _forward(self, examples: Sequence[Example], group: tuple[int, ...]) -> Microbatch:
        self._check()
        self.passes_run += 1
        return forward(self.model, examples, group)

    # Sampling

    @property
    def pads_prompts(self) -> bool:
        """Whether prompts of different lengths can share a batch."""
        return can_pad(self.model)

    def check_sample(self, request: SampleRequest) -> None:
        """Raises InvalidData for an invalid request; may be called from any thread."""
        room_for(self.model, request)

    def sample_batch(self, requests: Sequence[SampleRequest]) -> SampleBatch:
        """Returns a batch of valid requests, for `draw`."""
        return SampleBatch(self.model, requests, self._check)

    def draw(self, source: CheckpointInfo | None, batch: SampleBatch, tokens: int) -> bool:
        """Samples up to `tokens` tokens of each sequence, from a checkpoint or the base network.

        Returns:
            Whether the batch is done.

        Raises:
            InvalidData: the checkpoint is missing or damaged.
        """
        self._bank.activate(None if source is None else self._sampler(source))
        return batch.advance(tokens)

    def sample(self, source: CheckpointInfo | None, request: SampleRequest) -> SampleResult:
        """Samples one request to its end; raises like `draw`."""
        batch = self.sample_batch([request])
        while not self.draw(source, batch, request.max_tokens or 1):
            pass
        return batch.results()[0]

    def _sampler(self, source: CheckpointInfo) -> Adapter:
        """Returns an adapter with the weights of a checkpoint; they replace the least recently used ones."""
        held = self._samplers.pop(source.folder, None)
        if held is None:
            weights = self._read(source, ADAPTER_FILE)
            held = self._spare_sampler(lora_settings(source.run))
            try:
                held.set_weights(weights)
            except InvalidData:
                self._bank.delete(held)
                raise
        self._samplers[source.folder] = held
        return held

    def _spare_sampler(self, settings: LoraConfig) -> Adapter:
        if len(self._samplers) >= SAMPLER_ADAPTERS:
            oldest = self._samplers.pop(next(iter(self._samplers)))
            if oldest.settings == settings:
                return oldest
            self._bank.delete(oldest)
        return self._bank.create(settings, 0)

    def _check(self) -> None:
        if self._closing.is_set():
            raise EngineClosing("the service is stopping; this request was not finished")

    def _check_base(self, name: str) -> None:
        if name != self.model.name:
            raise InvalidData(f"base model {name!r} is not served here. Served: {self.model.name!r}")

    def _model(self, model_id: str) -> TrainingModel:
        model = self._models.get(model_id)
        if model is None:
            raise InvalidData(f"model {model_id!r} is not loaded")
        return model

    def _used(self, model_id: str) -> TrainingModel:
        model = self._model(model_id)
        model.touched = True
        return model

    def _add(self, run: TrainingRunInfo, adapter: Adapter, optimizer: AdapterOptimizer | None = None) -> None:
        self.store.write_run(run)
        self._models[run.run_id] = TrainingModel(run, adapter, optimizer or AdapterOptimizer(adapter))

    @contextmanager
    def _dropped_on_failure(self, adapter: Adapter) -> Generator[None]:
        try:
            yield
        except BaseException:
            self._bank.delete(adapter)
            raise

    def _restored(self, adapter: Adapter, source: CheckpointInfo, *, with_optimizer: bool) -> AdapterOptimizer:
        if with_optimizer and not source.has_optimizer:
            raise InvalidData(f"checkpoint {source.path!r} has no optimizer state; load it without")
        # Everything that can fail precedes the first change: a model is loaded completely or stays as it was.
        weights = self._read(source, ADAPTER_FILE)
        optimizer = AdapterOptimizer(adapter)
        if with_optimizer:
            optimizer.set_state(self._read(source, OPTIMIZER_FILE))
        adapter.set_weights(weights)
        return optimizer

    def _read(self, source: CheckpointInfo, name: str) -> dict[str, torch.Tensor]:
        return read_tensors(self.store.file(source, name), f"checkpoint {source.path!r}")

    def _peft_config(self, model: TrainingModel) -> str:
        settings = model.adapter.settings
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            # Never a folder of this machine, which another one does not have.
            "base_model_name_or_path": Path(self.model.name).expanduser().resolve().name,
            "r": settings.rank,
            "lora_alpha": LORA_ALPHA,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": self._bank.target_modules(settings),
        }
        return json.dumps(config, indent=2)


def read_tensors(file: Path, whose: str) -> dict[str, torch.Tensor]:
    """Reads a safetensors file.

    Args:
        file: the file.
        whose: its owner, for errors.

    Raises:
        InvalidData: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load  # pyright: ignore[reportUnknownVariableType]

    try:
        # The file readers of safetensors 0.8.0 leak some memory for every tensor.
        return load(file.read_bytes())
    except FileNotFoundError as error:
        raise InvalidData(f"{whose} has no {file.name}") from error
    except SafetensorError as error:
        raise InvalidData(f"{whose}: {file.name} is damaged ({error})") from error


def lora_settings(run: TrainingRunInfo) -> LoraConfig:
    """Returns the LoRA settings of a run."""
    return LoraConfig(
        rank=run.rank, train_unembed=run.train_unembed, train_mlp=run.train_mlp, train_attn=run.train_attn
    )


def _pass_result(microbatches: Sequence[Microbatch], losses: Sequence[Sequence[DatumLoss]], count: int) -> PassResult:
    logprobs = in_order(microbatches, [part.logprobs for part in microbatches], count)
    ordered: list[DatumLoss] = in_order(microbatches, losses, count)
    elementwise = [loss.elementwise for loss in ordered if loss.elementwise is not None]
    return PassResult(
        logprobs=[tensor.detach().cpu().numpy() for tensor in logprobs],
        metrics=merged_metrics(ordered),
        elementwise_loss=[tensor.cpu().numpy() for tensor in elementwise] if len(elementwise) == count else None,
    )
