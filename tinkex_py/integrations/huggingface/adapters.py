"""Exports a LoRA checkpoint as a folder that peft loads."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tinkex_py.arguments import check_flag, check_function, check_kind, check_path, check_text
from tinkex_py.client.archive import extract
from tinkex_py.client.rest import AsyncRestClient
from tinkex_py.errors import InvalidData
from tinkex_py.integrations import imported
from tinkex_py.limits import running_loop
from tinkex_py.threads import FileThread, import_before_threads
from tinkex_py.types.rest import DownloadProgress

AnyPath = str | os.PathLike[str]
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")
# The hosted service's name of the output layer, and that of Hugging Face models.
_RENAMED = ("base_model.model.model.unembed_tokens.", "base_model.model.lm_head.")
# Settings that change the arithmetic and are copied.
_KEPT = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
# Settings that are written by the export, or have no effect on a trained adapter.
_IGNORED = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
        "init_lora_weights", "megatron_core", "ensure_weight_tying",
    }
)  # fmt: skip


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter in the form that peft reads.

    Attributes:
        config: content of `adapter_config.json`.
        weights: tensors by their names in `adapter_model.safetensors`.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Any]


class _AdapterConfig(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    r: int
    lora_alpha: int | float
    peft_type: str = "LORA"


def export_adapter(
    checkpoint: AnyPath,
    folder: AnyPath,
    *,
    base_model: str | None = None,
    network: Any = None,
    overwrite: bool = False,
) -> Path:
    """Converts a downloaded checkpoint to a peft adapter: `peft.PeftModel.from_pretrained(network, folder)` loads it.

    The folder appears complete, with `adapter_config.json` and `adapter_model.safetensors`, or not at all. The weights
    are those of the checkpoint, bit for bit; the state of the optimizer is not exported.

    Args:
        checkpoint: a folder that `download_checkpoint` created, or an archive of one.
        folder: folder of the adapter; its parents are created.
        base_model: name or path of the base model for `adapter_config.json`; None keeps that of the checkpoint.
        network: the base model, to check that it has the layers of the adapter.
        overwrite: replace an existing adapter. Anything else is never replaced.

    Returns:
        The folder.

    Raises:
        InvalidData: the folder is in use, or the checkpoint is not a plain LoRA adapter or does not match the network.
        InvalidResponse: the archive is damaged, or contains a name that leads out of the folder.
        MissingExtra: peft is not installed.
        OSError: a file cannot be read or written.
    """
    source, target = check_path("checkpoint", checkpoint), check_path("folder", folder)
    _check_target(target, overwrite=overwrite)
    if base_model is not None:
        check_text("base_model", base_model)
    if not source.exists():
        raise InvalidData(f"there is no checkpoint {str(source)!r}: pass a folder or an archive")
    with _workspace_beside(target) as name:
        workspace = Path(name)
        files = source if source.is_dir() else workspace / "checkpoint"
        if not source.is_dir():
            extract(source, files, lambda: None)
        adapter = read_adapter(files, base_model)
        if network is not None:
            _check_network(adapter, network)
        made = workspace / "adapter"
        made.mkdir()
        write_adapter(adapter, made)
        _check_target(target, overwrite=overwrite)
        _move(made, target, workspace / "replaced")
    return target


async def download_adapter(
    rest: AsyncRestClient,
    path: str,
    folder: AnyPath,
    *,
    base_model: str | None = None,
    network: Any = None,
    overwrite: bool = False,
    on_progress: Callable[[DownloadProgress], object] | None = None,
) -> Path:
    """Downloads a checkpoint and converts it to a peft adapter.

    Args:
        rest: the client that `service.create_rest_client()` returns.
        path: `tinker://{training run}/{kind}/{name}`.
        folder: as in `export_adapter`.
        base_model: as in `export_adapter`; None uses the name that the service reports for the checkpoint, of a folder
            only the last part.
        network: as in `export_adapter`.
        overwrite: as in `export_adapter`.
        on_progress: as in `AsyncRestClient.download_checkpoint`.

    Returns:
        The folder.

    Raises:
        TinkexError: as in `export_adapter` and `AsyncRestClient.download_checkpoint`.
    """
    running_loop()
    import_before_threads("transformers")  # peft imports it, in the thread below
    check_kind("rest", rest, AsyncRestClient)
    target = check_path("folder", folder)
    _check_target(target, overwrite=overwrite)
    if base_model is not None:
        check_text("base_model", base_model)
    base_model = base_model or _without_folder((await rest.get_weights_info(path)).base_model)
    async with FileThread() as files:
        workspace = await files.run(lambda: _workspace_beside(target))
        try:
            downloaded = Path(workspace.name) / "checkpoint"
            checkpoint = await rest.download_checkpoint(path, downloaded, on_progress=on_progress)
            return await files.run(
                lambda: export_adapter(checkpoint, target, base_model=base_model, network=network, overwrite=overwrite)
            )
        finally:
            await files.run(workspace.cleanup)


def read_adapter(folder: Path, base_model: str | None) -> PeftAdapter:
    """Reads the only adapter in the folder of a checkpoint or below it.

    Raises:
        InvalidData: the files are missing or damaged, or are not a plain LoRA adapter.
    """
    found = [file for file in sorted(folder.rglob(CONFIG_FILE)) if (file.parent / WEIGHTS_FILE).is_file()]
    if len(found) != 1:
        raise InvalidData(
            f"{str(folder)!r} contains {len(found)} LoRA adapters ({CONFIG_FILE} with {WEIGHTS_FILE}): pass a "
            "checkpoint with one"
        )
    given = _read_config(found[0])
    weights = {
        key.replace(*_RENAMED): tensor for key, tensor in _read_weights(found[0].with_name(WEIGHTS_FILE)).items()
    }
    config = {
        **{name: given[name] for name in _KEPT if given.get(name) is not None},
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or given.get("base_model_name_or_path"),
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        # All by their full names: peft can match short names, or "all-linear", to other layers.
        "target_modules": _checked_layers(weights, given),
    }
    return PeftAdapter(config, weights)


def write_adapter(adapter: PeftAdapter, folder: Path) -> None:
    """Writes both files to an existing folder and flushes them to the disk."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    save_file(dict(adapter.weights), str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2), encoding="utf-8")
    for file in folder.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def _without_folder(model: str) -> str:
    """Returns the name of a model that a service may have loaded from a folder, which other machines do not have."""
    is_folder = model.startswith((".", "~")) or Path(model).is_absolute()
    return Path(model).name if is_folder else model


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        config = _AdapterConfig.model_validate_json(file.read_bytes()).model_dump()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in problem["loc"])
        raise InvalidData(f"{CONFIG_FILE} of the checkpoint is invalid: {where}{problem['msg']}") from error
    if config["peft_type"].upper() != "LORA":
        raise InvalidData(f"the checkpoint is an adapter of type {config['peft_type']!r}; only LORA can be exported")
    plain: object = imported("peft", "huggingface").LoraConfig()
    for name in sorted(config.keys() - _IGNORED - set(_KEPT)):
        if config[name] and config[name] != getattr(plain, name, None):
            raise InvalidData(
                f"{CONFIG_FILE} of the checkpoint sets {name}={config[name]!r}; only plain LoRA can be exported"
            )
    return config


