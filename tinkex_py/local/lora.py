"""LoRA adapters: one per training model, all over one shared base network.

`AdapterBank` is the only place that talks to peft. Every method runs on the engine's thread. The network holds one of
peft's adapters for each rank and choice of layers that is in use; a model's own weights are put into it when the
model's turn comes. So a model costs its weights and nothing else: peft goes through all adapters of every layer for
each that is added.
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
from tinkex_py.types import LoraConfig

LORA_ALPHA = 32
MAX_RANK = 512
_ATTENTION = re.compile(r"(^|[._])(self_)?attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|feed_forward|ffn|moe|expert", re.IGNORECASE)


@dataclass(frozen=True)
class _Place:
    """Where a parameter goes in the network: the module whose `weight` it is; and what it must be like."""

    module: torch.nn.Module
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class _Form:
    """One of peft's adapters in the network.

    Attributes:
        name: peft's name of it.
        places: of its parameters, by file key.
        held: whose weights are in it now.
        users: adapters that have it.
    """

    name: str
    places: dict[str, _Place]
    held: "Adapter | None" = None
    users: int = 0

    def hold(self, adapter: "Adapter") -> None:
        """Put an adapter's weights in."""
        if adapter is not self.held:
            for key, place in self.places.items():
                place.module.weight = adapter.parameters[key]
            self.held = adapter

    def clear(self) -> None:
        """Take out what is in."""
        for place in self.places.values():
            place.module.weight = Parameter(torch.empty(0))
        self.held = None


@dataclass(eq=False)
class Adapter:
    """The trainable half of one model.

    Attributes:
        form: where its weights go in the network.
        settings: rank and which layers it adapts.
        parameters: file key to trainable parameter.
        gradients: file key to the sum of gradients since the last optimizer step; empty when there are none.
        version: counts changes of the weights.
    """

    form: _Form
    settings: LoraConfig
    parameters: dict[str, Parameter]
    gradients: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    version: int = 0

    def add_gradients(self, added: Mapping[str, Tensor]) -> None:
        """Add to the sum of gradients."""
        for key, gradient in added.items():
            held = self.gradients.get(key)
            self.gradients[key] = gradient if held is None else held.add_(gradient)

    def take_gradients(self) -> dict[str, Tensor]:
        """Hand out the sum of gradients and start from nothing."""
        taken, self.gradients = self.gradients, {}
        return taken

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights on the CPU."""
        return {key: parameter.detach().cpu().clone() for key, parameter in self.parameters.items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights in.

        Raises:
            InvalidData: the names or shapes are those of another adapter.
        """
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
        self.version += 1


