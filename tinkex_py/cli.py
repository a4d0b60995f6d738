"""The command line. Every command is thin: it reads options and calls the library."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

from tinkex_py.errors import MissingExtra, RegularizerError, TinkexError

try:
    import typer
except ImportError as error:
    raise MissingExtra(str(error.name), "cli") from error

from tinkex_py.commands.check import check
from tinkex_py.commands.checkpoints import checkpoints
from tinkex_py.commands.runs import runs
from tinkex_py.commands.sample import sample
from tinkex_py.commands.version import version

__all__ = ["app"]

app = typer.Typer(name="tinkex-py", no_args_is_help=True, pretty_exceptions_enable=False)
for command in (check, sample, runs, version):
    app.command()(command)
app.add_typer(checkpoints, name="checkpoints")


@app.callback()
def tinkex_py() -> None:
    """Composable losses over the Tinker training API."""


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="tiny, smollm2, or a local Hugging Face folder")] = "tiny",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one")] = 0,
    device: Annotated[str | None, typer.Option(help="torch device; the best there is by default")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="keep checkpoints, runs and sessions in this folder")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TINKEX_SERVE_API_KEY", help="the only key that is accepted")
    ] = None,
    custom_losses: Annotated[bool, typer.Option("--custom-losses", help="let clients upload losses")] = False,
) -> None:
    """Serve a model on this machine with the Tinker protocol."""
    from tinkex_py.local import LocalOptions
    from tinkex_py.local.server import serve as serve_until_stopped

    try:
        options = LocalOptions(
            model=model, device=device, state_dir=state_dir, api_key=api_key, custom_losses=custom_losses
        )
        asyncio.run(_until_signalled(serve_until_stopped(options, host, port, on_listening=_announce)))
    except TinkexError as error:
        typer.echo(f"tinkex-py serve: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="smollm2, tiny, or a local Hugging Face folder")] = "smollm2",
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="datums per step")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="of AdamW")] = 5e-4,
    runs_dir: Annotated[Path, typer.Option(help="where the run's folder is made")] = Path("runs"),
    data: Annotated[Path | None, typer.Option(help="JSON Lines file of prompt and answer")] = None,
) -> None:
    """Fine-tune a real language model with a composed loss, and watch it."""
    try:
        from rich.console import Console

        from tinkex_py.demo import DemoOptions, run_demo
    except ModuleNotFoundError as error:
        typer.echo(f"tinkex-py demo: {MissingExtra(str(error.name), 'demo')}", err=True)
        raise typer.Exit(2) from None
    options = DemoOptions(
        model=model, steps=steps, batch_size=batch_size, learning_rate=learning_rate, runs_dir=runs_dir, data=data
    )
    try:
        asyncio.run(_until_signalled(_completed(run_demo(options, Console()))))
    except TinkexError as error:
        typer.echo(f"tinkex-py demo: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run")],
    model: Annotated[str | None, typer.Option(help="instead of the file's")] = None,
    runs_dir: Annotated[Path, typer.Option(help="where the run's folder is, or is made")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="of the run; the file's name by default")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print what the run came to as JSON")] = False,
) -> None:
    """Train as a file describes it; a run that was ended before goes on from its last checkpoint.

    Exit codes: 0 the run is finished (early stopping counts), 1 it failed, 2 something given cannot be used,
    3 it was stopped by a signal, with a checkpoint to go on from. A second signal ends it at once, without a new
    checkpoint, with 1.
    """
    try:
        from tinkex_py.train_command import run_train
    except ModuleNotFoundError as error:
        typer.echo(f"tinkex-py train: {MissingExtra(str(error.name), 'cli')}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(run_train(config, model=model, runs_dir=runs_dir, name=name, as_json=as_json))


@app.command()
def replay(
    record: Annotated[Path, typer.Argument(help="folder that record= wrote")],
    pipeline: Annotated[
        str | None,
        typer.Option(help="MODULE:NAME of the Pipeline, or of a function that makes it; needed for terms of your own"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run a recorded step again, offline, and compare."""
    try:
        from tinkex_py.replay_command import loaded_pipeline, replayed, show

        made = None if pipeline is None else loaded_pipeline(pipeline)
        result = asyncio.run(replayed(record, made))
    except RegularizerError as error:
        typer.echo(f"tinkex-py replay: the step fails: {error}", err=True)
        raise typer.Exit(1) from None
    except TinkexError as error:
        typer.echo(f"tinkex-py replay: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        show(result)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for the page and the pictures")] = Path("report"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Draw runs into one HTML page that needs nothing else, and PNGs."""
    from tinkex_py.report_command import report as write

    try:
        write(runs, out, as_json=as_json)
    except TinkexError as error:
        typer.echo(f"tinkex-py report: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def dashboard(
    runs_dir: Annotated[Path, typer.Argument(help="the folder that holds the runs' folders", show_default=False)],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one")] = 0,
    allow_other_machines: Annotated[
        bool, typer.Option("--allow-other-machines", help="permit a host that others can reach; no key is asked for")
    ] = False,
) -> None:
    """Follow runs in the browser, while they train and afterwards."""
    from tinkex_py.dashboard_command import dashboard as serve_until_stopped

    try:
        work = serve_until_stopped(
            runs_dir, host, port, allow_other_machines=allow_other_machines, on_listening=_announce_dashboard
        )
        asyncio.run(_until_signalled(work))
    except TinkexError as error:
        typer.echo(f"tinkex-py dashboard: {error}", err=True)
        raise typer.Exit(2) from None


async def _completed(work: Coroutine[Any, Any, object]) -> None:
    await work


def _announce(address: str) -> None:
    typer.echo(f"Listening on {address}")


def _announce_dashboard(address: str) -> None:
    typer.echo(f"Dashboard on {address}")


async def _until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """Run work; SIGINT and SIGTERM cancel it, and that counts as success."""
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Windows has no signal handlers on its loops; there Ctrl-C cancels this function itself.
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
