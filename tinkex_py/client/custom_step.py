"""Custom steps: forward pass, evaluation of the terms, and the backward pass that carries their gradient."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from tinkex_py.arguments import check_choice, check_count, check_flag, check_path, shown
from tinkex_py.client.accumulation import GradientCall
from tinkex_py.client.batches import CustomBatch, checked_data, custom_batch
from tinkex_py.client.candidates import check_splittable, joined_logprobs, one_target_each, split_gradient
from tinkex_py.client.certificates import Certificate
from tinkex_py.client.ordering import Turn
from tinkex_py.client.passes import GradientPass, Model, Pass, off_loop_if
from tinkex_py.client.service_models import model_info
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
from tinkex_py.config import TinkexConfig
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

# Batches of more tokens are encoded in a worker thread.
_SMALL_TOKENS = 16_384


class CustomStepOptions(PipelineOptions, total=False):
    """Options of a custom step. Those of a pipeline apply unless the loss is a ready `Pipeline`.

    Attributes:
        deadline: seconds until the hand-over of the gradient, after which nothing cancels the step; None means no
            limit. Default None.
        record: a folder that receives the inputs of the terms, for `tinkex_py.losses.replay`. Default None.
        execution: where the terms run. "client": in this process. "server": the loss is traced and uploaded, and the
            service executes the whole step in one round trip, with the same gradient; terms emit no events, and their
            timeouts do not apply. "auto": on the service if possible. Default "client".
        surrogate: the loss of the service that carries the gradient. "auto" selects the one that carries it unchanged,
            from a certificate, a table of known services or the result of the forward pass. "importance_sampling" is
            for a service that divides each datum by its length and by the datums of all calls up to the next
            optim_step, "importance_sampling_per_request" by its length and by the datums of its request,
            "importance_sampling_per_token" by the tokens of its request, and "importance_sampling_sum" for one that
            divides nothing. Default "auto".
        sequences_per_step: number of datums of all calls up to the next optim_step; None means those of this call. The
            gradient is scaled by it on services that divide by it ("importance_sampling"). Default None.
        overlap: send the forward pass while the terms of the custom step before this one still run. The terms of this
            step start when the service has accepted the gradient of that one. No number changes. Default True.
    """

    deadline: float | None
    record: str | os.PathLike[str] | None
    execution: Execution
    surrogate: SurrogateOption
    sequences_per_step: int | None
    overlap: bool


@dataclass(frozen=True, kw_only=True)
class CustomStep:
    """A checked custom step; the fields are those of `CustomStepOptions`."""

    pipeline: "Pipeline"
    deadline: float | None = None
    record: str | os.PathLike[str] | None = None
    execution: Execution = "client"
    surrogate: SurrogateOption = "auto"
    sequences_per_step: int | None = None
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.deadline is not None and not (is_seconds(self.deadline) and self.deadline > 0):
            raise InvalidData(f"deadline must be > 0 seconds or None, got {shown(self.deadline)}")
        if self.record is not None:
            object.__setattr__(self, "record", check_path("record", self.record, error=PipelineError))
        if self.sequences_per_step is not None:
            count = check_count("sequences_per_step", self.sequences_per_step, least=1)
            object.__setattr__(self, "sequences_per_step", count)

    async def run(
        self, turn: Turn, model: Model, data: Sequence[Datum], on_hand_over: Callable[[], None]
    ) -> "CustomLossOutput":
        """Runs the step with its terms on the client.

        Args:
            turn: the turn of the step.
            model: the model to train.
            data: the datums.
            on_hand_over: called at the hand-over of the gradient, before any other code can run.
        """
        datums = checked_data(data)
        sequences = check_sequences(self.sequences_per_step, len(datums))
        await turn.reached(early=self.overlap)
        batch, forward, surrogate = await self._forward(turn, model, datums)
        logprobs = logprobs_of(forward, batch.data, model.session.surrogates.host)
        sequences = sequences * len(batch.data) // len(datums)
        async with turn.running_terms():
            if batch.data is datums:
                loss = await self._evaluate(model, datums, logprobs)
                gradient = loss.gradient.reshape(-1).numpy()
            else:
                loss = await self._evaluate(model, datums, joined_logprobs(logprobs, datums))
                gradient = split_gradient(loss.gradient.reshape(-1).numpy(), datums)
        carried = await off_loop_if(
            gradient.size > _SMALL_TOKENS,
            model.session,
            lambda: surrogate.carry(gradient, batch, logprobs, sequences),
        )
        call = GradientCall(
            datums=len(batch.data),
            scaled_for=sequences if surrogate.divides == "sequences" else None,
            controllers=self.pipeline.controllers,
            output=loss.output,
        )
        backward = GradientPass(model, carried.chunks, surrogate.loss_fn, call=call, on_hand_over=on_hand_over)
        applied = await turn.send(backward)
        return loss.with_service(applied, _logprob_differences(model.session.settings, logprobs, applied))

    async def _forward(
        self, turn: Turn, model: Model, data: Sequence[Datum]
    ) -> tuple[CustomBatch, ForwardBackwardOutput, Surrogate]:
        """Runs the forward pass, which also determines the surrogate unless that is known.

        The batch has other datums if the service carries the gradient of one target per position only.
        """
        surrogates = model.session.surrogates
        surrogate = surrogates.for_step(self.surrogate, model.key)
        if surrogate is None and has_candidates(data):
            _, _, surrogate = await self._forward(turn, model, measuring_sample(data))
        if surrogate is not None and surrogate.loss_fn == "importance_sampling" and has_candidates(data):
            sequences = self.sequences_per_step if surrogate.divides == "sequences" else None
            check_splittable(data, surrogates.host, sequences)
            data = one_target_each(data)
        # Services that need another loss may read weights as a mask, and return no logprob where one is 0.
        weighted = surrogate is None or surrogate.loss_fn != "cross_entropy"
        batch = await self._laid_out(model, data, weighted=weighted)
        forward = await turn.send(Pass(model, batch.chunks, keep_graph=True), last=False, early=self.overlap)
        if surrogate is None:
            logprobs = logprobs_of(forward, data, model.session.surrogates.host)
            weights, certificate = measuring_weights(batch.size), await _stored_certificate(model)
            surrogate = surrogates.learn(forward, logprobs, weights, model.key, certificate)
        return batch, forward, surrogate

    async def _laid_out(self, model: Model, data: Sequence[Datum], *, weighted: bool) -> CustomBatch:
        def lay_out() -> CustomBatch:
            batch = custom_batch(data, model.session.config)
            if weighted:
                batch.write_weights(measuring_weights(batch.size))
            return batch

        tokens = sum(datum.loss_fn_inputs["target_tokens"].shape[0] for datum in data)
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


async def _stored_certificate(model: Model) -> Certificate | None:
    name = model.base_model
    if name is None:
        info = await model_info(model.session.api, model.model_id)
        name = info.model_data.model_name or info.model_name
    return None if name is None else await model.session.stored_certificate(name)


def _logprob_differences(
    settings: TinkexConfig, forward: PackedTensor, backward: ForwardBackwardOutput
) -> tuple[float, float] | None:
    """Returns the mean and the largest difference of the logprobs of both passes, and warns if they are large.

    Tokens of probability 0 in the forward pass, which terms have masked, are left out.
    """
    repeated = backward.packed.get("logprobs")
    if repeated is None or repeated.values.shape != forward.values.shape:
        return None
    with np.errstate(invalid="ignore"):
        differences = repeated.values - forward.values
    np.abs(differences, out=differences)
    if not np.isfinite(differences.max(initial=0.0)):
        differences = differences[np.isfinite(forward.values)]
    if not differences.size:
        return None
    mean, largest = float(differences.mean()), float(differences.max())
    if not (mean <= settings.mean_logprob_difference and largest <= settings.largest_logprob_difference):
        limits = f"{settings.mean_logprob_difference:g} and {settings.largest_logprob_difference:g}"
        warnings.warn(
            f"the logprobs of a custom step's backward pass differ from those of its forward pass by {mean:.2g} in the "
            f"mean and {largest:.2g} at most (limits of TinkexConfig: {limits}). So the gradient belongs to other "
            "numbers than the loss. Dropout, an outdated adapter or another precision cause this; `tinkex-py check "
            "--gradients` measures its effect",
            UserWarning,
            stacklevel=2,
        )
    return mean, largest


_STEP_DEFAULTS = {field.name: field.default for field in fields(CustomStep) if field.name != "pipeline"}
DEFAULTS: Mapping[str, Any] = MappingProxyType({**PIPELINE_DEFAULTS, **_STEP_DEFAULTS})
"""Default values of all options."""


def custom_step(
    base_loss: "Term | Pipeline | str", regularizers: "Sequence[RegularizerSpec]", options: CustomStepOptions
) -> CustomStep:
    """Creates a custom step from the arguments of `forward_backward_custom`.

    Raises:
        TypeError: an option does not exist.
        PipelineError: the loss cannot be composed, or a ready Pipeline was combined with options of a pipeline.
        InvalidData: another option is invalid.
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
    if "execution" in options:
        check_choice("execution", options["execution"], EXECUTIONS)
    if "surrogate" in options:
        check_surrogate(options["surrogate"], options.get("execution", "client"))
    if "overlap" in options:
        check_flag("overlap", options["overlap"])
    return CustomStep(pipeline=pipeline, **cast("Any", for_step))
