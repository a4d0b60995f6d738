"""`train`: starts a run, or resumes it."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue

from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.limits import running_loop
from tinkex_py.runs.accumulation import check_can_accumulate
from tinkex_py.runs.arguments import (
    check_arguments,
    check_lag,
    checked_config,
    checked_evaluate,
    checked_optimizer,
    checked_pipeline,
    checked_settings,
    is_async,
)
from tinkex_py.runs.batches import Batches, BatchReader
from tinkex_py.runs.folder import RunFolder
from tinkex_py.runs.plan import Evaluate, Model, Optimizer, Plan
from tinkex_py.runs.progress import ProgressView, chosen_view
from tinkex_py.runs.records import RunInfo, StepRecord
from tinkex_py.runs.rollouts import RolloutFunction, Rollouts, Source
from tinkex_py.runs.run import Run
from tinkex_py.runs.settings import TrainSettings
from tinkex_py.runs.sinks import MetricSink, Sinks
from tinkex_py.threads import FileThread

if TYPE_CHECKING:
    from tinkex_py.losses import Pipeline, Term


@dataclass(frozen=True)
class TrainedRun:
    """The result of `train`.

    Attributes:
        info: content of `run.json`.
        folder: the run's files; `read_steps` reads its steps.
        last: the last optimizer step; None if there was none.
        checkpoint: path of the last checkpoint on the service, which contains the model as it is now.
        training: the model's client, which the caller may continue to use.
    """

    info: RunInfo
    folder: Path
    last: StepRecord | None
    checkpoint: str
    training: AsyncTrainingClient

    @property
    def steps(self) -> int:
        """Number of optimizer steps made, those of earlier processes included."""
        return 0 if self.last is None else self.last.step

    def _repr_html_(self) -> str:
        from tinkex_py.html_table import html_facts
        from tinkex_py.losses.output import output_html

        last = None if self.last is None else output_html(self.last.losses[-1])
        done = {"steps": self.steps, "checkpoint": self.checkpoint}
        facts = {"folder": str(self.folder), "status": self.info.status, "reason": self.info.reason, **done}
        return html_facts(f"Run {self.info.name}", facts) + (last or "")


async def train(
    service: AsyncServiceClient,
    model: Model,
    batches: Source,
    pipeline: "Pipeline | Term | str",
    *,
    folder: Path | str,
    optimizer: Optimizer | None = None,
    settings: TrainSettings | Mapping[str, Any] | None = None,
    config: Mapping[str, JsonValue] | None = None,
    evaluate: Evaluate | None = None,
    sinks: Sequence[MetricSink] = (),
    stop: asyncio.Event | None = None,
    progress: bool | ProgressView = False,
    allow_changes: bool = False,
) -> TrainedRun:
    """Trains a model and records the run; an interrupted run resumes from its last checkpoint.

    One folder is one run. If it holds a run already, that run is resumed: model, optimizer, weight controllers and
    position in the data are those of the last checkpoint, and later steps are made again. A process that was killed
    at any moment and started again gives the same numbers as one that was not.

    Args:
        service: where the model is trained; it keeps the checkpoints.
        model: the training client of a new run, or a function that creates it, `async () -> AsyncTrainingClient`,
            which is not called where a run is resumed.
        batches: lists of datums, sync or async; or a function that is called with the number of batches to skip. With
            a plain iterator, the run cannot restart from its last checkpoint within the process. Or an async function
            that samples one batch with the model, `async (run: Rollout) -> list[Datum]`; then `settings.steps` ends the
            run, and the folder holds the datums that were sampled since the last checkpoint.
        pipeline: the loss; or a term or the name of a base loss, which becomes `Pipeline(term)`. Its weight controllers
            become those of the run.
        folder: the run's files.
        optimizer: of every step, or a function of the number of steps made before; default `AdamParams()`. A number is
            the learning rate of `AdamParams`.
        settings: of the run, also as a dict; default `TrainSettings()`.
        config: plain values that decide the numbers, such as the names of model and data; written to `run.json`. They
            must be the same when the run is resumed. `seed` becomes `RunInfo.seed`.
        evaluate: called as `evaluate(training, step)` between two steps; awaited if it is async, else in a worker
            thread. It returns numbers by name, and optionally texts, such as samples, by name or prompt. An async one
            has `pipeline.cancel_grace` seconds to end once the run is cancelled.
        sinks: further receivers of the numbers; called in threads.
        stop: once it is set, the run ends after the steps in flight, with a checkpoint. A batch that is awaited then
            is abandoned, and read again when the run is resumed.
        allow_changes: resumes a run although its settings, the code or captured values of its terms, or its data differ
            from what they were. The differences are written to `RunInfo.changes`.
        progress: True shows it in the terminal or notebook; or a custom view.

    Returns:
        The run, whatever its status is: "finished", or "stopped" by `stop` or `settings.early_stop`.

    Raises:
        ConfigError: the folder belongs to a run with other settings, terms or data, or to another process; or an
            argument is not valid. Nothing was changed, unless `evaluate` or a function `optimizer` returned something
            else. Also if the folder cannot be written, at any moment: the disk is full. The run can be resumed later.
        TinkexError: a step failed, and recovery was not possible. The run can be resumed later.
    """
    running_loop()
    check_arguments(service, model, batches, stop)
    files = FileThread("tinkex-run")
    function = cast("RolloutFunction", batches) if is_async(batches) else None
    receivers, view = Sinks(sinks), chosen_view(progress)
    loss, own = checked_pipeline(pipeline), RunFolder(folder)
    plan = Plan(
        service,
        model,
        loss,
        checked_optimizer(optimizer),
        checked_settings(settings),
        checked_config(config),
        checked_evaluate(evaluate, grace=loss.cancel_grace),
        allow_changes,
        function,
    )
    check_lag(plan.settings.lag, batches)
    rollouts = None
    if function is not None:
        rollouts = Rollouts(function, plan.seed, plan.settings, own, files, loss.cancel_grace)
    source = cast("Batches", batches) if rollouts is None else rollouts.stream
    reader = BatchReader(source, files, allow_changes=allow_changes)
    if plan.settings.accumulate > 1:
        check_can_accumulate(plan.pipeline)
    with own:
        async with files, receivers:
            run = Run(plan, own, files, reader, rollouts, receivers, view, stop or asyncio.Event())
            try:
                await run.execute()
            finally:
                await reader.aclose()
                if rollouts is not None:
                    await rollouts.cancel()
    assert run.state is not None
    return TrainedRun(run.info, own.path, run.last, run.state.checkpoints[-1].path, run.training)
