"""LoRA adapters, one per training model over one shared base network, and their optimizer.

`AdapterBank` is the only place that uses peft. All methods run on the engine's thread. The network contains one peft
adapter per rank and choice of layers; a model's own weights are put into it when the model is active. So a further
model costs only its weights, whereas peft visits all adapters of every layer for each that is added.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkex_py.errors import InvalidData
from tinkex_py.local.models import LoadedModel
from tinkex_py.types import AdamParams, LoraConfig

LORA_ALPHA = 32
MAX_RANK = 512
_ATTENTION = re.compile(r"(^|[._])(self_)?attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|feed_forward|ffn|moe|expert", re.IGNORECASE)
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class _Slot:
    """The module of the network whose `weight` is a parameter, and what that parameter must be like."""

    module: torch.nn.Module
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class _Form:
    """A peft adapter in the network.

    Attributes:
        name: its name for peft.
        slots: by file key of the parameter.
        held: the adapter whose weights are in it.
        users: number of adapters that use it.
    """

    name: str
    slots: dict[str, _Slot]
    held: "Adapter | None" = None
    users: int = 0

    def hold(self, adapter: "Adapter") -> None:
        """Puts the weights of an adapter in."""
        if adapter is not self.held:
            for key, slot in self.slots.items():
                slot.module.weight = adapter.parameters[key]
            self.held = adapter

    def clear(self) -> None:
        """Takes the weights out."""
        for slot in self.slots.values():
            slot.module.weight = Parameter(torch.empty(0))
        self.held = None


@dataclass(eq=False)
class Adapter:
    """The trainable part of one model.

    Attributes:
        form: the peft adapter that takes its weights.
        settings: rank and layers.
        parameters: by file key.
        gradients: sums since the last optimizer step, by file key; empty if there are none.
    """

    form: _Form
    settings: LoraConfig
    parameters: dict[str, Parameter]
    gradients: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def add_gradients(self, added: Mapping[str, Tensor]) -> None:
        """Adds to the sums of gradients."""
        for key, gradient in added.items():
            held = self.gradients.get(key)
            self.gradients[key] = gradient if held is None else held.add_(gradient)

    def take_gradients(self) -> dict[str, Tensor]:
        """Returns the sums of gradients and resets them."""
        taken, self.gradients = self.gradients, {}
        return taken

    def weights(self) -> dict[str, Tensor]:
        """Returns a copy of the weights on the CPU."""
        return {key: parameter.detach().cpu().clone() for key, parameter in self.parameters.items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies weights in; InvalidData: names or shapes do not fit."""
        if weights.keys() != self.parameters.keys():
            differing = sorted(weights.keys() ^ self.parameters.keys())
            raise InvalidData(
                f"the checkpoint does not fit this adapter: {len(differing)} names differ, {differing[:3]}"
            )
        for key, parameter in self.parameters.items():
            if weights[key].shape != parameter.shape:
                raise InvalidData(f"{key}: checkpoint {tuple(weights[key].shape)}, model {tuple(parameter.shape)}")
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(weights[key])


