"""Custom steps that run on the service: a step is one round trip."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tinkex_py import telemetry
from tinkex_py.client.connection import Connection
from tinkex_py.client.custom_options import until_handed_over
from tinkex_py.client.model_requests import ModelRequests, or_break
from tinkex_py.client.steps import OptimizerSteps
from tinkex_py.client.training_data import check_data, check_targets
from tinkex_py.errors import InvalidData, PipelineError, UnsupportedFeature
from tinkex_py.transport.codec import LossConfig
from tinkex_py.transport.place import Place
from tinkex_py.types import Datum

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.pipeline import Pipeline
    from tinkex_py.losses.tracing import TracedPipeline

Execution = Literal["client", "auto", "server"]
EXECUTIONS: tuple[Execution, ...] = ("client", "auto", "server")


@dataclass(frozen=True)
class ServerStep:
    """A custom step that is ready to run on the service."""

    traced: "TracedPipeline"
    loss_id: str


def check_execution(execution: str) -> None:
    """Raises InvalidData unless it is one of the known ones."""
    if execution not in EXECUTIONS:
        raise InvalidData(f"execution must be one of {', '.join(map(repr, EXECUTIONS))}, got {execution!r}")


async def run_on_service(
    requests: ModelRequests,
    place: Place,
    steps: OptimizerSteps,
    data: Sequence[Datum],
    pipeline: "Pipeline",
    execution: Execution,
    deadline: float | None,
    *,
    recorded: bool,
) -> "CustomLossOutput | None":
    """A custom step in one round trip; None if it has to run on the client.

    Args:
        requests: of the training client.
        place: the step's place in the lane.
        steps: the client's optimizer steps.
        data: the datums.
        pipeline: the loss.
        execution: what the user asked for.
        deadline: seconds up to the hand-over.
        recorded: whether the step is to be recorded.
    """
    datums = await or_break(lambda: check_data(data))
    await or_break(lambda: check_targets(datums))
    async with until_handed_over(deadline) as handed_over:
        step = await _server_step(requests.connection, pipeline, datums, execution, recorded=recorded)
        if step is None:
            return None
        await place.quiet_turn()  # the weights are those after the optimizer steps before this one
        count = sum(spec.enabled for spec in pipeline.regularizers)
        with telemetry.lifecycle(
            "tinkex.custom_loss", {"regularizer_count": count, "track_grad_norms": False}
        ) as measurements:
            weights = step.traced.weights(steps.made)
            config: LossConfig = {"loss_id": step.loss_id}
            chunks = await requests.chunks(step.traced.datums(datums, weights), "custom", config)
            result = await requests.run_backward(place, chunks, "custom", config, handed_over=handed_over)
            output = step.traced.output(result, weights)
            measurements["loss_total"] = output.loss_total
            measurements["regularizer_total"] = output.regularizer_total
        return output


async def _server_step(
    connection: Connection, pipeline: "Pipeline", data: Sequence[Datum], execution: Execution, *, recorded: bool
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
    connection: Connection, pipeline: "Pipeline", data: Sequence[Datum], *, recorded: bool
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
