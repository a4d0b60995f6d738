"""`tinkex-py replay`."""

from pathlib import Path
from typing import Annotated

import typer

from tinkex_py.commands.common.options import AsJson
from tinkex_py.commands.common.outcomes import told_in_one_line
from tinkex_py.commands.common.running import run


def replay(
    record: Annotated[Path, typer.Argument(help="folder that record= wrote")],
    pipeline: Annotated[
        str | None,
        typer.Option(help="MODULE:NAME of the Pipeline, or of a function that makes it; needed for terms of your own"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recorded step again, offline, and compare."""
    with told_in_one_line("replay", extra="replay"):
        from tinkex_py.commands.work.replaying import loaded_pipeline, replayed, show

        made = None if pipeline is None else loaded_pipeline(pipeline)
        result = run(replayed(record, made))
        if as_json:
            typer.echo(result.model_dump_json())
        else:
            show(result)
