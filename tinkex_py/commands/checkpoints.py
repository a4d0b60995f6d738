"""`tinkex-py checkpoints`: list, download, delete, ttl."""

import json
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinkex_py.commands.common.options import AsJson, BaseUrl, Limit, service_at
from tinkex_py.commands.common.outcomes import INTERRUPTED, told_in_one_line
from tinkex_py.commands.common.running import run
from tinkex_py.errors import InvalidData

if TYPE_CHECKING:
    from tinkex_py.types.rest import Checkpoint

checkpoints = typer.Typer(no_args_is_help=True, help="Look through, download and delete checkpoints.")

CheckpointArgument = Annotated[str, typer.Argument(metavar="PATH", help="tinker://RUN/KIND/NAME")]


@checkpoints.command("list")
def list_checkpoints(
    run_id: Annotated[
        str | None, typer.Option("--run", help="only those of this run: its id, or a checkpoint's path")
    ] = None,
    limit: Limit = 20,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """List checkpoints, newest first."""
    with told_in_one_line("checkpoints list"):
        run(_listed(run_id, limit=limit, base_url=base_url, as_json=as_json))


@checkpoints.command()
def download(
    path: CheckpointArgument,
    folder: Annotated[
        Path | None, typer.Argument(help="new or empty folder; the checkpoint's name by default", show_default=False)
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="as a LoRA adapter that peft loads")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an adapter that is there")] = False,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Download a checkpoint's files into a folder. Called again, it goes on where it broke off."""
    with told_in_one_line("checkpoints download", extra="huggingface"):
        if overwrite and not adapter:
            raise InvalidData("--overwrite goes with --adapter: a checkpoint is downloaded into a new or empty folder")
        run(_downloaded(path, folder, adapter=adapter, overwrite=overwrite, base_url=base_url, as_json=as_json))


@checkpoints.command()
def delete(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="tinker://RUN/KIND/NAME", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints for good. Asks before, unless --yes is given."""
    with told_in_one_line("checkpoints delete"):
        checked = _checked(paths)
        if not yes:
            _ask(checked)
        run(_deleted(checked, base_url=base_url, as_json=as_json))


@checkpoints.command()
def ttl(
    path: CheckpointArgument,
    seconds: Annotated[
        int | None, typer.Argument(min=1, help="seconds from now until it is deleted", show_default=False)
    ] = None,
    never: Annotated[bool, typer.Option("--never", help="let it live for ever")] = False,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Set when a checkpoint expires."""
    with told_in_one_line("checkpoints ttl"):
        if (seconds is None) != never:
            raise InvalidData("give either SECONDS or --never")
        run(_expiring(path, seconds, base_url=base_url, as_json=as_json))


async def _listed(run_id: str | None, *, limit: int, base_url: str | None, as_json: bool) -> None:
    from tinkex_py.commands.common.listing import PAGE_SIZE, show_listing

    async with aclosing(service_at(base_url)) as service:
        await show_listing(
            service.create_rest_client().checkpoints(run_id, page_size=PAGE_SIZE),
            ("path", "type", "saved", "size", "expires", "shared"),
            _row,
            limit=limit,
            as_json=as_json,
            nothing="no checkpoints",
        )


def _row(item: "Checkpoint") -> Sequence[object]:
    from tinkex_py.commands.common.tables import size_text

    shared = "public" if item.public else None
    return item.tinker_path, item.checkpoint_type, item.time, size_text(item.size_bytes), item.expires_at, shared


async def _downloaded(
    path: str, folder: Path | None, *, adapter: bool, overwrite: bool, base_url: str | None, as_json: bool
) -> None:
    from tinkex_py.commands.work.download_progress import download_progress
    from tinkex_py.types import CheckpointPath

    target = folder or Path(CheckpointPath.parse(path).name)
    async with aclosing(service_at(base_url)) as service:
        rest = service.create_rest_client()
        with download_progress(path) as told:
            if adapter:
                from tinkex_py.integrations.huggingface import download_adapter

                made = await download_adapter(rest, path, target, overwrite=overwrite, on_progress=told)
            else:
                made = await rest.download_checkpoint(path, target, on_progress=told)
    made = made.absolute()
    files = sorted(file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file())
    typer.echo(json.dumps({"path": path, "folder": str(made), "files": files}) if as_json else f"{path} is in {made}")


async def _deleted(paths: Sequence[str], *, base_url: str | None, as_json: bool) -> None:
    async with aclosing(service_at(base_url)) as service:
        rest = service.create_rest_client()
        for path in paths:
            await rest.delete_checkpoint(path)
            typer.echo(json.dumps({"path": path, "deleted": True}) if as_json else f"deleted {path}")


async def _expiring(path: str, seconds: int | None, *, base_url: str | None, as_json: bool) -> None:
    async with aclosing(service_at(base_url)) as service:
        await service.create_rest_client().set_checkpoint_ttl(path, seconds)
    when = "never expires" if seconds is None else f"expires in {seconds} s"
    typer.echo(json.dumps({"path": path, "ttl_seconds": seconds}) if as_json else f"{path} {when}")


def _checked(paths: Sequence[str]) -> list[str]:
    """The paths in their full form, each once; none is touched if one cannot be a path."""
    from tinkex_py.types import CheckpointPath

    return list(dict.fromkeys(str(CheckpointPath.parse(path)) for path in paths))


def _ask(paths: Sequence[str]) -> None:
    if not sys.stdin.isatty():
        raise InvalidData("there is no terminal to ask in; pass --yes to delete without a question")
    for path in paths:
        typer.echo(path, err=True)
    # typer.confirm writes to stdout too, which belongs to the result.
    typer.echo(f"Delete {len(paths)} checkpoint(s) for good? [y/N]: ", nl=False, err=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        typer.echo("nothing was deleted", err=True)
        raise typer.Exit(INTERRUPTED)
