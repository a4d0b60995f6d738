"""A custom step: forward pass, terms, and the backward pass that carries their gradient."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from tinkex_py.client.accumulation import GradientCall
from tinkex_py.client.batches import CustomBatch, checked_data, custom_batch
from tinkex_py.client.ordering import Turn
from tinkex_py.client.passes import GradientPass, Model, Pass, off_loop_if
from tinkex_py.client.surrogate import (
    Surrogate,
    SurrogateOption,
    check_sequences,
    check_surrogate,
    has_candidates,
    logprobs_of,
    measuring_sample,
    measuring_weights,
)
from tinkex_py.errors import InvalidData, PipelineError
from tinkex_py.limits import is_seconds
from tinkex_py.losses.options import DEFAULTS as PIPELINE_DEFAULTS, PipelineOptions
from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.pipeline import CustomLoss, Pipeline
    from tinkex_py.losses.spec import RegularizerSpec, Term

Execution = Literal["client", "auto", "server"]
EXECUTIONS: tuple[Execution, ...] = ("client", "auto", "server")

# Work on more tokens than this leaves the event loop's thread.
_SMALL_TOKENS = 16_384


class CustomStepOptions(PipelineOptions, total=False):
    """Options of a custom step; those of a pipeline are for a step whose loss is no ready Pipeline.

    Attributes:
        deadline: seconds for everything up to the hand-over of the gradient, after which nothing cancels the step; None
            is no limit. Default None.
        record: a folder to write what the terms see to, for `tinkex_py.losses.replay`. Default None.
        execution: where the terms run. "client": here. "server": the loss is traced, uploaded where it is new, and
            the service does the whole step in one round trip, with the same gradient; terms emit no events of their
            own, and their timeouts do not apply. "auto": on the service where that is possible. Default "client".
        surrogate: the service's loss that carries the gradient. "auto": the one that carries it unchanged, by a table
            of known services or by what the forward pass reports. Default "auto".
        sequences_per_step: datums of all calls up to the next optim_step; None is this call's. Where the service
            divides by that number ("importance_sampling"), the gradient is scaled for it. Default None.
        overlap: where a custom step is right before this one, the forward pass goes out while that step's terms still
            run, and the terms of this step start when the service has accepted that one's gradient. It changes no
            number. Default True.
    """

    deadline: float | None
    record: str | os.PathLike[str] | None
    execution: Execution
    surrogate: SurrogateOption
    sequences_per_step: int | None
    overlap: bool


_STEP_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "deadline": None,
        "record": None,
        "execution": "client",
        "surrogate": "auto",
        "sequences_per_step": None,
        "overlap": True,
    }
)
DEFAULTS: Mapping[str, Any] = MappingProxyType({**PIPELINE_DEFAULTS, **_STEP_DEFAULTS})
"""Every option of a custom step, with the value it has when it is not given."""


@dataclass(frozen=True, kw_only=True)
class CustomStep:
    """A checked custom step; its fields are those of `CustomStepOptions`."""

    pipeline: "Pipeline"
    deadline: float | None
    record: str | os.PathLike[str] | None
    execution: Execution
    surrogate: SurrogateOption
    sequences_per_step: int | None
    overlap: bool

    def __post_init__(self) -> None:
        if self.deadline is not None and not (is_seconds(self.deadline) and self.deadline > 0):
            raise InvalidData(f"deadline must be > 0 seconds or None, got {self.deadline!r}")
        if self.execution not in EXECUTIONS:
            raise InvalidData(f"execution must be one of {', '.join(map(repr, EXECUTIONS))}, got {self.execution!r}")
        check_surrogate(self.surrogate, self.sequences_per_step, self.execution)

    async def run(
        self, turn: Turn, model: Model, data: Sequence[Datum], on_hand_over: Callable[[], None]
    ) -> "CustomLossOutput":
        """Runs it with the terms on the client.

        Args:
            turn: of the step.
            model: what is trained.
            data: the datums.
            on_hand_over: called at the hand-over of the gradient, before anything else can run.
        """
        datums = checked_data(data)
        sequences = check_sequences(self.sequences_per_step, len(datums))
        await turn.reached(early=self.overlap)
        batch, forward, surrogate = await self._forward(turn, model, datums)
        logprobs = logprobs_of(forward, datums)
        async with turn.running_terms():
            loss = await self._evaluate(model, datums, logprobs)
        gradient = loss.gradient.reshape(-1).numpy()
        carried = await off_loop_if(
            gradient.size > _SMALL_TOKENS,
            model.session,
            lambda: surrogate.carry(gradient, batch, logprobs, sequences),
        )
        call = GradientCall(
            datums=len(datums),
            scaled_for=sequences if surrogate.divides == "sequences" else None,
            controllers=self.pipeline.controllers,
            output=loss.output,
        )
        backward = GradientPass(model, carried.chunks, surrogate.loss_fn, call=call, on_hand_over=on_hand_over)
        return loss.with_service(await turn.send(backward))

    async def _forward(
        self, turn: Turn, model: Model, data: Sequence[Datum]
    ) -> tuple[CustomBatch, ForwardBackwardOutput, Surrogate]:
        """The forward pass, and the surrogate that it shows unless that is known."""
        surrogates = model.session.surrogates
        surrogate = surrogates.for_step(self.surrogate, data)
        if surrogate is None and has_candidates(data):
            _, _, surrogate = await self._forward(turn, model, measuring_sample(data))
            surrogates.for_step(self.surrogate, data)
        batch = await self._laid_out(model, data, measured=surrogate is None)
        forward = await turn.send(Pass(model, batch.chunks, keep_graph=True), last=False, early=self.overlap)
        if surrogate is None:
            surrogate = surrogates.learn(forward, logprobs_of(forward, data), measuring_weights(batch.size))
        return batch, forward, surrogate

    async def _laid_out(self, model: Model, data: Sequence[Datum], *, measured: bool) -> CustomBatch:
        def lay_out() -> CustomBatch:
            batch = custom_batch(data, model.session.config)
            if measured:
                batch.write_weights(measuring_weights(batch.size))
            return batch

        tokens = sum(datum.model_input.length for datum in data)
        return await off_loop_if(tokens > _SMALL_TOKENS, model.session, lay_out)

    async def _evaluate(self, model: Model, data: Sequence[Datum], logprobs: PackedTensor) -> "CustomLoss":
        from tinkex_py.losses.logprobs import Logprobs

        model.accumulation.check_controllers()
        loss = await self.pipeline.evaluate(
            data,
            Logprobs.from_packed(logprobs),
            step=model.accumulation.steps,
            workers=model.session.workers,
            group=model,
            record=self.record,
        )
        loss.check_differentiable()
        return loss


def custom_step(
    base_loss: "Term | Pipeline", regularizers: "Sequence[RegularizerSpec]", options: CustomStepOptions
) -> CustomStep:
    """A custom step from what its caller gave.

    Raises:
        TypeError: there is no such option.
        PipelineError: the loss cannot be composed, or options of a pipeline were given beside a ready one.
        InvalidData: another option cannot be used.
    """
    from tinkex_py.losses.pipeline import Pipeline

    for_pipeline = {name: value for name, value in options.items() if name in PIPELINE_DEFAULTS}
    for_step = {name: value for name, value in options.items() if name not in PIPELINE_DEFAULTS}
    for name in for_step:
        if name not in _STEP_DEFAULTS:
            raise TypeError(f"forward_backward_custom() got an unexpected keyword argument {name!r}")
    if not isinstance(base_loss, Pipeline):
        pipeline = Pipeline(base_loss, regularizers, **cast("PipelineOptions", for_pipeline))
    else:
        pipeline = base_loss
        beside = (["regularizers"] if regularizers else []) + list(for_pipeline)
        if beside:
            raise PipelineError(f"a ready Pipeline has its own options: set {', '.join(beside)} on it instead")
    return CustomStep(pipeline=pipeline, **cast("Any", {**_STEP_DEFAULTS, **for_step}))
