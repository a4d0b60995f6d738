"""Extracts an untrusted archive."""

import errno
import lzma
import os
import shutil
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tinkex_py.client.tar_reader import Member, TarReader
from tinkex_py.errors import InvalidResponse
from tinkex_py.transport.secrecy import CutOff

MAX_ARCHIVE_BYTES = 256 << 30

_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError)
_MOST_MEMBERS = 10_000
_MOST_NAME_BYTES = 1024
_MOST_PART_BYTES = 255
_MOST_PARTS = 16
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))})
# File systems refuse names that they cannot store with these.
_NAME_ERRORS = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EEXIST, errno.ENOTDIR, errno.EISDIR})


def extract(archive: Path, folder: Path, check: Callable[[], None], *, max_bytes: int = MAX_ARCHIVE_BYTES) -> None:
    """Writes the files of a tar archive, compressed or not, into a new folder, and flushes them to the disk.

    The whole archive is checked before the first file is written. Work and memory are bounded by the size of the
    archive, whatever it contains.

    Args:
        archive: the archive.
        folder: the folder to create; removed after a failure.
        check: called repeatedly; may raise to end the extraction.
        max_bytes: largest size of all files together.

    Raises:
        InvalidResponse: the archive is damaged, empty or too large, or a member is not a plain file or folder, or its
            name leads out of the folder, cannot be stored, or exists twice on some file system.
        OSError: the archive cannot be read, or the files cannot be written.
    """
    # A service may have written what it was sent into the archive, and so into the frames that read it.
    with archive.open("rb") as file, CutOff():
        with _damage_as_response():
            _check_members(TarReader(file, check, max_bytes))
        file.seek(0)
        folder.mkdir()
        try:
            with _damage_as_response():
                _write_members(TarReader(file, check, max_bytes), folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _damage_as_response() -> Generator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # bz2 raises OSError without errno for damaged data.
        raise _damaged(str(error)) from error


def _damaged(what: str) -> InvalidResponse:
    return InvalidResponse(
        f"the archive of the checkpoint is damaged ({what}): download it again; if it stays so, report it to the "
        "service"
    )


def _check_members(reader: TarReader) -> None:
    files: set[tuple[str, ...]] = set()
    folders: set[tuple[str, ...]] = set()
    for count, member in enumerate(reader, 1):
        if count > _MOST_MEMBERS:
            raise InvalidResponse(
                f"the archive of the checkpoint has more than {_MOST_MEMBERS} files and folders; no file was kept"
            )
        place = tuple(map(_folded, _inner_path(member).parts))
        above = {place[:depth] for depth in range(len(place) + member.is_folder)}
        if place in files or (place in folders and not member.is_folder) or not files.isdisjoint(above):
            raise InvalidResponse(
                f"the archive of the checkpoint has two files of the same name (the second is {member.name!r}); no "
                "file was kept"
            )
        folders |= above
        if not member.is_folder:
            files.add(place)
    if not files:
        raise InvalidResponse("the archive of the checkpoint contains no files")


def _write_members(reader: TarReader, folder: Path) -> None:
    for member in reader:
        target = folder / _inner_path(member)
        with _name_as_response(member.name):
            (target if member.is_folder else target.parent).mkdir(parents=True, exist_ok=True)
            if member.is_folder:
                continue
            file = target.open("xb")
        with file:
            for piece in reader.content():
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())


def _inner_path(member: Member) -> PurePosixPath:
    """Returns the path of a member below the folder; names are refused, never repaired."""
    name = member.name
    if len(name.encode(errors="surrogateescape")) > _MOST_NAME_BYTES:
        raise _invalid_name(f"{name[:50]}...", f"longer than {_MOST_NAME_BYTES} bytes")
    path = PurePosixPath(name)
    # Some file systems normalize characters, such as a fullwidth slash.
    alike = unicodedata.normalize("NFKC", name)
    if _leads_out(name) or _leads_out(alike) or not name.isprintable() or not (path.parts or member.is_folder):
        raise _invalid_name(name, "it leads out of the folder or is unreadable")
    if len(path.parts) > _MOST_PARTS or any(len(part.encode()) > _MOST_PART_BYTES for part in path.parts):
        raise _invalid_name(name, f"more than {_MOST_PARTS} folders deep, or a part over {_MOST_PART_BYTES} bytes")
    if any(_folded(part).partition(".")[0].rstrip() in _DEVICES for part in path.parts):
        raise _invalid_name(name, "a device on some systems")
    return path


@contextmanager
def _name_as_response(name: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NAME_ERRORS:
            raise
        raise _invalid_name(name, f"it cannot be stored here: {error.strerror}") from error


def _invalid_name(name: str, why: str) -> InvalidResponse:
    return InvalidResponse(
        f"the archive of the checkpoint has a file with the invalid name {name!r} ({why}); no file was kept"
    )


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name)
    has_drive = name[1:2] == ":"
    return path.is_absolute() or ".." in path.parts or "\\" in name or has_drive


def _folded(part: str) -> str:
    """Returns what is the same for names that some file system considers the same."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part).casefold()).rstrip(". ")
