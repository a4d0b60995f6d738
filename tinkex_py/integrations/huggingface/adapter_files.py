"""The two files of a LoRA adapter, checked and put into peft's form."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tinkex_py.errors import InvalidData, MissingExtra

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")
# The hosted service's name of the output layer, and the one that every Hugging Face model has.
_RENAMED = ("base_model.model.model.unembed_tokens.", "base_model.model.lm_head.")
# What changes the arithmetic and is carried over.
_KEPT = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
# What is written anew, or plays no role once the adapter is trained.
_NO_MATTER = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
        "init_lora_weights", "megatron_core", "ensure_weight_tying",
    }
)  # fmt: skip


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA adapter as peft reads it.

    Attributes:
        config: content of `adapter_config.json`.
        weights: tensors by their names in `adapter_model.safetensors`.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Any]

    @property
    def layers(self) -> list[str]:
        """Full names of the layers that it adapts."""
        return list(self.config["target_modules"])


def read_adapter(folder: Path, base_model: str | None) -> AdapterFiles:
    """Reads the files of a checkpoint, wherever they are in its folder.

    Args:
        folder: the checkpoint.
        base_model: name or path that the adapter's file shall give for its base model; None keeps what is there.

    Raises:
        InvalidData: they are missing or damaged, or hold what is no plain LoRA adapter.
    """
    found = [file for file in sorted(folder.rglob(CONFIG_FILE)) if (file.parent / WEIGHTS_FILE).is_file()]
    if len(found) != 1:
        raise InvalidData(
            f"{str(folder)!r} holds {len(found)} LoRA adapters ({CONFIG_FILE} with {WEIGHTS_FILE}); there must be one"
        )
    given = _read_config(found[0])
    weights = {
        key.replace(*_RENAMED): tensor for key, tensor in _read_weights(found[0].with_name(WEIGHTS_FILE)).items()
    }
    layers = _checked_layers(weights, given)
    config = {
        **{name: given[name] for name in _KEPT if given.get(name) is not None},
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or given.get("base_model_name_or_path"),
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        # All of them by their full names: short ones, or "all-linear", can mean other layers to peft.
        "target_modules": layers,
    }
    return AdapterFiles(config, weights)


def check_fits(adapter: AdapterFiles, network: Any) -> None:
    """Checks that a network has every layer of an adapter, in the right shape.

    peft itself leaves out in silence what it does not find.

    Raises:
        InvalidData: it has not.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters(remove_duplicate=False)}
    for layer in adapter.layers:
        shape = shapes.get(f"{layer}.weight")
        if shape is None:
            raise InvalidData(f"the base model has no layer {layer!r}: was the checkpoint trained on another one?")
        outputs = adapter.weights[f"base_model.model.{layer}.lora_B.weight"].shape[0]
        inputs = adapter.weights[f"base_model.model.{layer}.lora_A.weight"].shape[1]
        if shape not in ((outputs, inputs), (inputs, outputs)):
            raise InvalidData(
                f"layer {layer!r} is {shape} in the base model, but the checkpoint adapts {(outputs, inputs)}: was the "
                "checkpoint trained on another one?"
            )


def write_adapter(adapter: AdapterFiles, folder: Path) -> None:
    """Writes both files into an existing folder."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    save_file(dict(adapter.weights), str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2), encoding="utf-8")


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        given: object = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidData(f"{CONFIG_FILE} of the checkpoint is damaged ({error})") from error
    if not isinstance(given, dict):
        raise InvalidData(f"{CONFIG_FILE} of the checkpoint is no JSON object")
    config = cast("dict[str, Any]", given)
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise InvalidData(
            f"the checkpoint is an adapter of the kind {config['peft_type']!r}; only LORA can be exported"
        )
    for name in ("r", "lora_alpha"):
        if isinstance(config.get(name), bool) or not isinstance(config.get(name), int | float):
            raise InvalidData(f"{CONFIG_FILE} of the checkpoint needs the number {name!r}, got {config.get(name)!r}")
    defaults = _peft_defaults()
    for name in sorted(config.keys() - _NO_MATTER - set(_KEPT)):
        if config[name] and config[name] != defaults.get(name):
            raise InvalidData(
                f"{CONFIG_FILE} of the checkpoint sets {name}={config[name]!r}; only plain LoRA can be exported"
            )
    return config


def _peft_defaults() -> Mapping[str, Any]:
    try:
        from peft import LoraConfig
    except ImportError:
        raise MissingExtra("peft", "huggingface") from None

    return vars(LoraConfig())


def _read_weights(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise InvalidData(f"{WEIGHTS_FILE} of the checkpoint is damaged ({error})") from error


def _checked_layers(weights: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The adapted layers, in the order of the file."""
    halves: dict[str, dict[str, Any]] = {}
    for key, tensor in weights.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise InvalidData(
                f"{WEIGHTS_FILE} of the checkpoint has {key!r} of shape {tuple(tensor.shape)}; only the matrices of "
                "LoRA, base_model.model.<layer>.lora_A.weight and lora_B.weight, can be exported"
            )
        halves.setdefault(match["layer"], {})[match["half"]] = tensor
    if not halves:
        raise InvalidData(f"{WEIGHTS_FILE} of the checkpoint is empty")
    for layer, pair in halves.items():
        shapes = {half: tuple(tensor.shape) for half, tensor in pair.items()}
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise InvalidData(f"the LoRA matrices of layer {layer!r} do not belong together: {shapes}")
        if not config.get("rank_pattern") and pair["A"].shape[0] != config["r"]:
            raise InvalidData(f"layer {layer!r} has rank {pair['A'].shape[0]}, but {CONFIG_FILE} says {config['r']}")
    return list(halves)
