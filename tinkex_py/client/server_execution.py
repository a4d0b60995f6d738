"""Custom steps that run on the service: the loss is uploaded once, and a step is then one round trip."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tinkex_py import telemetry
from tinkex_py.errors import InvalidData, InvalidResponse, PipelineError, RequestFailed, UnsupportedFeature
from tinkex_py.types import Datum

if TYPE_CHECKING:
    from tinkex_py.client.connection import Connection
    from tinkex_py.losses.pipeline import Pipeline
    from tinkex_py.losses.tracing import TracedPipeline

Execution = Literal["client", "auto", "server"]
EXECUTIONS: tuple[Execution, ...] = ("client", "auto", "server")
# A service may forget losses that were not used for long; what this many uses ago was used, it still has.
REMEMBERED = 64


@dataclass
class UploadedLosses:
    """What one session has uploaded, by the digest of the traced loss."""

    _ids: "OrderedDict[str, str]" = field(default_factory=OrderedDict[str, str])
    _refusals: dict[str, str] = field(default_factory=dict[str, str])
    _told: set[str] = field(default_factory=set[str])
    _numbers: int = 0
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def loss_id(self, connection: "Connection", traced: "TracedPipeline") -> str:
        """The service's id of a traced loss; uploads it if it is new.

        Raises:
            UnsupportedFeature: the service refuses the loss.
        """
        async with self._lock:
            refusal = self._refusals.get(traced.digest)
            if refusal is not None:
                raise UnsupportedFeature(refusal)
            loss_id = self._ids.pop(traced.digest, None) or await self._upload(connection, traced)
            self._ids[traced.digest] = loss_id
            if len(self._ids) > REMEMBERED:
                self._ids.popitem(last=False)
            return loss_id

    def tell(self, reason: str) -> None:
        """One event for each reason why steps do not run on the service."""
        if reason not in self._told:
            self._told.add(reason)
            telemetry.emit("tinkex.custom_loss.not_on_service", {}, {"explanation": reason})

    async def _upload(self, connection: "Connection", traced: "TracedPipeline") -> str:
        number, self._numbers = self._numbers, self._numbers + 1
        body: dict[str, Any] = {
            "session_id": connection.session_id,
            "custom_loss_seq_id": number,
            "name": "tinkex_pipeline",
            "inputs": [{"name": name, "rank": rank} for name, rank in traced.inputs],
            "graph": traced.graph,
            "type": "create_custom_loss",
        }
        request_id = await connection.submit("/api/v1/create_custom_loss", body)
        try:
            fields = await connection.fields(request_id, "CreateCustomLoss")
        except RequestFailed as error:
            if error.category != "user":
                raise
            self._refusals[traced.digest] = f"the service refuses the loss: {error}"
            raise UnsupportedFeature(self._refusals[traced.digest]) from error
        loss_id = fields.get("loss_id")
        if not isinstance(loss_id, str):
            raise InvalidResponse("create_custom_loss gave no loss_id")
        return loss_id


@dataclass(frozen=True)
class ServerStep:
    """A custom step that is ready to run on the service."""

    traced: "TracedPipeline"
    loss_id: str


def check_execution(execution: str) -> None:
    """Raises InvalidData unless it is one of the known ones."""
    if execution not in EXECUTIONS:
        raise InvalidData(f"execution must be one of {', '.join(map(repr, EXECUTIONS))}, got {execution!r}")


async def server_step(
    connection: "Connection", pipeline: "Pipeline", data: Sequence[Datum], execution: Execution, *, recorded: bool
) -> ServerStep | None:
    """Prepares a step for the service, or tells why it runs on the client: an event with "auto", else an error.

    Args:
        connection: the service.
        pipeline: the loss.
        data: checked datums.
        execution: what the user asked for.
        recorded: whether the step is to be recorded, which needs the terms on the client.

    Raises:
        UnsupportedFeature: it cannot run on the service, and "server" was asked for.
        InvalidData: a datum lacks what a term takes, and "server" was asked for.
        PipelineError: no term depends on the logprobs.
    """
    try:
        return await _prepared(connection, pipeline, data, recorded=recorded)
    except (UnsupportedFeature, InvalidData, PipelineError) as error:
        # Requests that were started together with this one are to have their places before it fails.
        await asyncio.sleep(0)
        if execution == "server" or isinstance(error, PipelineError):
            raise
        connection.uploaded_losses.tell(str(error))
        return None


async def _prepared(
    connection: "Connection", pipeline: "Pipeline", data: Sequence[Datum], *, recorded: bool
) -> ServerStep:
    from tinkex_py.losses.tracing import trace_pipeline

    if not connection.flags.custom_loss_server_side:
        raise UnsupportedFeature(
            "the service takes no uploaded losses; the embedded one does with custom_losses=True or --custom-losses"
        )
    if recorded:
        raise UnsupportedFeature("record=... needs the terms on the client")
    traced = trace_pipeline(pipeline, data)
    if not traced.differentiable:
        raise PipelineError("no term depends on the logprobs, so there is nothing to train on; nothing was sent")
    return ServerStep(traced, await connection.uploaded_losses.loss_id(connection, traced))
