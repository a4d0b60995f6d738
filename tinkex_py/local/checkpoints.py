"""Checkpoints on disk: folders of safetensors files, listed in the state file, and their archives for download.

A folder is written and flushed under a hidden name, renamed in one step, and only then listed. So a listed
checkpoint is always complete, the old one or the new one, whenever the process dies. The next start removes
unfinished folders.
"""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import shutil
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.local.database import Database
from tinkex_py.local.records import CheckpointInfo, Kind, TrainingRunInfo

STATE_FILE = "state.sqlite3"
LINK_SECONDS = 3600
"""How long a download address is valid, in seconds."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}(:train:\d{1,9})?")
_FOLDER = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.[0-9a-f]{32}")
_PATH = re.compile(r"tinker://([^/]+)/(weights|sampler_weights|external_weights)/([^/]+)")


class CheckpointStore:
    """Everything the service stores, under one folder. Methods may be called from any thread.

    Args:
        root: the folder; created if missing. Files that a dead service left unfinished are removed.

    Raises:
        ConfigError: another service uses the folder, or its state file cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / "runs"
        self._archives = root / "archives"
        self._archiving = threading.Lock()
        self.on_expiry: Callable[[], None] = lambda: None
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"state_dir {str(root)!r} cannot be created: {error.strerror}") from error
        self.records = Database(root / STATE_FILE)
        try:
            self._clean_up()
        except BaseException:
            self.records.close()
            raise

    def close(self) -> None:
        """Closes the state file."""
        self.records.close()

    def write(
        self,
        info: CheckpointInfo,
        files: Mapping[str, Mapping[str, Any]],
        texts: Mapping[str, str],
        *,
        overwrite: bool,
        encrypt: Callable[[Path], None] | None = None,
    ) -> CheckpointInfo:
        """Writes a checkpoint completely or not at all.

        Args:
            info: its description; folder and size are set here.
            files: tensors by name, for each safetensors file.
            texts: contents of text files.
            overwrite: whether to replace a checkpoint of this name.
            encrypt: replaces the files of a folder by encrypted ones.

        Raises:
            InvalidData: the name is invalid or taken.
        """
        _check_run(info.run.run_id)
        _check_name(info.name)
        if self.get(info.run.run_id, info.kind, info.name) is not None and not overwrite:
            raise InvalidData(f"checkpoint {info.path!r} exists already: choose another name or pass overwrite")

        def fill(folder: Path) -> None:
            _save(folder, files, texts)
            if encrypt is not None:
                encrypt(folder)

        return self._place(info, fill)

    def copy(self, source: CheckpointInfo, target: CheckpointInfo) -> CheckpointInfo:
        """Copies the files of a checkpoint; `target` describes the copy. InvalidData: the source was deleted."""

        def fill(folder: Path) -> None:
            with contextlib.suppress(FileNotFoundError):
                for file in self.files(source):
                    shutil.copyfile(file, folder / file.name)
                if any(folder.iterdir()):
                    return
            raise InvalidData(f"there is no checkpoint {source.path!r}")

        return self._place(target, fill)

    def find(self, path: str, *kinds: Kind) -> CheckpointInfo:
        """Returns the checkpoint of a `tinker://` path.

        Raises:
            InvalidData: the path is malformed, has a kind other than `kinds`, or there is no such checkpoint.
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
        """Returns a checkpoint, or None if there is none or it has expired."""
        info = self.records.checkpoint(run_id, kind, name)
        expired = info is not None and info.expires_at is not None and info.expires_at <= datetime.now(UTC)
        return None if expired else info

    def file(self, info: CheckpointInfo, name: str) -> Path:
        """Returns the path of a file; InvalidData: a link or an edited record leads out of the store."""
        file = self._kind_folder(info) / info.folder / name
        if not file.resolve().is_relative_to(self._root.resolve()):
            raise InvalidData(f"{name!r} of checkpoint {info.path!r} is outside of the folder of checkpoints")
        return file

    def files(self, info: CheckpointInfo) -> list[Path]:
        """Returns the files of a checkpoint by name, without links; none if it was deleted."""
        with contextlib.suppress(FileNotFoundError):
            found = sorted(self.file(info, "").iterdir())
            return [file for file in found if file.is_file() and not file.is_symlink()]
        return []

    def delete(self, info: CheckpointInfo) -> None:
        """Deletes a checkpoint: first its record, then its files."""
        self.records.drop_checkpoint(info)
        self._remove_files(info)

    def delete_expired(self) -> datetime | None:
        """Deletes expired checkpoints; returns when the next one expires."""
        for info in self.records.expired():
            self.delete(info)
        return self.records.next_expiry()

    def delete_ephemeral(self, run_id: str) -> None:
        """Deletes the unnamed sampling snapshots of a run."""
        for info in self.records.ephemeral(run_id):
            self.delete(info)

    def set_expiry(self, info: CheckpointInfo, expires_at: datetime | None) -> CheckpointInfo | None:
        """Sets when a checkpoint expires (None is never); returns None if it was deleted."""
        changed = self.records.change_checkpoint(info, expires_at=expires_at)
        self.on_expiry()
        return changed

    def archive(self, info: CheckpointInfo) -> Path:
        """Returns a tar file of a checkpoint, kept until its deletion; InvalidData: it was deleted."""
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
        """Stores a run; InvalidData: its id is invalid."""
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
        """Removes unfinished folders, and snapshots of sampling sessions, which end with the service."""
        for info in self.records.ephemeral():
            self.delete(info)
        self.delete_expired()
        known = self.records.folders()
        # Only names of our own form: the folder may contain other files.
        for folder in self._root.glob("*/*/*"):
            if _FOLDER.fullmatch(folder.name) and folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        for archive in self._archives.glob("*"):
            if _FOLDER.fullmatch(archive.stem):
                archive.unlink(missing_ok=True)

    def _kind_folder(self, info: CheckpointInfo) -> Path:
        # Not every file system allows a colon.
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
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    for name, tensors in files.items():
        try:
            save_file(dict(tensors), str(folder / name), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _flush_all(folder: Path) -> int:
    """Flushes a folder to the disk; returns the bytes of its files."""
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


def write_archive(archive: Path, files: Sequence[Path], moment: datetime) -> None:
    """Writes a tar file that depends only on the names and contents of the files, and on `moment`.

    A recreated archive has the same bytes and time stamp, so that interrupted downloads can resume.

    Raises:
        FileNotFoundError: there are no files, or one was deleted.
    """
    if not files:
        raise FileNotFoundError(archive.name)
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            entry = tarfile.TarInfo(file.name)
            entry.size = file.stat().st_size
            entry.mtime = int(moment.timestamp())
            with file.open("rb") as content:
                tar.addfile(entry, content)
    os.utime(archive, (moment.timestamp(), moment.timestamp()))


class DownloadLinks:
    """Signs download addresses, which need no key and open one file for a limited time."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def sign(self, path: str) -> tuple[str, int]:
        """Returns the query that opens a path, and its expiry (Unix seconds)."""
        expires = int(time.time()) + LINK_SECONDS
        return f"expires={expires}&signature={self._signature(path, str(expires))}", expires

    def refusal(self, path: str, expires: str, signature: str) -> tuple[int, str] | None:
        """Returns the status and reason if a request for a path is refused, else None."""
        if not hmac.compare_digest(self._signature(path, expires).encode(), signature.encode()):
            return 403, "the signature of this address is missing or wrong: request a new address"
        if int(expires) < time.time():
            return 410, "this address has expired: request a new one"
        return None

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._key, f"{expires} {path}".encode(), hashlib.sha256).hexdigest()
