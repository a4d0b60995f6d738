"""Extracts an untrusted archive."""

import lzma
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tarfile import HeaderError, ReadError
from typing import IO, Self

from tinkex_py.errors import InvalidResponse

_PIECE = 1 << 20
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, UnicodeError)


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error; tarfile treats it as the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: "tarfile.TarFile") -> Self:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the two empty blocks at the end
                raise
            raise ReadError(f"{error} at byte {tarfile.offset}") from error


def extract(archive: Path, folder: Path, check: Callable[[], None]) -> None:
    """Writes the files of a tar archive, compressed or not, into a new folder, and flushes them to the disk.

    Args:
        archive: the archive.
        folder: the folder to create; incomplete after a failure.
        check: called repeatedly; may raise to end the extraction.

    Raises:
        InvalidResponse: the archive is damaged or empty, or a member is not a plain file or folder, or its name leads
            out of the folder.
    """
    folder.mkdir()
    count = 0
    try:
        with tarfile.open(archive, "r:*", tarinfo=_Member) as tar:
            for member in tar:
                check()
                target = folder / _inner_path(member)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                content = tar.extractfile(member)
                assert content is not None, "a plain file has content"
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(content, target, member.size, check)
                count += 1
            # The checksum of a compressed archive follows the last file.
            while tar.fileobj.read(_PIECE):
                check()
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidResponse(
            "the archive of the checkpoint has two files of the same name; no file was kept"
        ) from error
    except _DAMAGED as error:
        raise InvalidResponse(f"the archive of the checkpoint is damaged ({type(error).__name__}: {error})") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # Decompressors raise OSError without errno for damaged data.
        raise InvalidResponse(f"the archive of the checkpoint is damaged ({error})") from error
    if count == 0:
        raise InvalidResponse("the archive of the checkpoint contains no files")


def _inner_path(member: tarfile.TarInfo) -> PurePosixPath:
    """Returns the path of a member below the folder; tarfile's own filter repairs invalid names instead of raising."""
    name = member.name
    path = PurePosixPath(name)
    if not (member.isreg() or member.isdir()):
        raise InvalidResponse(f"the archive of the checkpoint contains {name!r}, a link or device; no file was kept")
    # Some file systems normalize characters, such as a fullwidth slash.
    alike = unicodedata.normalize("NFKC", name)
    if _leads_out(name) or _leads_out(alike) or not name.isprintable() or not (path.parts or member.isdir()):
        raise InvalidResponse(
            f"the archive of the checkpoint has a file with the invalid name {name!r}; no file was kept"
        )
    return path


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name)
    has_drive = name[1:2] == ":"
    return path.is_absolute() or ".." in path.parts or "\\" in name or has_drive


def _write(content: IO[bytes], target: Path, size: int, check: Callable[[], None]) -> None:
    written = 0
    with target.open("xb") as file:
        while piece := content.read(_PIECE):
            check()
            written += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if written != size:
        raise EOFError(f"{written} of {size} bytes")
