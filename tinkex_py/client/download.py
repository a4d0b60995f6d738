"""Downloads one checkpoint: the archive in resumable pieces, then all its files at once."""

import json
import os
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import filelock

from tinkex_py.client.archive import extract
from tinkex_py.client.rest_requests import RestRequests
from tinkex_py.errors import (
    APIStatusError,
    ConnectionFailed,
    InvalidData,
    InvalidResponse,
    TimeoutExceeded,
    UnsupportedFeature,
)
from tinkex_py.limits import Attempts, with_retries
from tinkex_py.threads import FileThread
from tinkex_py.transport.api import is_retryable_status
from tinkex_py.transport.failures import status_error
from tinkex_py.transport.http import ResponseStream
from tinkex_py.transport.messages import Secret, checked_base_url, request
from tinkex_py.transport.secrecy import CutOff
from tinkex_py.types.checkpoint_path import CheckpointPath
from tinkex_py.types.rest import ArchiveUrl, DownloadProgress

_WRITE_BYTES = 1 << 20
_MOST_REDIRECTIONS = 5


@dataclass(frozen=True)
class _Source:
    """The origin of the bytes on the disk, which only the same validator can continue."""

    path: str
    validator: str | None = None
    total: int | None = None


class Download:
    """One download of one checkpoint into one folder.

    Args:
        requests: requests to the service.
        path: the checkpoint.
        folder: the folder of the files.
        ask_where: requests the URL of the archive.
        on_progress: called as bytes arrive.
        max_bytes: largest size of the archive, and of its files together.
    """

    def __init__(
        self,
        requests: RestRequests,
        path: CheckpointPath,
        folder: Path,
        ask_where: Callable[[], Awaitable[ArchiveUrl]],
        on_progress: Callable[[DownloadProgress], object] | None,
        max_bytes: int,
    ) -> None:
        self._requests = requests
        self._ask_where = ask_where
        self._on_progress = on_progress
        self._max_bytes = max_bytes
        self._target = Path(os.path.abspath(folder))  # noqa: PTH100  (resolve() would follow a link)
        self._workspace = self._target.parent / f".{self._target.name}.download"
        self._archive = self._workspace / "archive.part"
        self._source_file = self._workspace / "source.json"
        self._source = _Source(str(path))
        self._received = 0

    async def run(self) -> Path:
        """Downloads and unpacks; see `AsyncRestClient.download_checkpoint`."""
        async with FileThread() as files, self._own_workspace(files):
            await self._fetch(files)
            await files.run(lambda: self._unpack(files))
        return self._target

    @asynccontextmanager
    async def _own_workspace(self, files: FileThread) -> AsyncGenerator[None, None]:
        lock = filelock.FileLock(self._workspace / "lock", timeout=0)
        try:
            await files.run(lambda: self._open_workspace(lock))
            yield
        finally:
            await files.run(lambda: self._close_workspace(lock))

    def _open_workspace(self, lock: filelock.BaseFileLock) -> None:
        self._require_free_target()
        self._workspace.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InvalidData(
                f"another download into {str(self._target)!r} is running: wait for it, or choose another folder"
            ) from error
        kept = _kept_source(self._source_file)
        if kept is None:
            self._forget()
        elif kept.path == self._source.path and self._archive.is_file():
            self._source, self._received = kept, self._archive.stat().st_size

    def _close_workspace(self, lock: filelock.BaseFileLock) -> None:
        if not lock.is_locked:
            return  # the workspace belongs to another download
        done = not self._source_file.exists()
        if done:
            shutil.rmtree(self._workspace, ignore_errors=True)
        lock.release()
        if done:
            # Some systems cannot delete a locked file, so what is left is deleted now.
            shutil.rmtree(self._workspace, ignore_errors=True)

    def _require_free_target(self) -> None:
        if not self._target.name or self._target.is_symlink() or (self._target.exists() and not self._target.is_dir()):
            raise InvalidData(f"{str(self._target)!r} is not a folder: choose another name for the checkpoint's files")
        if self._target.is_dir() and any(self._target.iterdir()):
            raise InvalidData(f"the folder {str(self._target)!r} is not empty: choose another one, or remove it")

    # The archive

    async def _fetch(self, files: FileThread) -> None:
        """Fetches the whole archive; the retry policy starts again with every byte."""

        async def attempt(attempts: Attempts) -> None:
            before = self._received
            try:
                await self._fetch_once(files)
            finally:
                if self._received > before:
                    attempts.progressed()

        await with_retries(self._requests.retry, attempt, _is_worth_another_attempt)

    async def _fetch_once(self, files: FileThread) -> None:
        url = Secret((await self._ask_where()).url)  # it may be signed
        for _ in range(_MOST_REDIRECTIONS):
            api = self._requests.api
            with CutOff():
                _check_address(url.reveal(), api.host)
            key = await api.auth.current()
            async with api.http.towards(url, key=key) as (client, path, key_there):
                with CutOff():
                    asking = request("GET", path.reveal(), accept="*/*", headers=self._range())
                async with client.stream(asking, key=key_there) as response:
                    target = _redirection(response, url)
                    if target is None:
                        return await self._take(response, files)
                    url = target
        raise InvalidResponse(
            f"the URL of the archive has more than {_MOST_REDIRECTIONS} redirections: report it to the service"
        )

    def _range(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        if self._received and self._source.validator is not None:
            headers |= {"Range": f"bytes={self._received}-", "If-Range": self._source.validator}
        return headers

    async def _take(self, response: ResponseStream, files: FileThread) -> None:
        place = response.headers.get("content-range", "")
        if response.status == 416 and place == f"bytes */{self._received}":
            return  # what is there is all there is
        if response.status in (206, 416):
            if not place.startswith(f"bytes {self._received}-"):
                await self._begin(_Source(self._source.path), files)
                raise ConnectionFailed("the service gave another part of the archive than it was asked for")
        elif 200 <= response.status < 300:
            await self._begin(_Source(self._source.path, _validator(response), response.length), files)
        else:
            raise status_error(await response.beginning())
        await self._append(response, files)

    async def _begin(self, source: _Source, files: FileThread) -> None:
        """Forgets what is there."""
        self._source, self._received = source, 0
        await files.run(lambda: _replace(self._source_file, json.dumps(asdict(source)), self._archive))

    async def _append(self, response: ResponseStream, files: FileThread) -> None:
        await self._check_size(self._source.total or 0, files)
        self._report()
        waiting = bytearray()

        async def write() -> None:
            piece = bytes(waiting)
            waiting.clear()
            await files.run(lambda: _append(self._archive, piece))
            self._received += len(piece)
            self._report()

        try:
            async with aclosing(response.pieces()) as pieces:
                async for piece in pieces:
                    await self._check_size(self._received + len(waiting) + len(piece), files)
                    waiting += piece
                    if len(waiting) >= _WRITE_BYTES:
                        await write()
        finally:
            if waiting:
                await write()

    async def _check_size(self, size: int, files: FileThread) -> None:
        if size > self._max_bytes:
            await files.run(self._forget)
            raise InvalidResponse(
                f"the archive of the checkpoint has {size} bytes or more, over max_bytes={self._max_bytes}; no file "
                "was kept: if you expect so many, raise max_bytes"
            )

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(DownloadProgress(self._received, self._source.total))

    # The files

    def _unpack(self, files: FileThread) -> None:
        extracted = self._workspace / "files"
        shutil.rmtree(extracted, ignore_errors=True)
        try:
            extract(self._archive, extracted, files.check, max_bytes=self._max_bytes)
            self._require_free_target()
            if self._target.is_dir():
                self._target.rmdir()
            extracted.rename(self._target)
        except InvalidResponse:
            self._forget()
            raise
        self._forget()

    def _forget(self) -> None:
        """Marks the workspace as done with: it is removed, and no later call goes on with its bytes."""
        self._source_file.unlink(missing_ok=True)


def _kept_source(file: Path) -> _Source | None:
    """Returns the source of bytes that a later call can continue; None if there are none, or the file is damaged."""
    try:
        kept = _Source(**json.loads(file.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    return kept if isinstance(kept.validator, str) and isinstance(kept.total, int) else None


def _is_worth_another_attempt(error: BaseException) -> bool:
    if isinstance(error, APIStatusError):
        return is_retryable_status(error.status)
    return isinstance(error, ConnectionFailed | TimeoutExceeded)


def _redirection(response: ResponseStream, url: Secret) -> Secret | None:
    location = response.headers.get("location")
    if location is None or not 300 <= response.status < 400:
        return None
    try:
        return Secret(urljoin(url.reveal(), location))
    except ValueError:
        return Secret(location)


def _check_address(url: str, host: str) -> None:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https"):
            checked_base_url(f"{parts.scheme}://{parts.netloc}")
            return
    except ValueError:
        raise InvalidResponse(f"{host} returned an invalid URL of the archive") from None
    raise UnsupportedFeature(
        f"{host} does not support downloads of checkpoints as archives (their URL starts with {parts.scheme!r})"
    )


def _validator(response: ResponseStream) -> str | None:
    """Returns the value of `If-Range` that identifies this version of the archive."""
    if response.headers.get("accept-ranges", "").lower() == "none" or response.length is None:
        return None
    tag = response.headers.get("etag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("last-modified")


def _replace(source_file: Path, text: str, archive: Path) -> None:
    archive.write_bytes(b"")
    draft = source_file.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(source_file)


def _append(archive: Path, piece: bytes) -> None:
    with archive.open("ab") as file:
        file.write(piece)
