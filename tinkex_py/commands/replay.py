"""`tinkex-py replay`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinkex_py.commands.common.options import AsJson
from tinkex_py.commands.common.printing import echo, echo_json, show_table
from tinkex_py.commands.common.running import one_line_errors, run
from tinkex_py.errors import ConfigError

if TYPE_CHECKING:
    from tinkex_py.losses import CustomLossOutput, Pipeline


def replay(
    record: Annotated[Path, typer.Argument(help="folder that a step with record= wrote")],
    pipeline: Annotated[
        str | None,
        typer.Option(help="MODULE:NAME of the Pipeline, or of a function that returns it; required for custom terms"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute a recorded step again, offline, and compare the numbers."""
    with one_line_errors("replay", extra="replay", needs=("safetensors",)):
        from tinkex_py import losses
        from tinkex_py.losses.recording import read_record

        loaded = None if pipeline is None else _loaded(pipeline)
        recorded, _ = read_record(record)
        now, then = run(losses.replay(record, loaded)), recorded.output
        failure = None if recorded.failure is None else recorded.failure.message
        if as_json:
            echo_json({"recorded": _fields(then), "failure": failure, "replayed": _fields(now), "same": now == then})
            return
        _show(then, now)
        if failure is not None:
            echo(f"recorded failure: {failure}")
        echo("all numbers are equal" if now == then else "the numbers differ")


def _loaded(reference: str) -> "Pipeline":
    from tinkex_py.losses import Pipeline
    from tinkex_py.runs.config import named_object

    found = named_object(reference, "--pipeline")
    made = found() if callable(found) else found
    if not isinstance(made, Pipeline):
        raise ConfigError(
            f"--pipeline must name a Pipeline or a function that returns one, got {reference}: a {type(made).__name__}"
        )
    return made


def _fields(output: "CustomLossOutput | None") -> object:
    return None if output is None else json.loads(output.model_dump_json())


def _show(then: "CustomLossOutput | None", now: "CustomLossOutput") -> None:
    before, after = _rows(then), _rows(now)
    columns = ("term", "weight", "recorded value", "replayed value", "recorded norm", "replayed norm")
    rows: list[list[str | None]] = []
    for term, (weight, value, norm) in after.items():
        _, old_value, old_norm = before.get(term, (None, None, None))
        rows.append([term, *map(_number, (weight, old_value, value, old_norm, norm))])
    show_table(columns, rows)


def _rows(output: "CustomLossOutput | None") -> dict[str, tuple[float | None, float | None, float | None]]:
    """Term -> weight, value and gradient norm."""
    if output is None:
        return {}
    terms = {name: (term.weight, term.value, term.grad_norm) for name, term in output.regularizers.items()}
    base, total = output.base_loss, output.total_grad_norm
    return {"base_loss": (None, base.value, base.grad_norm), **terms, "total": (None, output.loss_total, total)}


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"
