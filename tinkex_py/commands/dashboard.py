"""`tinkex-py dashboard`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tinkex_py.commands.common.addresses import announce_address
from tinkex_py.commands.common.options import AsJson, Host, Port
from tinkex_py.commands.common.outcomes import told_in_one_line
from tinkex_py.commands.common.running import run_until_signalled
from tinkex_py.integrations.extras import imported


def dashboard(
    runs_dir: Annotated[Path, typer.Argument(help="the folder that holds the runs' folders", show_default=False)],
    host: Host = "127.0.0.1",
    port: Port = 0,
    allow_other_machines: Annotated[
        bool, typer.Option("--allow-other-machines", help="permit a host that others can reach; no key is asked for")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Follow runs in the browser, while they train and afterwards, until a signal ends it."""
    with told_in_one_line("dashboard"):
        for library in ("fastapi.sse", "uvicorn"):
            imported(library, "dashboard")
        from tinkex_py.dashboard import serve_dashboard

        announce = partial(announce_address, "Dashboard on", as_json=as_json)
        run_until_signalled(
            serve_dashboard(runs_dir, host, port, allow_other_machines=allow_other_machines, on_listening=announce)
        )
