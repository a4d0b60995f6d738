"""`tinkex-py serve`."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from tinkex_py.commands.common.options import AsJson, Host, Port, announcement
from tinkex_py.commands.common.running import EMBEDDED_SERVICE, one_line_errors, run


def serve(
    model: Annotated[str, typer.Option(help="tiny, smollm2, or a local Hugging Face folder")] = "tiny",
    host: Host = "127.0.0.1",
    port: Port = 0,
    device: Annotated[str | None, typer.Option(help="torch device; default the best available")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="folder that keeps checkpoints, runs and sessions")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TINKEX_SERVE_API_KEY", help="the only key that clients may use")
    ] = None,
    custom_losses: Annotated[bool, typer.Option("--custom-losses", help="run losses that clients upload")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a model on this machine over the Tinker API, until a signal stops the server."""
    with one_line_errors("serve", extra="local", needs=(*EMBEDDED_SERVICE, "uvicorn")):
        from tinkex_py.local import LocalOptions, serve as serve_until_cancelled

        options = LocalOptions(
            model=model, device=device, state_dir=state_dir, api_key=api_key, custom_losses=custom_losses
        )
        with suppress(KeyboardInterrupt):
            run(serve_until_cancelled(options, host, port, on_listening=announcement("Listening on", as_json=as_json)))
