"""Checkpoints on disk: safetensors files in a folder of their own, found through a small index file.

The index file `{name}.json` is replaced in one step after the folder is complete and flushed, so a name always leads
to a whole checkpoint, the old one or the new one, whenever the process dies.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tinkex_py.errors import InvalidData

Kind = Literal["weights", "sampler_weights", "ephemeral"]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}(:train:\d{1,9})?")
_PATH = re.compile(r"tinker://([^/]+)/(weights|sampler_weights)/([^/]+)")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class RunInfo(_Record):
    """One training run, which is one training model."""

    run_id: str
    base_model: str
    rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    created: datetime
    user_metadata: dict[str, Any] | None = None


class SessionInfo(_Record):
    """One client's session."""

    session_id: str
    created: datetime
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None
    finished: bool = False


class CheckpointInfo(_Record):
    """What an index file says."""

    run: RunInfo
    kind: Kind
    name: str
    folder: str
    time: datetime
    size_bytes: int = 0
    has_optimizer: bool = False
    user_metadata: dict[str, Any] | None = None
    expires_at: datetime | None = None

    @property
    def path(self) -> str:
        """The checkpoint's address for clients."""
        return f"tinker://{self.run.run_id}/{self.kind}/{self.name}"


class CheckpointStore:
    """All checkpoints under one root folder."""

    def __init__(self, root: Path) -> None:
        self._root = root / "runs"
        self._session_folder = root / "sessions"

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
        index = self._index(info.run.run_id, info.kind, info.name)
        old = _read(index)
        if old is not None and not overwrite:
            raise InvalidData(f"checkpoint {info.path!r} exists already: choose another name or pass overwrite")
        index.parent.mkdir(parents=True, exist_ok=True)
        folder = index.parent / f".{info.name}-{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            size = _fill(folder, files, texts)
            written = info.model_copy(update={"folder": folder.name, "size_bytes": size})
            _replace(index, written.model_dump_json())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if old is not None:
            shutil.rmtree(index.parent / old.folder, ignore_errors=True)
        return written

    def find(self, path: str, *kinds: Kind) -> CheckpointInfo:
        """The checkpoint behind a `tinker://` path.

        Raises:
            InvalidData: malformed path, wrong kind, or no such checkpoint.
        """
        match = _PATH.fullmatch(path)
        if match is None:
            raise InvalidData(f"{path!r} is not a checkpoint path: tinker://<run>/<weights|sampler_weights>/<name>")
        run, kind, name = match.groups()
        if kinds and kind not in kinds:
            raise InvalidData(f"{path!r} is of kind {kind!r}; needed here: {' or '.join(kinds)}")
        info = _read(self._index(run, kind, name))
        if info is None:
            raise InvalidData(f"there is no checkpoint {path!r}")
        return info

    def get(self, run_id: str, kind: str, name: str) -> CheckpointInfo | None:
        """A checkpoint by its parts, None if there is none."""
        try:
            return _read(self._index(run_id, kind, name))
        except InvalidData:
            return None

    def file(self, info: CheckpointInfo, name: str) -> Path:
        """Where one file of a checkpoint is."""
        return self._index(info.run.run_id, info.kind, info.name).parent / info.folder / name

    def delete(self, info: CheckpointInfo) -> None:
        """Remove a checkpoint: its name first."""
        index = self._index(info.run.run_id, info.kind, info.name)
        index.unlink(missing_ok=True)
        shutil.rmtree(index.parent / info.folder, ignore_errors=True)

    def set_ttl(self, info: CheckpointInfo, ttl_seconds: int | None) -> CheckpointInfo:
        """Set when a checkpoint expires, counted from now in seconds; None is never."""
        changed = info.model_copy(update={"expires_at": expiry(ttl_seconds)})
        _replace(self._index(info.run.run_id, info.kind, info.name), changed.model_dump_json())
        return changed

    def write_run(self, run: RunInfo) -> None:
        """Remember a run, with or without checkpoints."""
        folder = self._run_folder(run.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "run.json", run.model_dump_json())

    def runs(self) -> list[RunInfo]:
        """All runs, newest first."""
        found: list[RunInfo] = []
        for file in self._root.glob("*/run.json"):
            try:
                found.append(RunInfo.model_validate_json(file.read_bytes()))
            except (ValidationError, FileNotFoundError):
                continue
        return sorted(found, key=lambda run: run.created, reverse=True)

    def write_session(self, session: SessionInfo) -> None:
        """Remember a session."""
        self._session_folder.mkdir(parents=True, exist_ok=True)
        _replace(self._session_folder / f"{session.session_id}.json", session.model_dump_json())

    def sessions(self) -> list[SessionInfo]:
        """All sessions, oldest first."""
        found: list[SessionInfo] = []
        for file in self._session_folder.glob("*.json"):
            try:
                found.append(SessionInfo.model_validate_json(file.read_bytes()))
            except (ValidationError, FileNotFoundError):
                continue
        return sorted(found, key=lambda session: session.created)

    def checkpoints(self, run_id: str | None = None) -> list[CheckpointInfo]:
        """Checkpoints of one run or of all, newest first; sampling snapshots without a name are left out."""
        try:
            folders = [self._run_folder(run_id)] if run_id is not None else [*self._root.glob("*")]
        except InvalidData:
            return []
        found = [info for folder in folders for info in _listed(folder)]
        return sorted(found, key=lambda info: info.time, reverse=True)

    def delete_ephemeral(self, run_id: str) -> None:
        """Remove a run's sampling snapshots without a name."""
        shutil.rmtree(self._run_folder(run_id) / "ephemeral", ignore_errors=True)

    def _run_folder(self, run_id: str) -> Path:
        if _RUN.fullmatch(run_id) is None:
            raise InvalidData(f"{run_id!r} is not the id of a training run")
        return self._root / run_id.replace(":", "~")

    def _index(self, run_id: str, kind: str, name: str) -> Path:
        if _NAME.fullmatch(name) is None:
            raise InvalidData(f"{name!r} is not a checkpoint name: letters, digits, '_', '-', '.', at most 128")
        if kind not in ("weights", "sampler_weights", "ephemeral"):
            raise InvalidData(f"{kind!r} is not a kind of checkpoint")
        return self._run_folder(run_id) / kind / f"{name}.json"


def expiry(ttl_seconds: int | None) -> datetime | None:
    """When something with this time to live (seconds) expires."""
    return None if ttl_seconds is None else datetime.now(UTC) + timedelta(seconds=ttl_seconds)


def _listed(folder: Path) -> Iterator[CheckpointInfo]:
    for kind in ("weights", "sampler_weights"):
        for index in (folder / kind).glob("*.json"):
            info = _read(index)
            if info is not None:
                yield info


def _read(index: Path) -> CheckpointInfo | None:
    try:
        info = CheckpointInfo.model_validate_json(index.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise InvalidData(f"the checkpoint index {index.name} is damaged: {error.error_count()} error(s)") from error
    expired = info.expires_at is not None and info.expires_at <= datetime.now(UTC)
    return None if expired else info


def _fill(folder: Path, files: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str]) -> int:
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    for name, tensors in files.items():
        save_file(dict(tensors), str(folder / name), metadata={"format": "pt"})
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    size = 0
    for file in folder.iterdir():
        size += file.stat().st_size
        _flush(file)
    _flush(folder)
    return size


def _replace(target: Path, text: str) -> None:
    draft = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    draft.write_text(text, encoding="utf-8")
    _flush(draft)
    draft.replace(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