class AdapterBank:
    """Makes, switches and removes adapters of one base network."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._targets = _adaptable_layers(model.network)
        self._tuner: Any = None
        self._layers: list[Any] = []
        self._forms: dict[tuple[int, tuple[str, ...]], _Form] = {}
        self._made = 0

    @property
    def network(self) -> Any:
        """The base network; peft puts its layers into it."""
        return self._model.network

    def create(self, settings: LoraConfig, seed: int) -> Adapter:
        """A new adapter: random A from `seed`, zero B, so that it changes nothing yet.

        Raises:
            InvalidData: the settings adapt nothing in this model, or the rank is too large.
        """
        form = self._form(settings)
        parameters = {
            key: Parameter(torch.empty(place.shape, dtype=place.dtype, device=place.device))
            for key, place in form.places.items()
        }
        adapter = Adapter(form=form, settings=settings, parameters=parameters)
        form.users += 1
        generator = torch.Generator().manual_seed(seed % 2**63)
        with torch.no_grad():
            for key, parameter in adapter.parameters.items():
                if ".lora_A." in key:
                    start = torch.empty(parameter.shape)
                    torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                    parameter.copy_(start)
                else:
                    parameter.zero_()
        return adapter

    def activate(self, adapter: Adapter | None) -> None:
        """Make passes go through this adapter, which is trainable then; None is the base network alone."""
        for layer in self._layers:
            if adapter is not None and layer.active_adapters != [adapter.form.name]:
                layer.set_adapter([adapter.form.name])
            if layer.disable_adapters != (adapter is None):
                layer.enable_adapters(adapter is not None)
        if adapter is not None:
            adapter.form.hold(adapter)
            # Peft freezes what it switches off. A graph that waits for its backward pass keeps its own, and finds
            # them trainable again when its turn comes.
            for parameter in adapter.parameters.values():
                parameter.requires_grad_(True)

    def delete(self, adapter: Adapter) -> None:
        """Take an adapter's weights out of the network, and their form with the last that has it."""
        form = adapter.form
        if form.held is adapter:
            form.clear()
        form.users -= 1
        if form.users:
            return
        self._forms = {kind: other for kind, other in self._forms.items() if other is not form}
        for other in self._forms.values():
            # Leaving the deleted one active makes peft warn once per layer.
            self._tuner.set_adapter(other.name)
            break
        self._tuner.delete_adapter(form.name)

    def target_modules(self, settings: LoraConfig) -> list[str]:
        """Full names of the layers that these settings adapt.

        Raises:
            InvalidData: there are none.
        """
        wanted = {
            kind
            for kind, on in (
                ("attn", settings.train_attn),
                ("mlp", settings.train_mlp),
                ("unembed", settings.train_unembed),
            )
            if on
        }
        names = [name for name, kind in self._targets.items() if kind in wanted]
        if not names:
            raise InvalidData(f"model {self._model.name!r} has no layers of the kinds {sorted(wanted)}")
        return names

    def _form(self, settings: LoraConfig) -> _Form:
        if settings.rank > MAX_RANK:
            raise InvalidData(f"lora rank {settings.rank} is too large: at most {MAX_RANK}")
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = self.target_modules(settings)
        kind = (settings.rank, tuple(targets))
        form = self._forms.get(kind)
        if form is None:
            self._made += 1
            name = f"form{self._made}"
            self._inject(name, settings.rank, targets)
            self._layers = [layer for layer in self.network.modules() if isinstance(layer, BaseTunerLayer)]
            form = self._forms[kind] = _Form(name, self._places(name))
            form.clear()  # of the weights that peft made
        return form

    def _inject(self, name: str, rank: int, targets: list[str]) -> None:
        from peft import LoraConfig as PeftConfig
        from peft.tuners.lora import LoraModel

        config = PeftConfig(r=rank, lora_alpha=LORA_ALPHA, lora_dropout=0.0, bias="none", target_modules=targets)
        base_config = self.network.config
        tied = base_config.tie_word_embeddings
        # An adapter beside a tied output layer is exact (the shared matrix is never touched); peft's warning is
        # about merging, which never happens here.
        base_config.tie_word_embeddings = False
        try:
            with torch.random.fork_rng():  # pyright: ignore[reportUnknownMemberType]
                if self._tuner is None:
                    self._tuner = LoraModel(self.network, config, name)
                else:
                    self._tuner.peft_config[name] = config
                    self._tuner.inject_adapter(self.network, name)
        finally:
            base_config.tie_word_embeddings = tied
        self.network.eval()

    def _places(self, name: str) -> dict[str, _Place]:
        mark = f".{name}."
        places: dict[str, _Place] = {}
        for key, parameter in self.network.named_parameters():
            if mark in key:
                module = self.network.get_submodule(key.removesuffix(".weight"))
                file_key = f"base_model.model.{key.replace(mark, '.')}"
                places[file_key] = _Place(module, parameter.shape, parameter.dtype, parameter.device)
        return places


def _adaptable_layers(network: Any) -> dict[str, str]:
    """Full name of every linear layer, and which of "attn", "mlp", "unembed" it is."""
    head = network.get_output_embeddings()
    kinds: dict[str, str] = {}
    for name, module in network.named_modules():
        if module is head:
            kinds[name] = "unembed"
        elif isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            if _FEED_FORWARD.search(name):
                kinds[name] = "mlp"
            elif _ATTENTION.search(name):
                kinds[name] = "attn"
    return kinds
