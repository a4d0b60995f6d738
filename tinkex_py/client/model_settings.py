"""What a new model is made with, checked before anything is sent."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from tinkex_py.errors import ConfigError, InvalidData, InvalidResponse
from tinkex_py.types import LoraConfig, WeightsInfo


class NotGiven(Enum):
    """Tells an argument that was not given from one that equals a default."""

    NOT_GIVEN = "not given"

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN = NotGiven.NOT_GIVEN


def lora_settings(lora_config: LoraConfig | None, **single: object) -> LoraConfig:
    """The adapters of a new model.

    Args:
        lora_config: all settings in one value.
        single: the same settings one by one, or NOT_GIVEN.

    Raises:
        ConfigError: both were given, or `lora_config` is no LoraConfig.
        InvalidData: a setting cannot be used.
    """
    given: dict[str, Any] = {name: value for name, value in single.items() if value is not NOT_GIVEN}
    if lora_config is not None and given:
        raise ConfigError(f"give lora_config or {', '.join(given)}, not both")
    if lora_config is not None and not isinstance(lora_config, LoraConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"lora_config must be a LoraConfig, got a {type(lora_config).__name__}")
    return lora_config or LoraConfig(**given)


def lora_config_of(info: WeightsInfo) -> LoraConfig:
    """The adapters that a checkpoint was saved from, as far as the service says.

    Raises:
        InvalidResponse: there can be no such adapters.
    """
    told: dict[str, Any] = {
        "rank": info.lora_rank,
        "train_unembed": info.train_unembed,
        "train_mlp": info.train_mlp,
        "train_attn": info.train_attn,
    }
    try:
        return LoraConfig(**{name: value for name, value in told.items() if value is not None})
    except InvalidData as error:
        raise InvalidResponse(f"weights_info describes adapters that cannot exist: {error}") from None


def model_labels(user_metadata: Mapping[str, str] | None, optimizer_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Optional fields of a new model, only where they are wanted: strict services refuse what they do not know.

    Raises:
        InvalidData: `user_metadata` is no mapping.
    """
    if user_metadata is not None and not isinstance(user_metadata, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"user_metadata must map names to texts, got a {type(user_metadata).__name__}")
    given: dict[str, Any] = {}
    if user_metadata:
        given["user_metadata"] = dict(user_metadata)
    if optimizer_config is not None:
        given["optimizer_config"] = dict(optimizer_config)
    return given


def check_text(name: str, value: object) -> None:
    """Raises InvalidData if an argument is no text, or an empty one."""
    if not isinstance(value, str) or not value:
        raise InvalidData(f"{name} must be a non-empty text, got {value!r}")
