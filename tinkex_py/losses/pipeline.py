"""Composes a training loss: `loss_total = base_loss + sum(weight_i * regularizer_i)`."""

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch

from tinkex_py import telemetry
from tinkex_py.arguments import check_list, shown
from tinkex_py.errors import InvalidBaseLoss, InvalidSpec, PipelineError
from tinkex_py.html_table import html_table
from tinkex_py.limits import running_loop
from tinkex_py.losses.combiners import check_terms
from tinkex_py.losses.executor import SMALL_LOGPROBS, TermRun
from tinkex_py.losses.gradients import Combined, WeightedGradient, balanced, summed, without_conflicts
from tinkex_py.losses.known_gradient import with_known_gradient
from tinkex_py.losses.logprobs import Logprobs, checked_data
from tinkex_py.losses.options import DEFAULTS, Combine, PipelineOptions, checked_options, shows_options
from tinkex_py.losses.outcomes import (
    CustomLoss,
    Outcome,
    PreparedTerm,
    TermGradients,
    checked_step,
    custom_loss,
    diagnosis_measurements,
    prepare_base_loss,
    prepare_regularizer,
    weighted_gradients,
    with_weight_at,
)
from tinkex_py.losses.output import CustomLossOutput
from tinkex_py.losses.recording import RecordPath, start_recording
from tinkex_py.losses.spec import RegularizerSpec, Term, checked_specs, described_term, why_not_a_term
from tinkex_py.losses.torch_modes import with_grad_on_while_suspended
from tinkex_py.losses.weights import WeightController
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.types import Datum

if TYPE_CHECKING:
    from tinkex_py.losses.tinker_loss import TinkerLoss


