"""A LoRA checkpoint as a folder that peft loads."""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinkex_py.client.archive import extract
from tinkex_py.client.rest import AsyncRestClient
from tinkex_py.errors import InvalidData
from tinkex_py.integrations.huggingface.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_fits,
    read_adapter,
    write_adapter,
)
from tinkex_py.threads import FileThread
from tinkex_py.types.rest import DownloadProgress

AnyPath = str | os.PathLike[str]


def export_adapter(
    checkpoint: AnyPath,
    folder: AnyPath,
    *,
    base_model: str | None = None,
    network: Any = None,
    overwrite: bool = False,
) -> Path:
    """Makes a peft adapter of a downloaded checkpoint: `peft.PeftModel.from_pretrained(network, folder)` loads it.

    The folder appears when everything is in it, with `adapter_config.json` and `adapter_model.safetensors`; the
    optimizer's state stays behind. The numbers are the checkpoint's, bit for bit.

    Args:
        checkpoint: a folder that `download_checkpoint` made, or an archive of one.
        folder: where the adapter shall be; folders above it are made.
        base_model: name or path of the base model, for those who load the adapter by its folder alone; None keeps what
            the checkpoint says.
        network: the base model, if the adapter is to be checked against its layers.
        overwrite: whether an adapter that is there already is replaced. Anything else never is.

    Returns:
        The folder.

    Raises:
        InvalidData: the folder is in use, or the checkpoint is no plain LoRA adapter, or does not fit the network.
        InvalidResponse: the archive is damaged, or has a name that leads out of the folder.
        MissingExtra: peft is not installed.
        OSError: a file cannot be read or written.
    """
    source, target = Path(checkpoint), Path(folder)
    _check_target(target, overwrite=overwrite)
    if not source.exists():
        raise InvalidData(f"there is no checkpoint {str(source)!r}")
    with _workspace_beside(target) as workspace:
        if source.is_dir():
            files = source
        else:
            files = workspace / "checkpoint"
            extract(source, files, _never_ends_early)
        adapter = read_adapter(files, base_model)
        if network is not None:
            check_fits(adapter, network)
        made = workspace / "adapter"
        made.mkdir()
        write_adapter(adapter, made)
        _flush(made)
        _check_target(target, overwrite=overwrite)
        _move(made, target, workspace / "replaced")
    return target


async def download_adapter(
    rest: AsyncRestClient,
    path: str,
    folder: AnyPath,
    *,
    base_model: str | None = None,
    network: Any = None,
    overwrite: bool = False,
    on_progress: Callable[[DownloadProgress], object] | None = None,
) -> Path:
    """Downloads a checkpoint and makes a peft adapter of it.

    Args:
        rest: what `service.create_rest_client()` gives.
        path: `tinker://{training run}/{kind}/{name}`.
        folder: as in `export_adapter`.
        base_model: as in `export_adapter`; None is what the service says of the checkpoint.
        network: as in `export_adapter`.
        overwrite: as in `export_adapter`.
        on_progress: as in `AsyncRestClient.download_checkpoint`.

    Returns:
        The folder.

    Raises:
        TinkexError: as `export_adapter` and `AsyncRestClient.download_checkpoint` raise.
    """
    target = Path(folder)
    _check_target(target, overwrite=overwrite)
    base_model = base_model or (await rest.get_weights_info(path)).base_model
    async with FileThread() as files:
        workspace = await files.run(lambda: _made_beside(target))
        try:
            checkpoint = await rest.download_checkpoint(path, workspace / "checkpoint", on_progress=on_progress)
            return await files.run(
                lambda: export_adapter(checkpoint, target, base_model=base_model, network=network, overwrite=overwrite)
            )
        finally:
            await files.run(lambda: shutil.rmtree(workspace, ignore_errors=True))


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not target.name or target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InvalidData(f"{str(target)!r} is not a folder: choose another name for the adapter")
    there = {file.name for file in target.iterdir()} if target.is_dir() else set[str]()
    if there and not overwrite:
        raise InvalidData(f"the folder {str(target)!r} is not empty: choose another one, or pass overwrite=True")
    if there - {CONFIG_FILE, WEIGHTS_FILE}:
        raise InvalidData(f"the folder {str(target)!r} holds more than an adapter, so it is not replaced")


def _made_beside(target: Path) -> Path:
    """A hidden folder on the same disk, so that what is made in it can be moved in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))


@contextmanager
def _workspace_beside(target: Path) -> Generator[Path]:
    workspace = _made_beside(target)
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _move(made: Path, target: Path, replaced: Path) -> None:
    if target.is_dir():
        target.rename(replaced)
    try:
        made.rename(target)
    except OSError:
        if replaced.is_dir():
            replaced.rename(target)
        raise


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def _never_ends_early() -> None:
    return None
