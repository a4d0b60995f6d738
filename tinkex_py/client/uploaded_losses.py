"""Losses uploaded to the service, each of them once."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinkex_py import telemetry
from tinkex_py.client.submission import json_result
from tinkex_py.errors import InvalidResponse, RequestFailed, UnsupportedFeature
from tinkex_py.transport.api import ServiceApi
from tinkex_py.transport.decoding import request_id_of
from tinkex_py.transport.messages import request

if TYPE_CHECKING:
    from tinkex_py.losses.tracing import TracedPipeline

# A service may drop losses; those among this many most recently used ones are assumed to be kept.
REMEMBERED = 64


@dataclass
class UploadedLosses:
    """The uploaded losses of one session, by the digest of the traced loss."""

    _ids: "OrderedDict[str, str]" = field(default_factory=OrderedDict[str, str])
    _refusals: dict[str, str] = field(default_factory=dict[str, str])
    _reported: set[str] = field(default_factory=set[str])
    _numbers: int = 0
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def loss_id(self, api: ServiceApi, session_id: str, traced: "TracedPipeline") -> str:
        """Returns the service's id of a traced loss; uploads it if it is new.

        Raises:
            UnsupportedFeature: the service refuses the loss.
        """
        async with self._lock:
            refusal = self._refusals.get(traced.digest)
            if refusal is not None:
                raise UnsupportedFeature(refusal)
            loss_id = self._ids.pop(traced.digest, None) or await self._upload(api, session_id, traced)
            self._ids[traced.digest] = loss_id
            if len(self._ids) > REMEMBERED:
                self._ids.popitem(last=False)
            return loss_id

    def report(self, reason: str) -> None:
        """Emits one event for each reason why steps do not run on the service."""
        if reason not in self._reported:
            self._reported.add(reason)
            telemetry.emit("tinkex.custom_loss.not_on_service", {}, {"explanation": reason})

    async def _upload(self, api: ServiceApi, session_id: str, traced: "TracedPipeline") -> str:
        number, self._numbers = self._numbers, self._numbers + 1
        body: dict[str, Any] = {
            "session_id": session_id,
            "custom_loss_seq_id": number,
            "name": "tinkex_pipeline",
            "inputs": [{"name": name, "rank": rank} for name, rank in traced.inputs],
            "graph": traced.graph,
            "type": "create_custom_loss",
        }
        request_id = await api.send(request("POST", "/api/v1/create_custom_loss", json=body), request_id_of)
        try:
            fields = await json_result(api, request_id, "CreateCustomLoss")
        except RequestFailed as error:
            if error.category != "user":
                raise
            self._refusals[traced.digest] = f"the service refuses the loss: {error}"
            raise UnsupportedFeature(self._refusals[traced.digest]) from error
        loss_id = fields.get("loss_id")
        if not isinstance(loss_id, str):
            raise InvalidResponse("create_custom_loss returned no loss_id")
        return loss_id
