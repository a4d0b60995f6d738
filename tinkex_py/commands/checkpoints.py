"""`tinkex-py checkpoints`: list, download, delete, ttl."""

import sys
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tinkex_py.commands.common.options import AsJson, BaseUrl, Limit, service_at
from tinkex_py.commands.common.printing import PAGE_SIZE, cell_text, echo, echo_json, show_listing, size_text
from tinkex_py.commands.common.running import INTERRUPTED, one_line_errors, run
from tinkex_py.errors import InvalidData, require_modules

if TYPE_CHECKING:
    from tinkex_py.client.rest import AsyncRestClient
    from tinkex_py.types.rest import Checkpoint, DownloadProgress

Result = TypeVar("Result")

checkpoints = typer.Typer(no_args_is_help=True, help="List, download and delete checkpoints.")

CheckpointArgument = Annotated[str, typer.Argument(metavar="PATH", help="tinker://RUN/KIND/NAME")]


@checkpoints.command("list")
def list_checkpoints(
    run_id: Annotated[
        str | None, typer.Option("--run", help="id of a run, or a path of one of its checkpoints")
    ] = None,
    limit: Limit = 20,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """List checkpoints, newest first."""

    async def listed(rest: "AsyncRestClient") -> None:
        columns = ("path", "type", "saved", "size", "expires", "shared")
        items = rest.checkpoints(run_id, page_size=PAGE_SIZE)
        await show_listing(items, columns, _row, limit=limit, as_json=as_json, nothing="no checkpoints")

    with one_line_errors("checkpoints list", needs=("rich",)):
        run(_with_rest(base_url, listed))


@checkpoints.command()
def download(
    path: CheckpointArgument,
    folder: Annotated[
        Path | None, typer.Argument(help="new or empty folder; default the checkpoint's name", show_default=False)
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="save a LoRA adapter that peft loads")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing adapter")] = False,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Download a checkpoint's files into a folder. A second call resumes an interrupted download."""

    async def downloaded(rest: "AsyncRestClient") -> Path:
        from tinkex_py.types import CheckpointPath

        target = folder or Path(CheckpointPath.parse(path).name)
        with _progress(path) as show:
            if not adapter:
                return await rest.download_checkpoint(path, target, on_progress=show)
            from tinkex_py.integrations.huggingface import download_adapter

            return await download_adapter(rest, path, target, overwrite=overwrite, on_progress=show)

    with one_line_errors("checkpoints download", needs=("rich",)):
        if overwrite and not adapter:
            raise InvalidData("--overwrite needs --adapter; without it, choose a new or empty folder")
        if adapter:
            require_modules("huggingface", "peft", "safetensors")
        made = run(_with_rest(base_url, downloaded)).absolute()
        files = sorted(file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file())
        result = {"path": path, "folder": str(made), "files": files}
        echo_json(result) if as_json else echo(f"downloaded {path} to {made}")


@checkpoints.command()
def delete(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="tinker://RUN/KIND/NAME", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="delete without asking")] = False,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints permanently. Asks first, unless --yes is given."""

    async def deleted(rest: "AsyncRestClient") -> None:
        for path in checked:
            await rest.delete_checkpoint(path)
            echo_json({"path": path, "deleted": True}) if as_json else echo(f"deleted {path}")

    with one_line_errors("checkpoints delete"):
        from tinkex_py.types import CheckpointPath

        # All paths are parsed before the first one is deleted.
        checked = list(dict.fromkeys(str(CheckpointPath.parse(path)) for path in paths))
        if not yes:
            _ask(checked)
        run(_with_rest(base_url, deleted))


@checkpoints.command()
def ttl(
    path: CheckpointArgument,
    seconds: Annotated[
        int | None, typer.Argument(min=1, help="seconds from now until it is deleted", show_default=False)
    ] = None,
    never: Annotated[bool, typer.Option("--never", help="never delete it")] = False,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Set when a checkpoint expires."""
    with one_line_errors("checkpoints ttl"):
        if (seconds is None) != never:
            raise InvalidData("give either SECONDS or --never, and not both")
        run(_with_rest(base_url, lambda rest: rest.set_checkpoint_ttl(path, seconds)))
        when = "never expires" if seconds is None else f"expires in {seconds} s"
        echo_json({"path": path, "ttl_seconds": seconds}) if as_json else echo(f"{path} {when}")


async def _with_rest(base_url: str | None, work: "Callable[[AsyncRestClient], Coroutine[Any, Any, Result]]") -> Result:
    async with aclosing(service_at(base_url)) as service:
        return await work(service.create_rest_client())


def _row(item: "Checkpoint") -> Sequence[object]:
    shared = "public" if item.public else None
    return item.tinker_path, item.checkpoint_type, item.time, size_text(item.size_bytes), item.expires_at, shared


@contextmanager
def _progress(title: str) -> "Generator[Callable[[DownloadProgress], None] | None]":
    """Shows a progress bar on stderr; yields None if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(cell_text(title), total=None)
        yield lambda state: progress.update(task, completed=state.received_bytes, total=state.total_bytes)


def _ask(paths: Sequence[str]) -> None:
    if not sys.stdin.isatty():
        raise InvalidData("stdin is not a terminal: pass --yes to delete without a question")
    for path in paths:
        echo(path, err=True)
    # typer.confirm would write to stdout, which is reserved for the result.
    echo(f"Delete {len(paths)} checkpoint(s) permanently? [y/N]: ", nl=False, err=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        echo("nothing was deleted", err=True)
        raise typer.Exit(INTERRUPTED)
