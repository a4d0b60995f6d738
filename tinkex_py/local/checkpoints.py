"""Checkpoints on disk: safetensors files in a folder of their own, found through the state file.

A checkpoint's folder is filled and flushed under a hidden name, gets its own name in one step, and only then enters
the state file. So a name always leads to a whole checkpoint, the old one or the new one, whenever the process dies;
what a dead process left half-done is removed when the folder is opened again.
"""

import contextlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.local.archives import write_archive
from tinkex_py.local.database import Database
from tinkex_py.local.records import CheckpointInfo, Kind, TrainingRunInfo

STATE_FILE = "state.sqlite3"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}(:train:\d{1,9})?")
_FOLDER = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.[0-9a-f]{32}")
_PATH = re.compile(r"tinker://([^/]+)/(weights|sampler_weights|external_weights)/([^/]+)")


class CheckpointStore:
    """All that the service keeps, under one root folder. Its methods may be called from any thread.

    Args:
        root: the folder; made if it is not there. What a service that died left half-done is removed.

    Raises:
        ConfigError: another service uses the folder, or its state file cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / "runs"
        self._archives = root / "archives"
        self._archiving = threading.Lock()
        self.on_expiry: Callable[[], None] = _nothing
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"state_dir {str(root)!r} cannot be made: {error.strerror}") from error
        self.records = Database(root / STATE_FILE)
        try:
            self._clean_up()
        except BaseException:
            self.records.close()
            raise

    def close(self) -> None:
        """Close the state file."""
        self.records.close()

    def write(
        self,
        info: CheckpointInfo,
        files: Mapping[str, Mapping[str, Any]],
        texts: Mapping[str, str],
        *,
        overwrite: bool,
    ) -> CheckpointInfo:
        """Write a checkpoint whole or not at all.

        Args:
            info: its description; folder and size are filled in here.
            files: safetensors file name to named tensors.
            texts: file name to content.
            overwrite: whether the name may exist already.

        Raises:
            InvalidData: the name cannot be used or is taken.
        """
        _check_run(info.run.run_id)
        _check_name(info.name)
        if self.get(info.run.run_id, info.kind, info.name) is not None and not overwrite:
            raise InvalidData(f"checkpoint {info.path!r} exists already: choose another name or pass overwrite")
        return self._place(info, lambda folder: _save(folder, files, texts))

    def copy(self, source: CheckpointInfo, target: CheckpointInfo) -> CheckpointInfo:
        """Copy a checkpoint's files under another name; `target` describes the copy.

        Raises:
            InvalidData: the source was deleted meanwhile.
        """

        def fill(folder: Path) -> None:
            try:
                for file in self.files(source):
                    shutil.copyfile(file, folder / file.name)
            except FileNotFoundError as error:
                raise InvalidData(f"there is no checkpoint {source.path!r}") from error
            if not any(folder.iterdir()):
                raise InvalidData(f"there is no checkpoint {source.path!r}")

        return self._place(target, fill)

    def find(self, path: str, *kinds: Kind) -> CheckpointInfo:
        """The checkpoint behind a `tinker://` path.

        Raises:
            InvalidData: malformed path, wrong kind, or no such checkpoint.
        """
        match = _PATH.fullmatch(path)
        if match is None:
            raise InvalidData(
                f"{path!r} is not a checkpoint path: tinker://<run>/<weights|sampler_weights|external_weights>/<name>"
            )
        run, kind, name = match.groups()
        if kinds and kind not in kinds:
            raise InvalidData(f"{path!r} is of kind {kind!r}; needed here: {' or '.join(kinds)}")
        _check_run(run)
        _check_name(name)
        info = self.get(run, kind, name)
        if info is None:
            raise InvalidData(f"there is no checkpoint {path!r}")
        return info

    def get(self, run_id: str, kind: str, name: str) -> CheckpointInfo | None:
        """A checkpoint by its parts, None if there is none or its time is over."""
        info = self.records.checkpoint(run_id, kind, name)
        expired = info is not None and info.expires_at is not None and info.expires_at <= datetime.now(UTC)
        return None if expired else info

    def file(self, info: CheckpointInfo, name: str) -> Path:
        """Where one file of a checkpoint is.

        Raises:
            InvalidData: it is not below the store's own folder, because of a link or a changed name.
        """
        file = self._kind_folder(info) / info.folder / name
        if not file.resolve().is_relative_to(self._root.resolve()):
            raise InvalidData(f"{name!r} of checkpoint {info.path!r} lies outside the folder of checkpoints")
        return file

    def files(self, info: CheckpointInfo) -> list[Path]:
        """All files of a checkpoint, by name, without links; none if it was deleted meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            found = sorted(self.file(info, "").iterdir())
            return [file for file in found if file.is_file() and not file.is_symlink()]
        return []

    def delete(self, info: CheckpointInfo) -> None:
        """Remove a checkpoint: its name first."""
        self.records.drop_checkpoint(info)
        self._remove_files(info)

    def delete_expired(self) -> datetime | None:
        """Remove what has expired; returns when the next checkpoint will."""
        for info in self.records.expired():
            self.delete(info)
        return self.records.next_expiry()

    def delete_ephemeral(self, run_id: str) -> None:
        """Remove a run's sampling snapshots without a name."""
        for info in self.records.ephemeral(run_id):
            self.delete(info)

    def set_expiry(self, info: CheckpointInfo, expires_at: datetime | None) -> CheckpointInfo | None:
        """Set when a checkpoint expires; None is never. Gives None if it was deleted meanwhile."""
        changed = self.records.change_checkpoint(info, expires_at=expires_at)
        self.on_expiry()
        return changed

    def archive(self, info: CheckpointInfo) -> Path:
        """A tar file of a checkpoint, made at the first call and kept until the checkpoint is deleted.

        Raises:
            InvalidData: the checkpoint was deleted meanwhile.
        """
        file = self._archive_file(info)
        with self._archiving:
            if file.exists():
                return file
            self._archives.mkdir(exist_ok=True)
            draft = file.with_suffix(".draft")
            try:
                write_archive(draft, self.files(info), info.time)
                draft.replace(file)
            except FileNotFoundError as error:
                raise InvalidData(f"there is no checkpoint {info.path!r}") from error
            finally:
                draft.unlink(missing_ok=True)
        return file

    def write_run(self, run: TrainingRunInfo) -> None:
        """Remember a run, with or without checkpoints.

        Raises:
            InvalidData: its id cannot be used.
        """
        _check_run(run.run_id)
        self.records.put_run(run)

    def _place(self, info: CheckpointInfo, fill: Callable[[Path], None]) -> CheckpointInfo:
        _check_run(info.run.run_id)
        _check_name(info.name)
        old = self.records.checkpoint(info.run.run_id, info.kind, info.name)
        folder = self._kind_folder(info) / f"{info.name}.{uuid.uuid4().hex}"
        draft = folder.with_name(f".{folder.name}")
        draft.mkdir(parents=True)
        try:
            fill(draft)
            size = _flush_all(draft)
            draft.rename(folder)
            _flush(folder.parent)
            written = info.model_copy(update={"folder": folder.name, "size_bytes": size})
            self.records.put_checkpoint(written)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if old is not None:
            self._remove_files(old)
        if written.expires_at is not None:
            self.on_expiry()
        return written

    def _remove_files(self, info: CheckpointInfo) -> None:
        with self._archiving:
            shutil.rmtree(self.file(info, ""), ignore_errors=True)
            self._archive_file(info).unlink(missing_ok=True)

    def _clean_up(self) -> None:
        """Remove half-written folders, and snapshots of sampling sessions that no longer exist."""
        for info in self.records.ephemeral():
            self.delete(info)
        self.delete_expired()
        known = self.records.folders()
        # Only what has the form of our own names: the folder may hold other things.
        for folder in self._root.glob("*/*/*"):
            if _FOLDER.fullmatch(folder.name) and folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        for archive in self._archives.glob("*"):
            if _FOLDER.fullmatch(archive.stem):
                archive.unlink(missing_ok=True)

    def _kind_folder(self, info: CheckpointInfo) -> Path:
        # A colon cannot be in a file name everywhere.
        return self._root / info.run.run_id.replace(":", "~") / info.kind

    def _archive_file(self, info: CheckpointInfo) -> Path:
        return self._archives / f"{info.folder}.tar"


def _check_run(run_id: str) -> None:
    if _RUN.fullmatch(run_id) is None:
        raise InvalidData(f"{run_id!r} is not the id of a training run")


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise InvalidData(f"{name!r} is not a checkpoint name: letters, digits, '_', '-', '.', at most 128")


def _save(folder: Path, files: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str]) -> None:
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    for name, tensors in files.items():
        save_file(dict(tensors), str(folder / name), metadata={"format": "pt"})
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _flush_all(folder: Path) -> int:
    """Bring a folder to the disk; returns the bytes of its files."""
    size = 0
    for file in folder.iterdir():
        size += file.stat().st_size
        _flush(file)
    _flush(folder)
    return size


def _flush(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nothing() -> None:
    return None
