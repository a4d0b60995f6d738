"""What `tinkex-py replay` does: find the pipeline, run the record again, compare."""

from pathlib import Path

from pydantic import BaseModel
from rich.table import Table

from tinkex_py.commands.common.importing import named_object
from tinkex_py.commands.common.tables import console
from tinkex_py.errors import ConfigError
from tinkex_py.losses import CustomLossOutput, Pipeline, replay
from tinkex_py.losses.recording import read_record


class Replayed(BaseModel):
    """A replay beside its record.

    Attributes:
        recorded: what the step gave when it was recorded; None if it failed or never ended.
        failure: how it failed then.
        replayed: what it gives now.
        same: whether both agree in every number.
    """

    recorded: CustomLossOutput | None
    failure: str | None
    replayed: CustomLossOutput
    same: bool


def loaded_pipeline(reference: str) -> Pipeline:
    """The pipeline that `module:name` names; modules of the working folder are found too.

    Raises:
        ConfigError: there is none.
    """
    found = named_object(reference, "--pipeline")
    made = found() if callable(found) else found
    if not isinstance(made, Pipeline):
        raise ConfigError(f"--pipeline {reference} is a {type(made).__name__}, not a Pipeline")
    return made


async def replayed(path: Path, pipeline: Pipeline | None) -> Replayed:
    """Runs the record again.

    Raises:
        PipelineError: the record or the pipeline cannot be used.
        RegularizerError: a term failed.
    """
    record, _ = read_record(path)
    output = await replay(path, pipeline)
    failure = None if record.failure is None else record.failure.message
    return Replayed(recorded=record.output, failure=failure, replayed=output, same=output == record.output)


def show(result: Replayed) -> None:
    """Prints a table of the terms, then now."""
    out = console()
    table = Table(title="recorded and replayed")
    for title in ("term", "weight", "value then", "value now", "gradient norm then", "gradient norm now"):
        table.add_column(title, justify="left" if title == "term" else "right")
    then, now = result.recorded, result.replayed
    base_then = None if then is None else then.base_loss
    table.add_row(
        "base_loss",
        "",
        _number(base_then and base_then.value),
        _number(now.base_loss.value),
        _number(base_then and base_then.grad_norm),
        _number(now.base_loss.grad_norm),
    )
    for name, own in now.regularizers.items():
        before = None if then is None else then.regularizers.get(name)
        table.add_row(
            name,
            _number(own.weight),
            _number(before and before.value),
            _number(own.value),
            _number(before and before.grad_norm),
            _number(own.grad_norm),
        )
    table.add_row(
        "total",
        "",
        _number(then and then.loss_total),
        _number(now.loss_total),
        _number(then and then.total_grad_norm),
        _number(now.total_grad_norm),
    )
    out.print(table)
    if result.failure is not None:
        out.print(f"recorded failure: {result.failure}", markup=False)
    out.print("same in every number" if result.same else "not the same", markup=False)


def _number(value: object) -> str:
    return "" if value is None else f"{value:.6g}"
