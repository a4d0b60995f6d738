"""`tinkex-py dashboard`."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from tinkex_py.commands.common.options import AsJson, Host, Port, announcement
from tinkex_py.commands.common.running import one_line_errors, run


def dashboard(
    runs_dir: Annotated[Path, typer.Argument(help="folder that contains the folders of the runs", show_default=False)],
    host: Host = "127.0.0.1",
    port: Port = 0,
    allow_other_machines: Annotated[
        bool,
        typer.Option(
            "--allow-other-machines", help="listen on an address that other machines can reach; there is no login"
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show runs in the browser, during and after training, until a signal stops the server."""
    with one_line_errors("dashboard", extra="dashboard", needs=("fastapi", "uvicorn")):
        from tinkex_py.dashboard import serve_dashboard

        announce = announcement("Dashboard on", as_json=as_json)
        with suppress(KeyboardInterrupt):
            run(serve_dashboard(runs_dir, host, port, allow_other_machines=allow_other_machines, on_listening=announce))
