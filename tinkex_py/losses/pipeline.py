"""Composes a training loss: `loss_total = base_loss + sum(weight_i * regularizer_i)`."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from tinkex_py import telemetry
from tinkex_py.errors import InvalidBaseLoss, InvalidSpec, PipelineError
from tinkex_py.losses import gradients
from tinkex_py.losses.arguments import (
    checked_count,
    checked_data,
    checked_flag,
    checked_specs,
    checked_step,
    checked_timeout,
)
from tinkex_py.losses.combine import COMBINES, Combine, summed, without_conflicts
from tinkex_py.losses.executor import SMALL_LOGPROBS, TermRun
from tinkex_py.losses.grad_mode import with_grad_on_while_suspended
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.output import BaseLossOutput, CustomLossOutput
from tinkex_py.losses.recording import RecordPath, start_recording
from tinkex_py.losses.report import diagnosis_measurements, part_of, report, total
from tinkex_py.losses.spec import RegularizerSpec, Term, why_not_a_term
from tinkex_py.losses.terms import Outcome, PreparedTerm, prepare_base_loss, prepare_regularizer
from tinkex_py.losses.threads import TermThreads, run_released
from tinkex_py.losses.weights import WeightController
from tinkex_py.types import Datum

if TYPE_CHECKING:
    from tinkex_py.losses.tinker_loss import TinkerLoss

OPTIONS = ("track_grad_norms", "parallel", "timeout", "max_concurrency", "max_threads", "combine")

Result = TypeVar("Result")


@dataclass(frozen=True)
class CustomLoss:
    """A composed loss with its gradient.

    Attributes:
        output: what the user sees.
        gradient: d(loss_total)/d(logprobs), laid out like the logprobs' buffer.
        differentiable: False if no term at all depends on the logprobs.
    """

    output: CustomLossOutput
    gradient: torch.Tensor
    differentiable: bool


class Pipeline:
    """A base loss and weighted regularizers, evaluated together. Reusable; calls may overlap.

    Args:
        base_loss: a term: `(data, logprobs)` -> loss or `(loss, metrics)`; sync, async or an object.
        regularizers: specs with unique names.
        track_grad_norms: compute the L2 norm of every term's gradient and of the total.
        parallel: False runs one term after another, the base loss first, then in spec order.
        timeout: seconds per term, the base loss included; a spec's own timeout wins. None is no limit.
        max_concurrency: terms in flight at once.
        max_threads: sync terms in threads at once; None is the usable CPU count. Live term threads never exceed
            `min(max_threads, max_concurrency)`, abandoned ones included.
        combine: "sum" sends the gradient of `loss_total`; "pcgrad" first frees every term's weighted gradient of what
            points against another term's (Yu et al. 2020), so that what is sent is the gradient of no single loss.

    Raises:
        InvalidBaseLoss: the base loss cannot be called.
        InvalidSpec: an element of `regularizers` is no RegularizerSpec.
        DuplicateRegularizerNames: two enabled or disabled specs share a name.
        PipelineError: an option is out of range.
    """

    def __init__(
        self,
        base_loss: Term,
        regularizers: Sequence[RegularizerSpec] = (),
        *,
        track_grad_norms: bool = False,
        parallel: bool = True,
        timeout: float | None = 30.0,
        max_concurrency: int = 32,
        max_threads: int | None = None,
        combine: Combine = "sum",
    ) -> None:
        problem = why_not_a_term(base_loss, {})
        if problem is not None:
            raise InvalidBaseLoss(f"base loss: {problem}")
        self.base_loss = base_loss
        self.regularizers = checked_specs(regularizers)
        self.track_grad_norms = checked_flag("track_grad_norms", track_grad_norms)
        self.parallel = checked_flag("parallel", parallel)
        self.timeout = checked_timeout(timeout)
        self.max_concurrency = checked_count("max_concurrency", max_concurrency)
        self.max_threads = None if max_threads is None else checked_count("max_threads", max_threads)
        if combine not in COMBINES:
            raise PipelineError(f"combine must be one of {', '.join(map(repr, COMBINES))}, got {combine!r}")
        self.combine: Combine = combine
        self._own_threads: TermThreads | None = None
        self._told_not_differentiable: set[str] = set()

    def _repr_html_(self) -> str:
        from tinkex_py.losses.notebook import pipeline_html

        return pipeline_html(self.base_loss, self.regularizers, {name: getattr(self, name) for name in OPTIONS})

    @property
    def controllers(self) -> list[WeightController]:
        """The controllers among the weights, each once, in spec order."""
        return [controller for _, controller in self._named_controllers()]

    def update_controllers(self, outputs: Sequence[CustomLossOutput]) -> None:
        """Tells the controllers among the weights that an optimizer step was made. A training client does it itself.

        Args:
            outputs: what this pipeline gave since the optimizer step before.
        """
        for controller in self.controllers:
            controller.update(outputs)

    def state_dict(self) -> dict[str, Any]:
        """The states of the controllers among the weights, as plain JSON values, by the first regularizer of each."""
        return {"controllers": {name: controller.state_dict() for name, controller in self._named_controllers()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` of a pipeline with the same specs was taken.

        Raises:
            InvalidSpec: the state belongs to other specs, or to none.
        """
        states = state.get("controllers") if isinstance(state, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        named = dict(self._named_controllers())
        if not isinstance(states, Mapping) or set(cast("Mapping[str, Any]", states)) != set(named):
            raise InvalidSpec(f"this pipeline has controllers for {sorted(named)}, the saved state is {state!r}")
        for name, controller in named.items():
            controller.load_state_dict(cast("Mapping[str, Any]", states)[name])

    def _named_controllers(self) -> list[tuple[str, WeightController]]:
        firsts: dict[WeightController, str] = {}
        for spec in self.regularizers:
            if isinstance(spec.weight, WeightController):
                firsts.setdefault(spec.weight, spec.name)
        return [(name, controller) for controller, name in firsts.items()]

    async def compute(
        self,
        data: Sequence[Datum],
        logprobs: torch.Tensor | Sequence[torch.Tensor],
        *,
        step: int = 0,
        record: RecordPath | None = None,
    ) -> CustomLossOutput:
        """Evaluates the loss on logprobs that are at hand.

        Args:
            data: the datums, handed to every term; may be empty.
            logprobs: one floating point tensor of any shape, or one tensor per datum. Never changed.
            step: optimizer steps made before, for weights that depend on it.
            record: a folder to write what the terms see to, for `replay`.

        Raises:
            RegularizerError: a term failed; its `name` says which.
            PipelineError: the logprobs cannot be used, or the record cannot be written.
            InvalidData: `data` is no list.
        """
        datums = checked_data(data)
        own = Logprobs.from_tensors(logprobs, datums=len(datums))
        return (await self.evaluate(datums, own, step=step, record=record)).output

    def as_tinker_loss(self, *, step: int = 0) -> "TinkerLoss":
        """This pipeline as a loss function of the official SDK, with the same gradient.

        `training_client.forward_backward_custom(data, pipeline.as_tinker_loss())` of the `tinker` package trains as
        `AsyncTrainingClient.forward_backward_custom(data, pipeline)` does.

        Args:
            step: optimizer steps made before, for weights that depend on it.
        """
        from tinkex_py.losses.tinker_loss import TinkerLoss

        return TinkerLoss(self, checked_step(step))

    async def evaluate(
        self,
        data: Sequence[Datum],
        logprobs: Logprobs,
        *,
        step: int = 0,
        workers: TermThreads | None = None,
        group: object = None,
        record: RecordPath | None = None,
    ) -> CustomLoss:
        """The loss and its gradient, as the training client needs them.

        Args:
            data: the datums, handed to every term.
            logprobs: the shared buffer.
            step: optimizer steps made before.
            threads: where sync terms run; default are this pipeline's own.
            thread_group: whose live term threads count against this pipeline's bounds; default is the pipeline.
            record: a folder to write what the terms see to.
        """
        run = TermRun(
            data,
            logprobs,
            workers or self._threads(),
            self.max_concurrency,
            self.track_grad_norms or any(controller.needs_grad_norms for controller in self.controllers),
            max_threads=self.max_threads,
            thread_group=group or self,
        )
        try:
            return await with_grad_on_while_suspended(self._observed(run, checked_step(step), record))
        finally:
            logprobs.release_leaves()

    async def _observed(self, run: TermRun, step: int, record: RecordPath | None) -> CustomLoss:
        specs = [spec for spec in self.regularizers if spec.enabled]
        metadata = {"regularizer_count": len(specs), "track_grad_norms": self.track_grad_norms}
        with telemetry.lifecycle("tinkex.custom_loss", metadata) as measurements:
            loss = await self._recorded(run, specs, step, record)
            measurements["loss_total"] = loss.output.loss_total
            measurements["regularizer_total"] = loss.output.regularizer_total
            measurements.update(diagnosis_measurements(loss.output))
            return loss

    async def _recorded(
        self, run: TermRun, specs: Sequence[RegularizerSpec], step: int, record: RecordPath | None
    ) -> CustomLoss:
        regularizers = [prepare_regularizer(spec, self.timeout, step=step) for spec in specs]
        if record is None:
            return await self._evaluate(run, regularizers, step)

        async def off_the_loop(work: Callable[[], Result]) -> Result:
            return await run_released(run.threads.arithmetic, "record", work)

        weighted = [(spec, term.weight or 0.0) for spec, term in zip(specs, regularizers, strict=True)]
        options = {name: getattr(self, name) for name in OPTIONS}
        recording = await off_the_loop(
            lambda: start_recording(
                record, run.data, run.logprobs, self.base_loss, weighted, step=step, options=options
            )
        )
        try:
            loss = await self._evaluate(run, regularizers, step)
        except PipelineError as error:
            failure = error
            await off_the_loop(lambda: recording.fail(failure))
            raise
        await off_the_loop(lambda: recording.end(loss.output))
        return loss

    async def _evaluate(self, run: TermRun, regularizers: Sequence[PreparedTerm], step: int) -> CustomLoss:
        terms = [self._prepared_base_loss, *regularizers]
        outcomes = await run.all(terms, parallel=self.parallel)
        self._tell_not_differentiable(outcomes)
        if run.logprobs.buffer.numel() <= SMALL_LOGPROBS:
            return self._compose(outcomes, run, step)
        return await run_released(run.threads.arithmetic, "sum", lambda: self._compose(outcomes, run, step))

    @functools.cached_property
    def _prepared_base_loss(self) -> PreparedTerm:
        return prepare_base_loss(self.base_loss, self.timeout)

    def _compose(self, outcomes: Sequence[Outcome], run: TermRun, step: int) -> CustomLoss:
        run.logprobs.check_unchanged()
        base = outcomes[0].evaluation
        assert base is not None, "a base loss that failed has raised"
        done = [(outcome.term, outcome.evaluation) for outcome in outcomes if outcome.evaluation is not None]
        parts = [part_of(term, evaluation) for term, evaluation in done]
        with torch.inference_mode(False), torch.no_grad():
            if self.combine == "pcgrad":
                combined = without_conflicts(parts, run.logprobs.buffer, step=step)
            else:
                combined = summed(parts, run.logprobs.buffer, diagnose=run.track_grad_norms, spread=run.threads.spread)
            if combined.norm is None or not math.isfinite(combined.norm):  # NaN and infinity survive in a norm
                gradients.check_finite(combined.gradient, "loss_total")
        regularizers = {term.name: report(term, result) for term, result in done[1:]}
        contributions = [output.contribution for output in regularizers.values()]
        output = CustomLossOutput(
            loss_total=total([base.value, *contributions]),
            base_loss=BaseLossOutput(value=base.value, metrics=base.metrics, grad_norm=base.grad_norm),
            regularizers=regularizers,
            regularizer_total=total(contributions),
            total_grad_norm=combined.norm if run.track_grad_norms else None,
            diagnosis=combined.diagnosis if run.track_grad_norms else {},
            skipped={
                outcome.term.name: telemetry.failure_reason(outcome.error) for outcome in outcomes if outcome.error
            },
            abandoned_threads=len(run.threads.abandoned()),
        )
        return CustomLoss(output, combined.gradient, differentiable=any(result.differentiable for _, result in done))

    def _tell_not_differentiable(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            name = outcome.term.name
            if outcome.evaluation is None or outcome.evaluation.differentiable or name in self._told_not_differentiable:
                continue
            self._told_not_differentiable.add(name)
            telemetry.emit("tinkex.regularizer.not_differentiable", {}, {"regularizer_name": name})

    def _threads(self) -> TermThreads:
        if self._own_threads is None:
            self._own_threads = TermThreads(self.max_threads)
        return self._own_threads
