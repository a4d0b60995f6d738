"""`tinkex-py check`."""

from typing import Annotated

import typer

from tinkex_py.commands.common.options import AsJson, BaseUrl
from tinkex_py.commands.common.outcomes import FAILED, UNUSABLE, told_in_one_line
from tinkex_py.commands.common.running import run


def check(
    base_url: BaseUrl = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds that each question to the service may take")] = 15.0,
    as_json: AsJson = False,
) -> None:
    """Connect to a service and say what works, what it offers, and what to do where something fails.

    Nothing is trained or drawn, so nothing is billed.
    """
    with told_in_one_line("check"):
        from tinkex_py.commands.work.service_check import checked_service, show

        report = run(checked_service(base_url, timeout))
        if as_json:
            typer.echo(report.model_dump_json())
        else:
            show(report)
        if report.unusable:
            raise typer.Exit(UNUSABLE)
        if not report.works:
            raise typer.Exit(FAILED)
