"""Regularizers in programs of the official SDK: for one training client, or for all of a recipe."""

import functools
import importlib
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from tinkex_py.arguments import check_count, check_path
from tinkex_py.base_losses.named import service_loss
from tinkex_py.errors import ConfigError, InvalidBaseLoss
from tinkex_py.integrations.recipe_record import EndedStep, RecipeRecord, recorded
from tinkex_py.losses import Pipeline, RegularizerSpec, per_datum
from tinkex_py.losses.options import PipelineOptions
from tinkex_py.losses.spec import Term, checked_specs
from tinkex_py.losses.tinker_loss import TinkerLoss

__all__ = ["regularize_recipe", "regularized"]

OfficialLoss = Callable[[Sequence[Any], Sequence[Any]], tuple[Any, dict[str, float]]]
_PATCHED = ("forward_backward", "forward_backward_custom", "optim_step")


@dataclass
class _Step:
    """The losses of one optimizer step of the official client."""

    number: int
    started_at: float = 0.0
    losses: list[tuple[Pipeline, TinkerLoss]] = field(default_factory=list[tuple[Pipeline, TinkerLoss]])


class _Composition:
    """Composes the losses of one training client, and counts its optimizer steps.

    Requests may be sent before earlier ones end, so a loss is evaluated long after its call. The service executes them
    in order: when the loss of a step is evaluated, those of all earlier steps have been, and the controllers can move.
    """

    def __init__(
        self,
        specs: Sequence[RegularizerSpec],
        base_loss: Term | str | None,
        step: int,
        options: PipelineOptions,
        record: RecipeRecord | None = None,
    ) -> None:
        self._specs = specs
        self._base_loss = base_loss
        self._options = options
        self.record = record
        self._pipelines: dict[object, Pipeline] = {}
        self._lock = threading.Lock()
        self._current = _Step(step)
        self._ended: list[_Step] = []

    def named(self, loss_fn: str, config: Mapping[str, Any] | None) -> OfficialLoss:
        """Returns the composed loss for a loss of the service."""
        settings = {} if config is None else dict(config)
        key = None if self._base_loss is not None else (loss_fn, tuple(sorted(settings.items())))
        if key not in self._pipelines:
            base = service_loss(loss_fn, settings) if self._base_loss is None else self._base_loss
            self._pipelines[key] = Pipeline(base, self._specs, **self._options)
        return self._in_order(self._pipelines[key])

    def custom(self, data: Sequence[Any], loss_fn: object) -> OfficialLoss:
        """Returns the composed loss for a loss function of the official convention, which gets its own datums."""
        if not callable(loss_fn):
            raise InvalidBaseLoss(
                f"regularizers need a loss function, got a {type(loss_fn).__name__}: pass the function itself"
            )

        def base(_data: Sequence[Any], logprobs_list: Sequence[Any]) -> Any:
            return loss_fn(data, logprobs_list)

        composed = self._in_order(Pipeline(per_datum(base), self._specs, **self._options))

        def with_own_metrics(data: Sequence[Any], logprobs_list: Sequence[Any]) -> tuple[Any, dict[str, float]]:
            loss, metrics = composed(data, logprobs_list)
            own = {
                name.removeprefix("base_loss."): value for name, value in metrics.items() if name[:10] == "base_loss."
            }
            return loss, {**own, **metrics}

        return with_own_metrics

    def end_step(self) -> _Step:
        """Counts an optimizer step, behind the losses that were composed so far, and returns it."""
        with self._lock:
            ended = self._current
            self._ended.append(ended)
            self._current = _Step(ended.number + 1)
        return ended

    def settle(self, before: int | None = None) -> None:
        """Moves the controllers by the ended steps; `before` excludes the steps from a number on."""
        with self._lock:
            while self._ended and (before is None or self._ended[0].number < before):
                losses = self._ended.pop(0).losses
                outputs = [loss.output for _, loss in losses if loss.output is not None]
                if outputs:
                    losses[-1][0].update_controllers(outputs)

    def _in_order(self, pipeline: Pipeline) -> OfficialLoss:
        with self._lock:
            step, loss = self._current, pipeline.as_tinker_loss(step=self._current.number)
            if not step.losses:
                step.started_at = time.monotonic()
            step.losses.append((pipeline, loss))

        def evaluate(data: Sequence[Any], logprobs_list: Sequence[Any]) -> tuple[Any, dict[str, float]]:
            self.settle(before=step.number)
            return loss(data, logprobs_list)

        return evaluate


