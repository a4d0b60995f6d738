"""The command line: its commands, and nothing else."""

from typing import Annotated

from tinkex_py.errors import MissingExtra

try:
    import typer
except ImportError as error:
    raise MissingExtra(str(error.name), "cli") from error

from tinkex_py.commands.check import check
from tinkex_py.commands.checkpoints import checkpoints
from tinkex_py.commands.dashboard import dashboard
from tinkex_py.commands.demo import demo
from tinkex_py.commands.lint import lint
from tinkex_py.commands.replay import replay
from tinkex_py.commands.report import report
from tinkex_py.commands.runs import runs
from tinkex_py.commands.sample import sample
from tinkex_py.commands.serve import serve
from tinkex_py.commands.train import train
from tinkex_py.commands.version import version
from tinkex_py.version import __version__

__all__ = ["app"]

app = typer.Typer(name="tinkex-py", no_args_is_help=True, pretty_exceptions_enable=False)
for command in (check, demo, serve, train, lint, sample, runs, report, dashboard, replay, version):
    app.command()(command)
app.add_typer(checkpoints, name="checkpoints")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tinkex-py {__version__}")
        raise typer.Exit


@app.callback()
def tinkex_py(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Composable losses over the Tinker training API."""
