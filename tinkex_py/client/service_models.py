"""The models of a service: its list, checks against it, and the settings of a new model."""

import asyncio
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from tinkex_py.arguments import check_kind, check_labels, check_mapping
from tinkex_py.client.arguments import given
from tinkex_py.errors import (
    APIStatusError,
    ConfigError,
    InvalidData,
    InvalidResponse,
    MissingExtra,
    TransportError,
    UnsupportedFeature,
)
from tinkex_py.limits import BillingPause, RetryPolicy
from tinkex_py.transport.api import ServiceApi
from tinkex_py.transport.decoding import fields_of
from tinkex_py.transport.messages import request
from tinkex_py.types import GetInfoResponse, LoraConfig, ServerCapabilities, SupportedModel, WeightsInfo
from tinkex_py.types.outputs import Ability

PATH = "/api/v1/get_server_capabilities"
# Seconds. Without a response nothing is ruled out.
_TIMEOUT = 10.0
_NOUNS: Mapping[Ability, str] = {"train": "training", "sample": "sampling"}


async def model_info(api: ServiceApi, model_id: str) -> GetInfoResponse:
    """Returns what the service says about a training client's model."""
    asking = request("POST", "/api/v1/get_info", json={"model_id": model_id, "type": "get_info"})
    return GetInfoResponse.read(await api.send(asking, fields_of))


class ServiceModels:
    """The models of one service, requested once."""

    def __init__(self, api: ServiceApi) -> None:
        self._api = api
        self._known: ServerCapabilities | None = None
        self._asking = asyncio.Lock()

    async def check(self, base_model: str, ability: Ability) -> None:
        """Raises UnsupportedFeature if the service's list rules out a base model.

        A service with several models checks names itself. One with a single model may train that one under any name
        (SkyRL), so another name is refused here.
        """
        models = await self._all()
        listed = {model.model_name: model for model in models if model.model_name}
        if base_model in listed:
            if listed[base_model].can(ability) is False:
                raise UnsupportedFeature(
                    f"{self._api.host} does not support {_NOUNS[ability]} {base_model!r}, as its "
                    "get_server_capabilities says"
                )
        elif len(models) == len(listed) == 1:
            (only,) = listed
            raise UnsupportedFeature(
                f"{self._api.host} does not support {_NOUNS[ability]} {base_model!r}. Its only model is {only!r}"
            )

    async def check_any(self, ability: Ability) -> None:
        """Raises UnsupportedFeature if the service excludes an ability for all its models."""
        models = await self._all()
        if models and all(model.can(ability) is False for model in models):
            names = ", ".join(repr(model.model_name) for model in models)
            raise UnsupportedFeature(
                f"{self._api.host} does not support {_NOUNS[ability]}. Its get_server_capabilities says so of {names}"
            )

    async def names(self, ability: Ability) -> list[str]:
        """Returns the names of the listed models whose ability is not ruled out."""
        return [model.model_name for model in await self._all() if model.model_name and model.can(ability) is not False]

    async def version(self) -> str | None:
        """Returns the version of the service, if it reports one."""
        return (await self._reported()).version

    async def _all(self) -> Sequence[SupportedModel]:
        return (await self._reported()).supported_models

    async def _reported(self) -> ServerCapabilities:
        async with self._asking:
            if self._known is None:
                self._known = await self._ask()
        return self._known

    async def _ask(self) -> ServerCapabilities:
        try:
            asking = request("GET", PATH, timeout=_TIMEOUT)
            fields = await self._api.send(asking, fields_of, retry=RetryPolicy.none(), billing=BillingPause(0.0))
            return ServerCapabilities.read(fields)
        except (APIStatusError, TransportError):
            return ServerCapabilities()  # nothing is ruled out; the service refuses by itself what it cannot do


def lora_settings(lora_config: LoraConfig | None, **single: object) -> LoraConfig:
    """Returns the adapters of a new model, from one value or from single settings.

    Raises:
        ConfigError: both were given, or `lora_config` is not a LoraConfig.
        InvalidData: a setting is invalid.
    """
    settings = given(**single)
    if lora_config is not None and settings:
        raise ConfigError(f"pass either lora_config or {', '.join(settings)}, not both")
    if lora_config is None:
        return LoraConfig(**settings)
    return check_kind("lora_config", lora_config, LoraConfig, error=ConfigError)


def lora_config_of(info: WeightsInfo) -> LoraConfig:
    """Returns the adapters of a checkpoint; settings that the service does not report have their defaults.

    Raises:
        InvalidResponse: the reported settings are invalid.
    """
    parts = given(train_unembed=info.train_unembed, train_mlp=info.train_mlp, train_attn=info.train_attn)
    try:
        return LoraConfig(**given(rank=info.lora_rank), **parts)
    except InvalidData as error:
        raise InvalidResponse(f"weights_info returned invalid settings of the adapters: {error}") from None


def model_labels(user_metadata: Mapping[str, str] | None, optimizer_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the optional fields of a new model; raises InvalidData if one of them cannot be sent."""
    labels = None if user_metadata is None else check_labels("user_metadata", user_metadata)
    optimizer = None if optimizer_config is None else check_mapping("optimizer_config", optimizer_config)
    return given(user_metadata=labels or None, optimizer_config=optimizer)


def tokenizer_by_name(name: str) -> Any:
    """Returns a tokenizer of transformers; raises like `AsyncServiceClient.get_tokenizer`."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtra("transformers", "local") from None
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedFeature(
            f"no tokenizer {name!r} could be loaded ({type(error).__name__}); pass your own tokenizer"
        ) from error