class _RegularizedTrainingClient:
    """A training client of the official SDK with regularizers; made by `regularized`.

    `forward_backward` and `forward_backward_custom` compose, `optim_step` ends a step, and everything else is that of
    the official client.
    """

    def __init__(self, training_client: Any, composition: _Composition) -> None:
        self._client = training_client
        self._composition = composition

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def forward_backward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Any:
        """As in the official SDK; the loss is computed in this process."""
        return self._client.forward_backward_custom(data, self._composition.named(loss_fn, loss_fn_config))

    async def forward_backward_async(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Any:
        """As in the official SDK; returns its future."""
        return self.forward_backward(data, loss_fn, loss_fn_config)

    def forward_backward_custom(self, data: Sequence[Any], loss_fn: object, **options: Any) -> Any:
        """As in the official SDK; the regularizers are added to the loss function."""
        return self._client.forward_backward_custom(data, self._composition.custom(data, loss_fn), **options)

    async def forward_backward_custom_async(self, data: Sequence[Any], loss_fn: object, **options: Any) -> Any:
        """As in the official SDK; returns its future."""
        return self.forward_backward_custom(data, loss_fn, **options)

    def optim_step(self, *args: Any, **options: Any) -> Any:
        """As in the official SDK; schedules and controllers count it."""
        future = self._client.optim_step(*args, **options)
        self._composition.end_step()
        return future

    async def optim_step_async(self, *args: Any, **options: Any) -> Any:
        """As in the official SDK; returns its future."""
        return self.optim_step(*args, **options)


def regularized(
    training_client: Any,
    regularizers: Sequence[RegularizerSpec],
    *,
    base_loss: Term | str | None = None,
    step: int = 0,
    **options: Unpack[PipelineOptions],
) -> Any:
    """Adds regularizers to a training client of the official SDK.

    The loss of a call, such as "ppo", is computed here instead of on the service, plus the regularizers. Outputs have
    the official types; their metrics contain the flat metrics of the terms.

    Args:
        training_client: a `tinker.TrainingClient`.
        regularizers: specs with unique names. Without any, and without `base_loss`, the client itself is returned.
        base_loss: replaces the loss that `forward_backward` names. None: that loss.
        step: optimizer steps before this, for weights that depend on them.
        **options: see `PipelineOptions`.

    Raises:
        InvalidSpec: an element of `regularizers` is not a RegularizerSpec.
        InvalidData: `step` is negative.
    """
    specs, step = checked_specs(regularizers), check_count("step", step, least=0)
    if not specs and base_loss is None:
        return training_client
    return _RegularizedTrainingClient(training_client, _Composition(specs, base_loss, step, options))


@contextmanager
def regularize_recipe(
    regularizers: Sequence[RegularizerSpec],
    *,
    base_loss: Term | str | None = None,
    step: int = 0,
    record: Path | str | None = None,
    **options: Unpack[PipelineOptions],
) -> Generator[None]:
    """Adds regularizers to all training clients of the official SDK in this process, until the block ends.

    The recipe needs no change. Each training client counts its own steps; controllers are shared. Without regularizers,
    `base_loss` and `record`, nothing changes.

    Args:
        regularizers: as in `regularized`.
        base_loss: as in `regularized`.
        step: as in `regularized`.
        record: folder for `run.json` and `steps.jsonl`, as `train` writes them. If several clients train, the second
            gets `FOLDER-2`, and so on. With `step`, a folder that holds these steps is continued behind them. If an
            error ends the block, the status is "failed", or "stopped" if it was cancelled. A folder that can no longer
            be written does not interrupt the recipe.
        **options: as in `regularized`.

    Raises:
        ConfigError: the official SDK is not installed; `record` holds another run, or cannot be written. At the end of
            the block: not all steps could be recorded.
        InvalidSpec: an element of `regularizers` is not a RegularizerSpec.
    """
    specs, step = checked_specs(regularizers), check_count("step", step, least=0)
    if not specs and base_loss is None and record is None:
        yield
        return
    try:
        cls: Any = importlib.import_module("tinker").TrainingClient
    except ModuleNotFoundError as error:
        raise ConfigError("regularize_recipe needs the official SDK: pip install tinker") from error
    with ExitStack() as stack:
        records = None if record is None else _Records(check_path("record", record, error=ConfigError), step, stack)
        with _composed_in(cls, lambda: _Composition(specs, base_loss, step, options, records and records.next())):
            yield


class _Records:
    """The folders of the training clients of a recipe; the first is opened at once, to find out that it can be."""

    def __init__(self, path: Path, step: int, stack: ExitStack) -> None:
        self._path, self._step, self._stack = path, step, stack
        self._unused: RecipeRecord | None = stack.enter_context(recorded(path, step))
        self._opened = 1

    def next(self) -> RecipeRecord:
        """Returns the record of the next training client."""
        record, self._unused = self._unused, None
        if record is None:
            self._opened += 1
            further = self._path.with_name(f"{self._path.name}-{self._opened}")
            record = self._stack.enter_context(recorded(further, self._step))
        return record


def _ended_step(step: _Step, client: Any, params: Any, future: Any) -> EndedStep:
    return EndedStep(
        number=step.number + 1,
        model=client.get_info().model_data.model_name,
        losses=step.losses,
        started_at=step.started_at,
        learning_rate=getattr(params, "learning_rate", None),
        update=future.future(),
    )


@contextmanager
def _composed_in(cls: Any, new_composition: Callable[[], _Composition]) -> Generator[None]:
    """Replaces the methods of the official training client until the block ends."""
    originals = {name: getattr(cls, name) for name in _PATCHED}
    made: list[_Composition] = []
    compositions: weakref.WeakKeyDictionary[Any, _Composition] = weakref.WeakKeyDictionary()

    def composition_of(client: Any) -> _Composition:
        if client not in compositions:
            compositions[client] = new_composition()
            made.append(compositions[client])
        return compositions[client]

    @functools.wraps(originals["forward_backward"])
    def forward_backward(client: Any, data: Any, loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None) -> Any:
        composed = composition_of(client).named(loss_fn, loss_fn_config)
        return originals["forward_backward_custom"](client, data, composed)

    @functools.wraps(originals["forward_backward_custom"])
    def forward_backward_custom(client: Any, data: Any, loss_fn: object, **given: Any) -> Any:
        composed = composition_of(client).custom(data, loss_fn)
        return originals["forward_backward_custom"](client, data, composed, **given)

    @functools.wraps(originals["optim_step"])
    def optim_step(client: Any, *args: Any, **given: Any) -> Any:
        future = originals["optim_step"](client, *args, **given)
        composition = composition_of(client)
        ended = composition.end_step()
        if composition.record is not None:
            params = next((value for value in (*args, *given.values()) if value is not None), None)
            composition.record.add(_ended_step(ended, client, params, future))
        return future

    replaced = {function.__name__: function for function in (forward_backward, forward_backward_custom, optim_step)}
    try:
        for name, function in replaced.items():
            setattr(cls, name, function)
        yield
    finally:
        for name, original in originals.items():
            setattr(cls, name, original)
        for composition in made:  # those of collected clients too
            composition.settle()