class Pipeline:
    """A base loss and weighted regularizers that are evaluated together. It is reusable, and calls may overlap.

    Args:
        base_loss: a term: `(data, logprobs)` -> loss or `(loss, metrics)`; a sync or async function, or an object.
            Or the name of a ready-made base loss with its defaults, such as "ppo".
        regularizers: specs with unique names.
        **options: see `PipelineOptions`. Each option is also an attribute of the pipeline.

    Raises:
        InvalidBaseLoss: the base loss cannot be called, or has an unknown name.
        InvalidSpec: an element of `regularizers` is not a RegularizerSpec.
        DuplicateRegularizerNames: two enabled or disabled specs have the same name.
        PipelineError: an option is out of range.
        TypeError: an option does not exist.
    """

    @shows_options(PipelineOptions, DEFAULTS)
    def __init__(
        self, base_loss: Term | str, regularizers: Sequence[RegularizerSpec] = (), **options: Unpack[PipelineOptions]
    ) -> None:
        if isinstance(base_loss, str):
            base_loss = _named(base_loss)
        problem = why_not_a_term(base_loss, {})
        if problem is not None:
            raise InvalidBaseLoss(f"base_loss: {problem}")
        self._base_loss = base_loss
        self._regularizers = checked_specs(regularizers)
        checked = checked_options(options, of="Pipeline.__init__()") if options else DEFAULTS
        self.track_grad_norms: bool = checked["track_grad_norms"]
        self.parallel: bool = checked["parallel"]
        self.timeout: float | None = checked["timeout"]
        self.cancel_grace: float = checked["cancel_grace"]
        self.max_concurrency: int = checked["max_concurrency"]
        self.max_threads: int | None = checked["max_threads"]
        self.combine: Combine = checked["combine"]
        if self.combine not in ("sum", "pcgrad"):
            check_terms(self.combine, 1 + sum(spec.enabled for spec in self._regularizers))
        self._own_workers: WorkerPool | None = None
        self._warned: set[str] = set()

    @property
    def base_loss(self) -> Term:
        """The base loss."""
        return self._base_loss

    @property
    def regularizers(self) -> tuple[RegularizerSpec, ...]:
        """The regularizers, including disabled ones."""
        return self._regularizers

    @property
    def options(self) -> dict[str, Any]:
        """The current options by name."""
        return {name: getattr(self, name) for name in DEFAULTS}

    def to_json(self) -> str:
        """Returns the pipeline as text, which `from_json` reads: terms, weights, bounds, controllers and options.

        The form is that of the section `loss` of a configuration file. Settings that have their default are left out,
        and so is the state of controllers, which `state_dict` returns.

        Raises:
            InvalidSpec: a part is not data, such as a function, a term of your own or a tensor.
        """
        return json.dumps(_portable().form_of(self), indent=2, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "Pipeline":
        """Creates the pipeline that `to_json` wrote. Only ready-made terms can be named: nothing else is imported.

        Raises:
            InvalidSpec: the text is no JSON, or a name or a setting in it is invalid.
            PipelineError: an option is out of range.
        """
        return _portable().pipeline_from_json(text)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the objective: equal for equal terms, weights, bounds and combiner.

        Neither options that only limit the evaluation, such as timeouts, nor the state of controllers take part.

        Raises:
            InvalidSpec: as for `to_json`.
        """
        return _portable().fingerprint_of(self)

    def _repr_html_(self) -> str:
        facts: list[tuple[str, Mapping[str, object]]] = [("base loss", {"fn": described_term(self._base_loss)})]
        facts += [(spec.name, spec.facts()) for spec in self._regularizers]
        columns = list(dict.fromkeys(column for _, own in facts for column in own))
        rows = [(name, *(own.get(column) for column in columns)) for name, own in facts]
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return html_table("Pipeline", ("term", *columns), rows, below=options)

    @property
    def controllers(self) -> list[WeightController]:
        """The controllers among the weights, each once, in spec order."""
        return [controller for _, controller in self._named_controllers]

    def update_controllers(self, outputs: Sequence[CustomLossOutput]) -> None:
        """Updates the controllers among the weights after an optimizer step. A training client calls this itself.

        Args:
            outputs: outputs of this pipeline since the previous optimizer step.
        """
        check_list("outputs", outputs, CustomLossOutput)
        for controller in self.controllers:
            controller.update(outputs)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the controllers as plain JSON values, by the first regularizer that uses each."""
        return {"controllers": {name: controller.state_dict() for name, controller in self._named_controllers}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `state_dict` of a pipeline with the same specs returned.

        Raises:
            InvalidSpec: the state belongs to other specs.
        """
        states = state.get("controllers") if isinstance(state, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        named = dict(self._named_controllers)
        if not isinstance(states, Mapping) or set(cast("Mapping[str, Any]", states)) != set(named):
            raise InvalidSpec(
                f"the saved state must contain the controllers of the regularizers {sorted(named)}, got "
                f"{shown(state)}: load it into a pipeline with the same specs"
            )
        for name, controller in named.items():
            controller.load_state_dict(cast("Mapping[str, Any]", states)[name])

    @functools.cached_property
    def _named_controllers(self) -> list[tuple[str, WeightController]]:
        firsts: dict[WeightController, str] = {}
        for spec in self._regularizers:
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
        """Evaluates the loss on given logprobs.

        Args:
            data: the datums, passed to every term; may be empty.
            logprobs: one floating point tensor of any shape on any device, or one tensor per datum. They are not
                modified. A single tensor is treated as packed logprobs if the lengths of the datums add up to its
                first dimension.
            step: number of previous optimizer steps, for weights that depend on it.
            record: a folder to which the inputs of the terms are written, for `replay`.

        Raises:
            RegularizerError: a term failed; `name` is the name of the term.
            PipelineError: the logprobs are invalid, or the record cannot be written.
            InvalidData: `data` is not a list of datums.
        """
        data = checked_data(data)
        own = Logprobs.from_tensors(logprobs, data)
        return (await self.evaluate(data, own, step=step, record=record)).output

    async def loss(
        self,
        data: Sequence[Datum],
        logprobs: torch.Tensor | Sequence[torch.Tensor],
        *,
        step: int = 0,
        record: RecordPath | None = None,
    ) -> torch.Tensor:
        """Returns the loss as a tensor whose `backward()` continues through the graph of the logprobs.

        The terms are evaluated on a copy of the logprobs; `backward()` applies their combined gradient.

        Args:
            data: the datums, passed to every term; may be empty.
            logprobs: as for `compute`, usually with a graph.
            step: number of previous optimizer steps, for weights that depend on it.
            record: a folder to which the inputs of the terms are written, for `replay`.

        Returns:
            `loss_total`, 0-d, on the device of the logprobs, in their dtype or float32, whichever is wider. Its second
            derivative raises PipelineError.

        Raises:
            RegularizerError: a term failed; `name` is the name of the term.
            PipelineError: the logprobs are invalid, no term depends on them, or the record cannot be written.
            InvalidData: `data` is not a list of datums.
        """
        data = checked_data(data)
        own = Logprobs.from_tensors(logprobs, data)
        custom = await self.evaluate(data, own, step=step, record=record)
        custom.check_differentiable()
        if isinstance(logprobs, torch.Tensor):
            parts, gradients = [logprobs], [custom.gradient]
        else:
            parts, gradients = list(logprobs), own.views(custom.gradient, data)
        dtype = torch.promote_types(custom.gradient.dtype, torch.float32)
        return with_known_gradient(custom.output.loss_total, dtype, parts, gradients)

    def as_tinker_loss(self, *, step: int = 0) -> "TinkerLoss":
        """Returns this pipeline as a loss function of the official SDK, with the same gradient.

        `training_client.forward_backward_custom(data, pipeline.as_tinker_loss())` of the `tinker` package is
        equivalent to `AsyncTrainingClient.forward_backward_custom(data, pipeline)`.

        Args:
            step: number of previous optimizer steps, for weights that depend on it.
        """
        from tinkex_py.losses.tinker_loss import TinkerLoss

        return TinkerLoss(functools.partial(self.evaluate, step=checked_step(step)))

    async def evaluate(
        self,
        data: Sequence[Datum],
        logprobs: Logprobs,
        *,
        step: int = 0,
        workers: WorkerPool | None = None,
        group: object = None,
        record: RecordPath | None = None,
        keep_gradients: bool = False,
    ) -> CustomLoss:
        """Returns the loss and its gradient for the training client; see `compute`.

        Calls of the same `group` share the limits on live term threads; default is the pipeline. With `keep_gradients`,
        the result has the gradient of every term.
        """
        running_loop()
        run = TermRun(
            data,
            logprobs,
            self._workers() if workers is None else workers,
            self.max_concurrency,
            keep_gradients
            or self.track_grad_norms
            or any(controller.needs_grad_norms for _, controller in self._named_controllers),
            timeout=self.timeout,
            max_threads=self.max_threads,
            group=self if group is None else group,
            cancel_grace=self.cancel_grace,
            keep_gradients=keep_gradients,
        )
        try:
            return await with_grad_on_while_suspended(self._observed(run, checked_step(step), record))
        finally:
            logprobs.release_leaves()

    async def _observed(self, run: TermRun, step: int, record: RecordPath | None) -> CustomLoss:
        base, *regularizers = self._prepared
        enabled = [(spec, term) for spec, term in zip(self._regularizers, regularizers, strict=True) if spec.enabled]
        metadata = {"regularizer_count": len(enabled), "track_grad_norms": self.track_grad_norms}
        with telemetry.lifecycle("tinkex.custom_loss", metadata) as measurements:
            weighted = [with_weight_at(step, term, spec) for spec, term in enabled]
            if record is None:
                loss = await self._evaluated(run, [base, *weighted], step)
            else:
                loss = await self._recorded(run, [base, *weighted], [spec for spec, _ in enabled], step, record)
            measurements["loss_total"] = loss.output.loss_total
            measurements["regularizer_total"] = loss.output.regularizer_total
            measurements.update(diagnosis_measurements(loss.output))
            return loss

    @functools.cached_property
    def _prepared(self) -> list[PreparedTerm]:
        return [prepare_base_loss(self._base_loss), *(prepare_regularizer(spec) for spec in self._regularizers)]

    async def _recorded(
        self,
        run: TermRun,
        terms: Sequence[PreparedTerm],
        specs: Sequence[RegularizerSpec],
        step: int,
        record: RecordPath,
    ) -> CustomLoss:
        write = functools.partial(run.workers.compute, "record")
        weights = [term.weight or 0.0 for term in terms[1:]]
        weighted = list(zip(specs, weights, strict=True))
        recording = await write(
            lambda: start_recording(
                record, run.data, run.logprobs, self._base_loss, weighted, step=step, options=self.options
            )
        )
        try:
            loss = await self._evaluated(run, terms, step)
        except PipelineError as error:
            failure = error
            await write(lambda: recording.fail(failure))
            raise
        await write(lambda: recording.end(loss.output))
        return loss

    async def _evaluated(self, run: TermRun, terms: Sequence[PreparedTerm], step: int) -> CustomLoss:
        outcomes = await run.all(terms, parallel=self.parallel)
        self._warn_not_differentiable(outcomes)
        parts = weighted_gradients(outcomes)
        combined = await self._combined(run, parts, step)
        return custom_loss(
            outcomes,
            combined,
            track_grad_norms=run.track_grad_norms,
            abandoned_threads=len(run.workers.abandoned()),
            terms=TermGradients.of(parts, combined) if run.keep_gradients else None,
        )

    async def _combined(self, run: TermRun, parts: Sequence[WeightedGradient], step: int) -> Combined:
        buffer = run.logprobs.buffer

        def combine() -> Combined:
            run.logprobs.check_unchanged()
            if self.combine == "sum":
                return summed(parts, buffer, diagnose=run.track_grad_norms)
            if self.combine == "pcgrad":
                return without_conflicts(parts, buffer, step=step)
            return balanced(parts, buffer, self.combine)

        return combine() if buffer.numel() <= SMALL_LOGPROBS else await run.workers.compute("sum", combine)

    def _warn_not_differentiable(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            name = outcome.term.name
            if outcome.evaluation is None or outcome.evaluation.differentiable or name in self._warned:
                continue
            self._warned.add(name)
            telemetry.emit("tinkex.regularizer.not_differentiable", {}, {"regularizer_name": name})

    def _workers(self) -> WorkerPool:
        if self._own_workers is None:
            self._own_workers = WorkerPool(self.max_threads)
        return self._own_workers


def _named(name: str) -> Term:
    """Returns a ready-made base loss; they are in a package above this one, which is loaded only for a name."""
    return importlib.import_module("tinkex_py.base_losses.named").base_loss_named(name)


def _portable() -> ModuleType:
    """Returns the module that reads and writes pipelines; it is above this package, like the ready-made terms."""
    return importlib.import_module("tinkex_py.portable")