def _read_weights(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise InvalidData(f"{WEIGHTS_FILE} of the checkpoint is damaged ({error}): download it again") from error


def _checked_layers(weights: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Returns the adapted layers in the order of the file."""
    halves: dict[str, dict[str, Any]] = {}
    for key, tensor in weights.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise InvalidData(
                f"{WEIGHTS_FILE} of the checkpoint contains {key!r} of shape {tuple(tensor.shape)}; only matrices "
                "named base_model.model.<layer>.lora_A.weight and lora_B.weight can be exported"
            )
        halves.setdefault(match["layer"], {})[match["half"]] = tensor
    if not halves:
        raise InvalidData(f"{WEIGHTS_FILE} of the checkpoint is empty: download it again")
    for layer, pair in halves.items():
        shapes = {half: tuple(tensor.shape) for half, tensor in pair.items()}
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise InvalidData(f"the LoRA matrices of layer {layer!r} do not match: {shapes}")
        if not config.get("rank_pattern") and pair["A"].shape[0] != config["r"]:
            raise InvalidData(f"layer {layer!r} has rank {pair['A'].shape[0]}, but {CONFIG_FILE} says {config['r']}")
    return list(halves)


def _check_network(adapter: PeftAdapter, network: Any) -> None:
    """Raises InvalidData unless the network has every layer of the adapter. peft ignores those that are missing."""
    check_function("network.named_parameters", getattr(network, "named_parameters", None))
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters(remove_duplicate=False)}
    for layer in adapter.config["target_modules"]:
        shape = shapes.get(f"{layer}.weight")
        if shape is None:
            raise InvalidData(
                f"the base model has no layer {layer!r}: pass the model that the checkpoint was trained on"
            )
        outputs = adapter.weights[f"base_model.model.{layer}.lora_B.weight"].shape[0]
        inputs = adapter.weights[f"base_model.model.{layer}.lora_A.weight"].shape[1]
        if shape not in ((outputs, inputs), (inputs, outputs)):
            raise InvalidData(
                f"layer {layer!r} is {shape} in the base model, but {(outputs, inputs)} in the checkpoint: pass the "
                "model that the checkpoint was trained on"
            )


def _check_target(target: Path, *, overwrite: bool) -> None:
    check_flag("overwrite", overwrite)
    if not target.name or target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InvalidData(f"{str(target)!r} is not a folder: choose another name for the adapter")
    there = {file.name for file in target.iterdir()} if target.is_dir() else set[str]()
    if there and not overwrite:
        raise InvalidData(f"the folder {str(target)!r} is not empty: choose another one, or pass overwrite=True")
    if there - {CONFIG_FILE, WEIGHTS_FILE}:
        raise InvalidData(
            f"the folder {str(target)!r} contains more than an adapter and is not replaced: choose another one"
        )


def _workspace_beside(target: Path) -> "tempfile.TemporaryDirectory[str]":
    """Creates a hidden folder on the same disk, from which an adapter can be moved in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True)


def _move(made: Path, target: Path, replaced: Path) -> None:
    if target.is_dir():
        target.rename(replaced)
    try:
        made.rename(target)
    except OSError:
        if replaced.is_dir():
            replaced.rename(target)
        raise