class AdapterBank:
    """Creates, activates and deletes the adapters of one base network."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._network = model.network
        self._targets = _adaptable_layers(model.network)
        self._tuner: Any = None
        self._layers: list[Any] = []
        self._forms: dict[tuple[int, tuple[str, ...]], _Form] = {}
        self._created = 0

    def create(self, settings: LoraConfig, seed: int) -> Adapter:
        """Creates an adapter with random A from `seed` and zero B, so that it changes nothing yet.

        Raises:
            InvalidData: the settings adapt no layer of this model, or the rank is too large.
        """
        form = self._form(settings)
        parameters = {
            key: Parameter(torch.empty(slot.shape, dtype=slot.dtype, device=slot.device))
            for key, slot in form.slots.items()
        }
        form.users += 1
        generator = torch.Generator().manual_seed(seed % 2**63)
        with torch.no_grad():
            for key, parameter in parameters.items():
                if ".lora_A." in key:
                    start = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                    torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                    parameter.copy_(start)
                else:
                    parameter.zero_()
        return Adapter(form=form, settings=settings, parameters=parameters)

    def activate(self, adapter: Adapter | None) -> None:
        """Makes passes use this adapter, and makes it trainable; None is the base network alone."""
        for layer in self._layers:
            if adapter is not None and layer.active_adapters != [adapter.form.name]:
                layer.set_adapter([adapter.form.name])
            if layer.disable_adapters != (adapter is None):
                layer.enable_adapters(adapter is not None)
        if adapter is not None:
            adapter.form.hold(adapter)
            # Peft freezes what it deactivates. A graph that waits for its backward pass keeps its own parameters, which
            # are trainable again when its model is activated.
            for parameter in adapter.parameters.values():
                parameter.requires_grad_(True)

    def delete(self, adapter: Adapter) -> None:
        """Takes an adapter out of the network, and its form with the last user."""
        form = adapter.form
        if form.held is adapter:
            form.clear()
        form.users -= 1
        if form.users:
            return
        self._forms = {kind: other for kind, other in self._forms.items() if other is not form}
        for other in self._forms.values():
            # If the deleted one is active, peft warns once per layer.
            self._tuner.set_adapter(other.name)
            break
        self._tuner.delete_adapter(form.name)

    def target_modules(self, settings: LoraConfig) -> list[str]:
        """Returns the full names of the layers that these settings adapt; InvalidData: there are none."""
        kinds = {"attn": settings.train_attn, "mlp": settings.train_mlp, "unembed": settings.train_unembed}
        names = [name for name, kind in self._targets.items() if kinds[kind]]
        if not names:
            wanted = sorted(kind for kind, on in kinds.items() if on)
            raise InvalidData(f"model {self._model.name!r} has no layers of the kinds {wanted}")
        return names

    def check(self, settings: LoraConfig) -> None:
        """Raises InvalidData if the settings adapt no layer of this model, or the rank is too large."""
        if settings.rank > MAX_RANK:
            raise InvalidData(f"lora rank {settings.rank} is too large: at most {MAX_RANK}")
        self.target_modules(settings)

    def _form(self, settings: LoraConfig) -> _Form:
        self.check(settings)
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = self.target_modules(settings)
        kind = (settings.rank, tuple(targets))
        form = self._forms.get(kind)
        if form is None:
            self._created += 1
            name = f"form{self._created}"
            self._inject(name, settings.rank, targets)
            self._layers = [layer for layer in self._network.modules() if isinstance(layer, BaseTunerLayer)]
            form = self._forms[kind] = _Form(name, self._slots(name))
            form.clear()  # of the weights that peft created
        return form

    def _inject(self, name: str, rank: int, targets: list[str]) -> None:
        from peft import LoraConfig as PeftConfig
        from peft.tuners.lora import LoraModel

        config = PeftConfig(r=rank, lora_alpha=LORA_ALPHA, lora_dropout=0.0, bias="none", target_modules=targets)
        base_config = self._network.config
        tied = base_config.tie_word_embeddings
        # An adapter beside a tied output layer is exact, because the shared matrix is not changed; peft's warning is
        # about merging, which never happens here.
        base_config.tie_word_embeddings = False
        try:
            with torch.random.fork_rng():  # pyright: ignore[reportUnknownMemberType]
                if self._tuner is None:
                    self._tuner = LoraModel(self._network, config, name)
                else:
                    self._tuner.peft_config[name] = config
                    self._tuner.inject_adapter(self._network, name)
        finally:
            base_config.tie_word_embeddings = tied
        self._network.eval()

    def _slots(self, name: str) -> dict[str, _Slot]:
        mark = f".{name}."
        slots: dict[str, _Slot] = {}
        for key, parameter in self._network.named_parameters():
            if mark in key:
                module = self._network.get_submodule(key.removesuffix(".weight"))
                file_key = f"base_model.model.{key.replace(mark, '.')}"
                slots[file_key] = _Slot(module, parameter.shape, parameter.dtype, parameter.device)
        return slots


def _adaptable_layers(network: Any) -> dict[str, str]:
    """Returns the full name of every linear layer that reads tokens, and its kind: "attn", "mlp" or "unembed"."""
    head = network.get_output_embeddings()
    # Of a vision-language model, the encoder of images stays as it is.
    decoder = frozenset(network.get_decoder().modules())
    kinds: dict[str, str] = {}
    for name, module in network.named_modules():
        if module is head:
            kinds[name] = "unembed"
        elif module not in decoder:
            continue
        elif isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            if _FEED_FORWARD.search(name):
                kinds[name] = "mlp"
            elif _ATTENTION.search(name):
                kinds[name] = "attn"
    return kinds


class AdapterOptimizer:
    """torch.optim.AdamW on one adapter, with parameters for each step."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._adamw = torch.optim.AdamW(adapter.parameters.values(), lr=0.0)

    def step(self, settings: AdamParams) -> dict[str, float]:
        """Consumes the sums of gradients and changes the weights. Without gradients, nothing changes.

        Returns:
            grad_norm: global L2 norm before clipping.

        Raises:
            InvalidData: a gradient is not finite; the gradients are dropped and the weights unchanged.
        """
        gradients = self._adapter.take_gradients()
        if not gradients:
            return {"grad_norm": 0.0}
        norm = math.sqrt(sum(float(gradient.double().square().sum().item()) for gradient in gradients.values()))
        if not math.isfinite(norm):
            raise InvalidData(f"the gradient norm is {norm}: the gradients were dropped, and the weights are unchanged")
        scale = min(1.0, settings.grad_clip_norm / norm) if settings.grad_clip_norm > 0 and norm > 0 else 1.0
        for group in self._adamw.param_groups:
            group["lr"] = settings.learning_rate
            group["betas"] = (settings.beta1, settings.beta2)
            group["eps"] = settings.eps
            group["weight_decay"] = settings.weight_decay
        for key, parameter in self._adapter.parameters.items():
            parameter.grad = gradients[key] if scale == 1.0 else gradients[key].mul_(scale)
        self._adamw.step()  # pyright: ignore[reportUnknownMemberType]
        self._adamw.zero_grad(set_to_none=True)
        return {"grad_norm": norm}

    def state(self) -> dict[str, Tensor]:
        """Returns a copy of the moments on the CPU; empty before the first step."""
        return {
            f"{key}/{moment}": self._adamw.state[parameter][moment].detach().to("cpu", torch.float32, copy=True)
            for key, parameter in self._adapter.parameters.items()
            if parameter in self._adamw.state
            for moment in _MOMENTS
        }

    def set_state(self, saved: Mapping[str, Tensor]) -> None:
        """Restores a result of `state`; InvalidData: it belongs to another adapter."""
        if not saved:
            return
        for key, parameter in self._adapter.parameters.items():
            missing = [moment for moment in _MOMENTS if f"{key}/{moment}" not in saved]
            if missing:
                raise InvalidData(f"the checkpoint's optimizer state lacks {missing} of {key}")
            if any(saved[f"{key}/{moment}"].shape != parameter.shape for moment in _MOMENTS if moment != "step"):
                raise InvalidData(f"the checkpoint's optimizer state of {key} has another shape than the weights")
            self._adamw.state[parameter] = {
                # AdamW keeps its step counter on the CPU for every device.
                moment: saved[f"{key}/{moment}"].clone().to("cpu" if moment == "step" else parameter.device)
                for moment in _MOMENTS
            }
