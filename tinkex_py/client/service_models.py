"""What a service says about its models, and the refusals that follow from it before anything is sent."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tinkex_py.errors import APIStatusError, TransportError, UnsupportedFeature
from tinkex_py.transport.billing import BillingPause
from tinkex_py.transport.retry import RetryPolicy
from tinkex_py.types import ServerCapabilities, SupportedModel
from tinkex_py.types.outputs import Ability

PATH = "/api/v1/get_server_capabilities"
# Seconds. Whoever does not answer is asked for the model itself.
_PATIENCE = 10.0


class ServiceModels:
    """The models of one service, asked for once.

    Args:
        host: the service, as messages name it.
        request: sends a request, as `Connection.request` does.
    """

    def __init__(self, host: str, request: Callable[..., Awaitable[dict[str, Any]]]) -> None:
        self._host = host
        self._request = request
        self._known: Sequence[SupportedModel] | None = None
        self._asking = asyncio.Lock()

    async def check(self, base_model: str, ability: Ability) -> None:
        """Checks that nothing that the service says rules out a base model.

        A service of many models judges names itself. One that lists a single model may train that one whatever the
        name (SkyRL).

        Raises:
            UnsupportedFeature: it has one model, which is another; or it says that it cannot do this with the model.
        """
        models = await self._listed()
        told = {model.model_name: model for model in models if model.model_name}
        if base_model in told:
            if told[base_model].can(ability) is False:
                raise UnsupportedFeature(
                    f"{self._host} cannot do this: {ability} {base_model!r}, as its get_server_capabilities says"
                )
        elif len(models) == len(told) == 1:
            (only,) = told
            raise UnsupportedFeature(
                f"{self._host} cannot do this: {ability} {base_model!r}. Its only model is {only!r}"
            )

    async def check_any(self, ability: Ability) -> None:
        """Checks that the service does not say of all its models that they cannot do this.

        Raises:
            UnsupportedFeature: it does.
        """
        models = await self._listed()
        if models and all(model.can(ability) is False for model in models):
            names = ", ".join(repr(model.model_name) for model in models)
            raise UnsupportedFeature(
                f"{self._host} cannot do this: {ability}. Its get_server_capabilities says so of {names}"
            )

    async def _listed(self) -> Sequence[SupportedModel]:
        async with self._asking:
            if self._known is None:
                self._known = await self._ask()
        return self._known

    async def _ask(self) -> Sequence[SupportedModel]:
        try:
            answer = await self._request(
                "GET", PATH, retry=RetryPolicy.none(), billing=BillingPause(0.0), timeout=_PATIENCE
            )
            return ServerCapabilities.read(answer).supported_models
        except (APIStatusError, TransportError):
            return ()  # it does not say; what it cannot do it refuses itself
