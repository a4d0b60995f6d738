"""Archives that no honest program writes: one typed error, bounded work and memory, and nothing stays."""

import contextlib
import errno
import gzip
import io
import os
import tarfile
import tracemalloc

import pytest

from tests.client.test_rest_download import CONTENT, TAR, make_storage, serving, storage, tar_of  # noqa: F401
from tests.support.crafted_archives import DAMAGED, END, FILE, GROWING, extended, header, large_zeros, record
from tests.support.scripted_server import raw
from tinkex_py import InvalidData, InvalidResponse
from tinkex_py.client.archive import extract
from tinkex_py.client.tar_reader import TarReader
from tinkex_py.threads import Stopped


@pytest.mark.asyncio
@pytest.mark.parametrize("name", DAMAGED)
async def test_a_crafted_archive_is_refused_and_the_next_call_starts_clean(storage, tmp_path, name):  # noqa: F811
    storage.script(serving(DAMAGED[name]), serving(DAMAGED[name]), serving())
    for _ in range(2):
        with pytest.raises(InvalidResponse, match="archive of the checkpoint"):
            await storage.download()
        assert list(tmp_path.iterdir()) == []
    await storage.download()
    storage.check()
    assert storage.starts() == [0, 0, 0]


def test_a_dictionary_of_1_gib_is_not_allocated():
    with pytest.raises(Exception, match="Memory usage limit"):
        list(TarReader(io.BytesIO(DAMAGED["xz that needs 1 GiB to unpack"]), lambda: None, 1 << 40))


class CountedFile(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        self.count += len(piece)
        return piece


def read_all(file: io.BytesIO) -> None:
    with contextlib.suppress(InvalidResponse, ValueError, EOFError, tarfile.TarError):
        for _ in TarReader(file, lambda: None, 1 << 40):
            pass


@pytest.mark.parametrize("make", GROWING.values(), ids=GROWING)
def test_no_byte_of_an_archive_is_read_twice(make):
    for size in (50_000, 200_000):
        archive = CountedFile(make(size))
        read_all(archive)
        assert archive.count <= len(archive.getvalue()) + 8  # the first bytes tell how it is compressed


def test_reading_can_be_ended_between_pieces():
    """Also in bytes that unpack to nothing."""
    archive, checks = CountedFile(GROWING["many_gzip_streams"](1_000_000)), []

    def check() -> None:
        checks.append(archive.count)
        if len(checks) == 5:
            raise Stopped

    with pytest.raises(Stopped):
        next(iter(TarReader(archive, check, 1 << 40)))
    assert archive.count <= 5 * (16 << 10)


LARGE = ("digits_in_an_extended_header", "combining_marks_in_a_name", "large_extended_header", "large_zeros")


@pytest.mark.parametrize("name", LARGE)
def test_memory_does_not_grow_with_the_archive(name):
    archive = io.BytesIO(GROWING[name](32 << 20))
    tracemalloc.start()
    try:
        read_all(archive)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # a piece of 1 MiB, and its copies
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", GROWING.values(), ids=GROWING)
def test_a_growing_archive_is_extracted_or_refused(make, tmp_path):
    (tmp_path / "archive").write_bytes(make(150_000))
    try:
        extract(tmp_path / "archive", tmp_path / "files", lambda: None)
    except InvalidResponse:
        assert not (tmp_path / "files").exists()
    else:
        assert any((tmp_path / "files").iterdir())


def test_files_beyond_the_limits_are_refused_before_one_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("a file was written"))
    archive = tmp_path / "archive"
    archive.write_bytes(large_zeros(80 << 20))
    with pytest.raises(InvalidResponse, match="more than 100 times larger"):
        extract(archive, tmp_path / "files", lambda: None)
    archive.write_bytes(b"".join(header(str(number)) for number in range(10_001)) + END)
    with pytest.raises(InvalidResponse, match="more than 10000 files"):
        extract(archive, tmp_path / "files", lambda: None)
    archive.write_bytes(FILE + header("b", size=1) + b"x" + bytes(511) + END)
    with pytest.raises(InvalidResponse, match="more than max_bytes=3 bytes"):
        extract(archive, tmp_path / "files", lambda: None, max_bytes=3)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_archives_of_tarfile_are_read_as_tarfile_reads_them(tmp_path, form, mode):
    names = [f"{'d' * 90}/{'f' * 60}", "plain", "é" if form == tarfile.PAX_FORMAT else "e"]
    content = {
        name: os.urandom(size)
        for name, size in zip(names, (1_500_000 if mode == "w" else 150_000, 512, 0), strict=True)
    }
    with tarfile.open(tmp_path / "archive", mode, format=form) as tar:  # type: ignore[call-overload]
        for name, expected in content.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(expected), 1.5
            tar.addfile(entry, io.BytesIO(expected))
    extract(tmp_path / "archive", tmp_path / "files", lambda: None)
    assert {name: (tmp_path / "files" / name).read_bytes() for name in content} == content
    assert len([path for path in (tmp_path / "files").rglob("*") if path.is_file()]) == len(content)


def test_streams_behind_each_other_padding_and_comments_are_no_damage(tmp_path):
    comments = extended(record(b"comment", b"for all"), tarfile.XGLTYPE) + extended(record(b"SCHILY.fflags", b""))
    whole = comments + FILE + END
    (tmp_path / "archive").write_bytes(gzip.compress(whole[:1000]) + gzip.compress(whole[1000:]) + bytes(40_000))
    extract(tmp_path / "archive", tmp_path / "files", lambda: None)
    assert (tmp_path / "files" / "a.bin").read_bytes() == b"abc"


@pytest.mark.asyncio
async def test_a_larger_archive_than_allowed_is_refused_and_kept_nowhere(storage, tmp_path):  # noqa: F811
    endless = raw(b"HTTP/1.1 200 Scripted\r\nconnection: close\r\n\r\n" + TAR)
    packed = tar_of(CONTENT, "w:gz")
    storage.script(serving(), endless, serving(packed), serving())
    seen: list[int] = []
    for most, received in ((len(TAR) - 1, 0), (1_500_000, 1_500_000), (len(packed), len(packed))):
        seen.clear()
        with pytest.raises(InvalidResponse, match=f"max_bytes={most}"):
            await storage.download(max_bytes=most, on_progress=lambda now: seen.append(now.received_bytes))
        assert max(seen, default=0) <= received
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidData, match="max_bytes must be an int >= 1, got 0"):
        await storage.download(max_bytes=0)
    await storage.download(max_bytes=len(TAR))
    storage.check()
    assert storage.starts() == [0, 0, 0, 0]


@pytest.mark.asyncio
async def test_a_full_disk_keeps_the_archive_and_no_half_of_the_files(storage, monkeypatch):  # noqa: F811
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage.script(serving())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            await storage.download()
    assert {path.name for path in storage.workspace.iterdir()} <= {"archive.part", "source.json", "lock"}
    await storage.download()
    storage.check()
    assert storage.starts() == [0, len(TAR)]


@pytest.mark.asyncio
@pytest.mark.parametrize("left", [b"", b"{", b"[" * 100_000, b'{"path": [], "validator": 1}', b"[]", b"\xff"])
async def test_a_damaged_workspace_is_not_used(storage, left):  # noqa: F811
    storage.workspace.mkdir()
    (storage.workspace / "source.json").write_bytes(left)
    (storage.workspace / "archive.part").write_bytes(b"garbage")
    storage.script(serving())
    await storage.download()
    storage.check()
    assert storage.starts() == [0]
