"""The command line: its commands, and nothing else."""

from tinkex_py.errors import MissingExtra

try:
    import typer
except ImportError as error:
    raise MissingExtra(str(error.name), "cli") from error

from tinkex_py.commands.check import check
from tinkex_py.commands.checkpoints import checkpoints
from tinkex_py.commands.dashboard import dashboard
from tinkex_py.commands.demo import demo
from tinkex_py.commands.replay import replay
from tinkex_py.commands.report import report
from tinkex_py.commands.runs import runs
from tinkex_py.commands.sample import sample
from tinkex_py.commands.serve import serve
from tinkex_py.commands.train import train
from tinkex_py.commands.version import version

__all__ = ["app"]

app = typer.Typer(name="tinkex-py", no_args_is_help=True, pretty_exceptions_enable=False)
for command in (check, demo, serve, train, sample, runs, report, dashboard, replay, version):
    app.command()(command)
app.add_typer(checkpoints, name="checkpoints")


@app.callback()
def tinkex_py() -> None:
    """Composable losses over the Tinker training API."""
