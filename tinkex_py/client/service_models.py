"""What a service says about its models, and the refusals that follow from it before anything is sent."""

import asyncio
from collections.abc import Mapping, Sequence

from tinkex_py.errors import APIStatusError, TransportError, UnsupportedFeature
from tinkex_py.limits import BillingPause, RetryPolicy
from tinkex_py.transport.api import ServiceApi
from tinkex_py.transport.decoding import fields_of
from tinkex_py.transport.messages import request
from tinkex_py.types import ServerCapabilities, SupportedModel
from tinkex_py.types.outputs import Ability

PATH = "/api/v1/get_server_capabilities"
# Seconds. A service that does not answer is asked for the model itself.
_PATIENCE = 10.0
_NOUNS: Mapping[Ability, str] = {"train": "training", "sample": "sampling"}


class ServiceModels:
    """The models of one service, asked for once.

    Args:
        api: the service.
    """

    def __init__(self, api: ServiceApi) -> None:
        self._api = api
        self._known: Sequence[SupportedModel] | None = None
        self._asking = asyncio.Lock()

    async def check(self, base_model: str, ability: Ability) -> None:
        """Checks that nothing that the service says rules out a base model.

        A service of many models judges names itself. One that lists a single model may train that one whatever the
        name (SkyRL).

        Raises:
            UnsupportedFeature: it has one model, which is another; or it says that it cannot do this with the model.
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
        """Checks that the service does not say of all its models that they cannot do this.

        Raises:
            UnsupportedFeature: it does.
        """
        models = await self._all()
        if models and all(model.can(ability) is False for model in models):
            names = ", ".join(repr(model.model_name) for model in models)
            raise UnsupportedFeature(
                f"{self._api.host} does not support {_NOUNS[ability]}. Its get_server_capabilities says so of {names}"
            )

    async def _all(self) -> Sequence[SupportedModel]:
        async with self._asking:
            if self._known is None:
                self._known = await self._ask()
        return self._known

    async def _ask(self) -> Sequence[SupportedModel]:
        try:
            asking = request("GET", PATH, timeout=_PATIENCE)
            fields = await self._api.send(asking, fields_of, retry=RetryPolicy.none(), billing=BillingPause(0.0))
            return ServerCapabilities.read(fields).supported_models
        except (APIStatusError, TransportError):
            return ()  # it does not say; what it cannot do it refuses itself
