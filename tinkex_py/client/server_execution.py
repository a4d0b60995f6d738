"""Custom steps that the service executes in one round trip."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinkex_py import telemetry
from tinkex_py.client.batches import check_data, check_targets, checked_chunks
from tinkex_py.client.custom_step import CustomStep
from tinkex_py.client.ordering import Turn
from tinkex_py.client.passes import GradientPass, Model
from tinkex_py.client.session import ClientSession
from tinkex_py.errors import InvalidData, PipelineError, UnsupportedFeature
from tinkex_py.transport.encoding import LossConfig
from tinkex_py.types import Datum

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.tracing import TracedPipeline


@dataclass(frozen=True)
class ServerStep:
    """A custom step that the service can execute."""

    traced: "TracedPipeline"
    loss_id: str


async def run_on_service(
    step: CustomStep, turn: Turn, model: Model, data: Sequence[Datum], on_hand_over: Callable[[], None]
) -> "CustomLossOutput | None":
    """Executes a custom step on the service; returns None if it has to run on the client. Args as `CustomStep.run`."""
    datums = check_data(data)
    check_targets(datums)
    ready = await _server_step(step, model.session, datums)
    if ready is None:
        return None
    await turn.quiet()  # earlier optimizer steps update the weights of the terms
    count = sum(spec.enabled for spec in step.pipeline.regularizers)
    with telemetry.lifecycle(
        "tinkex.custom_loss", {"regularizer_count": count, "track_grad_norms": False}
    ) as measurements:
        weights = ready.traced.weights(model.accumulation.steps)
        config: LossConfig = {"loss_id": ready.loss_id}
        sent = ready.traced.datums(datums, weights)
        chunks = checked_chunks(sent, "custom", config, model.session.config)
        result = await turn.send(GradientPass(model, chunks, "custom", config, on_hand_over=on_hand_over))
        output = ready.traced.output(result, weights)
        measurements["loss_total"] = output.loss_total
        measurements["regularizer_total"] = output.regularizer_total
    return output


async def _server_step(step: CustomStep, session: ClientSession, data: Sequence[Datum]) -> ServerStep | None:
    """Prepares a step for the service. If it cannot run there, raises, or with "auto" emits an event.

    Raises:
        UnsupportedFeature: the service cannot execute the step.
        InvalidData: a datum lacks an input of a term.
        PipelineError: no term depends on the logprobs.
    """
    try:
        return await _prepared(step, session, data)
    except (UnsupportedFeature, InvalidData) as error:
        # Requests that start together with this one enter before it fails.
        await asyncio.sleep(0)
        if step.execution == "server":
            raise
        session.uploaded_losses.report(str(error))
        return None


async def _prepared(step: CustomStep, session: ClientSession, data: Sequence[Datum]) -> ServerStep:
    from tinkex_py.losses.tracing import trace_pipeline

    if not session.config.custom_loss_server_side:
        raise UnsupportedFeature(
            "the service does not execute uploaded losses: use execution='client'; the embedded service executes them "
            "with custom_losses=True or --custom-losses"
        )
    if step.record is not None:
        raise UnsupportedFeature("record=... needs the terms on the client: use execution='client'")
    traced = trace_pipeline(step.pipeline, data)
    if not traced.differentiable:
        raise PipelineError("no term depends on the logprobs, so the step has no gradient; nothing was sent")
    return ServerStep(traced, await session.uploaded_losses.loss_id(session.api, session.session_id, traced))
