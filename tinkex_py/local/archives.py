"""Checkpoints as one file to download, and addresses for it that need no key."""

import hashlib
import hmac
import os
import secrets
import tarfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

LINK_SECONDS = 3600
"""How long a download address works, in seconds."""


def write_archive(archive: Path, files: Sequence[Path], moment: datetime) -> None:
    """Write a tar file that depends on nothing but the files' names and contents, and the moment.

    The same checkpoint gives the same bytes and time stamp again, so that a download can go on after the archive was
    recreated.

    Raises:
        FileNotFoundError: there are no files, or one is gone.
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
    """Signs download addresses, so that they work without a key, for a while, and for one file only."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def sign(self, path: str) -> tuple[str, int]:
        """The query that opens a path, and when it ends (Unix seconds)."""
        expires = int(time.time()) + LINK_SECONDS
        return f"expires={expires}&signature={self._signature(path, str(expires))}", expires

    def refusal(self, path: str, expires: str, signature: str) -> tuple[int, str] | None:
        """Why a request for a path is refused, as status and reason; None if it is not."""
        if not hmac.compare_digest(self._signature(path, expires).encode(), signature.encode()):
            return 403, "the signature of this address is missing or wrong: ask for a new one"
        if int(expires) < time.time():
            return 410, "this address is not valid any more: ask for a new one"
        return None

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._key, f"{expires} {path}".encode(), hashlib.sha256).hexdigest()
