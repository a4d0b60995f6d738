"""Downloads: resumed if possible, else restarted; safe, and visible only when complete."""

import asyncio
import io
import json
import sys
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import pytest_asyncio
from hypothesis import given, settings, strategies as st

from tests.client.recorder import KEY, quick_config
from tests.support.scripted_server import Behaviour, Request, ScriptedServer, answer, computed, raw, stall
from tinkex_py import (
    AsyncRestClient,
    AsyncServiceClient,
    ClientClosed,
    ConnectionFailed,
    InvalidData,
    InvalidResponse,
    NotFound,
    RetryPolicy,
    ServerError,
    TimeoutExceeded,
    UnsupportedFeature,
)
from tinkex_py.client.archive import extract

PATH = "tinker://run:train:0/sampler_weights/final"
ARCHIVE = "/api/v1/training_runs/run:train:0/checkpoints/sampler_weights/final/archive"
FILE = "/storage/archive.tar"
CONTENT = {"adapter_config.json": b'{"r": 8}', "deep/adapter_model.safetensors": bytes(range(256)) * 9000}


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


TAR = tar_of(CONTENT)


def wanted(request: Request) -> int:
    return int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))


def serving(
    body: bytes = TAR, *, tag: str = '"v1"', cut: int | None = None, ranges: bool = True, **headers: str
) -> Behaviour:
    """A file as storages serve it; `cut` ends the connection after so many bytes of this answer."""

    def make(request: Request) -> Behaviour:
        start = wanted(request) if ranges and request.headers.get("if-range", tag) == tag else 0
        told = {**({"etag": tag} if tag else {}), **{name.replace("_", "-"): value for name, value in headers.items()}}
        if start >= len(body) > 0:
            return answer(416, headers={**told, "content-range": f"bytes */{len(body)}"})
        part, status = body[start:], 200
        if start:
            status = 206
            told["content-range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if cut is None:
            return answer(status, part, headers=told)
        lines = [f"HTTP/1.1 {status} Scripted", f"content-length: {len(part)}"]
        lines += [f"{name}: {value}" for name, value in told.items()]
        return raw("\r\n".join([*lines, "", ""]).encode() + part[:cut])

    return computed(make)


class Storage:
    """A scripted service, a client of it, and a folder to download into."""

    def __init__(self, server: ScriptedServer, service: AsyncServiceClient, folder: Path) -> None:
        self.server = server
        self.service = service
        self.rest: AsyncRestClient = service.create_rest_client()
        self.target = folder / "model"
        self.workspace = folder / ".model.download"

    def script(self, *files: Behaviour) -> None:
        self.server.script(ARCHIVE, answer(302, headers={"location": f"{self.server.url}{FILE}?signature=s"}))
        self.server.script(FILE, *files)

    def starts(self) -> list[int]:
        return [wanted(request) for request in self.server.requests_to(FILE)]

    async def download(self, **options: Any) -> Path:
        return await self.rest.download_checkpoint(PATH, self.target, **options)

    def check(self) -> None:
        found = {
            path.relative_to(self.target).as_posix(): path.read_bytes()
            for path in self.target.rglob("*")
            if path.is_file()
        }
        assert found == CONTENT
        assert [path.name for path in self.target.parent.iterdir()] == ["model"]


@pytest_asyncio.fixture
async def make_storage(tmp_path: Path) -> AsyncIterator[Callable[..., Storage]]:
    async with ScriptedServer() as server:
        made: list[Storage] = []

        def make(**settings: Any) -> Storage:
            made.append(Storage(server, AsyncServiceClient(quick_config(server.url, **settings)), tmp_path))
            return made[-1]

        yield make
        for storage in made:
            await storage.service.aclose()


@pytest_asyncio.fixture
async def storage(make_storage: Callable[..., Storage]) -> Storage:
    return make_storage()


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
async def test_the_files_arrive_and_nothing_else_stays(storage, mode):
    body = tar_of(CONTENT, mode)
    storage.script(serving(body))
    seen: list[tuple[int, int | None]] = []
    given = await storage.download(on_progress=lambda now: seen.append((now.received_bytes, now.total_bytes)))
    assert given == storage.target
    storage.check()
    assert seen[0] == (0, len(body))
    assert seen[-1] == (len(body), len(body))
    assert seen == sorted(seen)
    assert not any(request.path.startswith("/api/v1/create_session") for request in storage.server.requests)


@pytest.mark.asyncio
async def test_an_archive_that_is_marked_as_compressed_is_the_same(storage):
    body = tar_of(CONTENT, "w:gz")
    storage.script(serving(body, cut=2000, content_encoding="gzip"), serving(body, content_encoding="gzip"))
    await storage.download()
    storage.check()
    assert storage.starts() == [0, 2000]


def in_range(part: Behaviour) -> Behaviour:
    """Serves everything, except that a request for a range gets another response."""
    return computed(lambda request: part if "range" in request.headers else answer(200, TAR))


DATE = "Wed, 21 Oct 2015 07:28:00 GMT"
ELSEWHERE = {"content-range": f"bytes 5-{len(TAR) - 1}/{len(TAR)}"}
# The responses, and where the requests start.
RESUMED: dict[str, tuple[list[Behaviour], list[int]]] = {
    "by entity tag": ([serving(cut=1_000_000), serving(cut=700_000), serving()], [0, 1_000_000, 1_700_000]),
    "by date": ([serving(tag="", cut=1_000_000, last_modified=DATE), serving(tag=DATE)], [0, 1_000_000]),
    "no tag": ([serving(tag="", cut=1_000_000), serving(tag="")], [0, 0]),
    "weak tag": ([serving(tag='W/"weak"', cut=1_000_000), serving(tag='W/"weak"')], [0, 0]),
    "no ranges announced": ([serving(accept_ranges="none", cut=1_000_000), serving(accept_ranges="none")], [0, 0]),
    "ranges ignored": ([serving(cut=1_000_000), serving(ranges=False)], [0, 1_000_000]),
    "another version": ([serving(cut=1_000_000), serving(tag='"v2"')], [0, 1_000_000]),
    "another part": ([serving(cut=1_000_000), in_range(answer(206, TAR[5:], headers=ELSEWHERE))], [0, 1_000_000, 0]),
    "no content-range": ([serving(cut=1_000_000), in_range(answer(206, TAR[1_000_000:]))], [0, 1_000_000, 0]),
    "shorter than before": (
        [serving(cut=1_000_000), in_range(answer(416, headers={"content-range": "bytes */7"}))],
        [0, 1_000_000, 0],
    ),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", RESUMED)
async def test_a_broken_download_continues_or_starts_again(storage, name):
    responses, starts = RESUMED[name]
    storage.script(*responses)
    seen: list[int] = []
    await storage.download(on_progress=lambda now: seen.append(now.received_bytes))
    storage.check()
    assert storage.starts() == starts
    if name == "by entity tag":
        assert seen == sorted(seen)
        assert all(request.headers["if-range"] == '"v1"' for request in storage.server.requests_to(FILE)[1:])


@pytest.mark.asyncio
async def test_the_next_call_goes_on_too_and_the_target_shows_only_when_it_is_whole(storage, make_storage):
    once = make_storage(retry=RetryPolicy(max_attempts=1))
    once.script(serving(cut=1_000_000), serving())
    with pytest.raises(ConnectionFailed):
        await once.download()
    assert not once.target.exists()
    assert (once.workspace / "archive.part").stat().st_size == 1_000_000
    await storage.download()
    assert storage.starts() == [0, 1_000_000]
    storage.check()


@pytest.mark.asyncio
async def test_a_cancelled_download_goes_on(storage):
    storage.script(serving(cut=1_200_000), stall(), serving())
    task = asyncio.create_task(storage.download())
    await storage.server.until(lambda: len(storage.server.requests_to(FILE)) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not storage.target.exists()
    await storage.download()
    assert storage.starts()[2] == 1_200_000
    storage.check()


@pytest.mark.asyncio
async def test_a_process_that_died_leaves_something_to_go_on_from(storage, tmp_path):
    """Killed in the middle of the second request, with no chance to clean up."""
    storage.script(serving(cut=1_500_000), stall(), serving())
    program = f"""
import asyncio
from tinkex_py import AsyncServiceClient, TinkexConfig
async def main():
    service = AsyncServiceClient(TinkexConfig(base_url={storage.server.url!r}, api_key={KEY!r}))
    await service.create_rest_client().download_checkpoint({PATH!r}, {str(storage.target)!r})
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    try:
        await storage.server.until(lambda: len(storage.server.requests_to(FILE)) == 2)
    finally:
        process.kill()
        await process.wait()
    await storage.download()
    assert storage.starts() == [0, 1_500_000, 1_500_000]
    storage.check()


@pytest.mark.asyncio
async def test_a_complete_archive_is_not_fetched_again(storage):
    """The process died between the last byte and the unpacking."""
    storage.workspace.mkdir()
    (storage.workspace / "archive.part").write_bytes(TAR)
    (storage.workspace / "source.json").write_text(json.dumps({"path": PATH, "validator": '"v1"', "total": len(TAR)}))
    storage.script(serving())
    await storage.download()
    assert storage.starts() == [len(TAR)]
    storage.check()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "kept", ["", "[]", "{", '{"path": "tinker://other/weights/x", "validator": "\\"v1\\""}', '{"path": 3, "no": 4}']
)
async def test_data_of_another_download_is_not_used(storage, kept):
    storage.workspace.mkdir()
    (storage.workspace / "archive.part").write_bytes(b"something else")
    (storage.workspace / "source.json").write_text(kept)
    storage.script(serving())
    await storage.download()
    assert storage.starts() == [0]
    storage.check()


@pytest.mark.asyncio
async def test_every_byte_restarts_the_retries(make_storage):
    """Three attempts would not do if they were counted over the whole download."""
    storage = make_storage(retry=RetryPolicy(max_attempts=2, initial_wait=0.0, max_wait=0.01))
    storage.script(*[serving(cut=300_000)] * 7, serving())
    await storage.download()
    storage.check()


@pytest.mark.asyncio
async def test_without_a_byte_it_gives_up(make_storage):
    storage = make_storage(retry=RetryPolicy(max_attempts=3, initial_wait=0.0, max_wait=0.01))
    storage.script(answer(503))
    with pytest.raises(ServerError):
        await storage.download()
    assert len(storage.server.requests_to(FILE)) == 3
    assert not storage.target.exists()
    storage.server.script(ARCHIVE, answer(500))
    with pytest.raises(ServerError):
        await storage.download()
    assert len(storage.server.requests_to(ARCHIVE)) == 6


@pytest.mark.asyncio
async def test_a_silent_storage_times_out(make_storage):
    storage = make_storage(timeout=0.2, retry=RetryPolicy.none())
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(TAR)}\r\n\r\n".encode()
    storage.script(raw(head + TAR[:100], keep_open=True))
    with pytest.raises(TimeoutExceeded, match=r"no more data for 0\.2 s"):
        await storage.download()


@pytest.mark.asyncio
async def test_an_archive_that_is_not_built_yet_is_waited_for(storage):
    storage.script(serving())
    found = answer(302, headers={"location": f"{storage.server.url}{FILE}"})
    storage.server.script(ARCHIVE, answer(503, headers={"retry-after-ms": "1"}), answer(425), found)
    await storage.download()
    storage.check()


@pytest.mark.asyncio
async def test_the_address_may_come_as_json_and_lead_on(storage):
    storage.script(serving())
    fields = {"url": f"{storage.server.url}/first", "expires": "2026-01-01T00:00:00Z"}
    storage.server.script(ARCHIVE, answer(json=fields))
    storage.server.script("/first", answer(307, headers={"location": FILE}))
    await storage.download()
    storage.check()


@pytest.mark.asyncio
async def test_an_endless_chain_of_addresses_ends(storage):
    storage.script(answer(302, headers={"location": FILE}))
    with pytest.raises(InvalidResponse, match="more than 5 redirections"):
        await storage.download()


@pytest.mark.asyncio
async def test_the_key_does_not_leave_the_service(storage):
    """Storage on another origin never sees it; the service's own does."""
    storage.script(serving())
    await storage.download()
    assert [request.headers.get("x-api-key") for request in storage.server.requests] == [KEY] * 3
    async with ScriptedServer() as elsewhere:
        storage.target = storage.target.with_name("again")
        storage.server.script(ARCHIVE, answer(302, headers={"location": f"{elsewhere.url}{FILE}"}))
        elsewhere.script(FILE, answer(302, headers={"location": "/on"}))
        elsewhere.script("/on", serving())
        await storage.download()
        assert [request.path for request in elsewhere.requests] == [FILE, "/on"]
        assert all("x-api-key" not in request.headers for request in elsewhere.requests)


@pytest.mark.asyncio
async def test_a_missing_checkpoint_raises_and_leaves_nothing(storage, tmp_path):
    storage.server.script(ARCHIVE, answer(404, json={"detail": "checkpoint not here"}))
    with pytest.raises(NotFound, match="checkpoint not here"):
        await storage.download()
    storage.server.script(ARCHIVE, answer(302, headers={"location": "file:///etc/passwd"}))
    with pytest.raises(UnsupportedFeature, match="URL starts with 'file'"):
        await storage.download()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("location", ["http://[", "http://:80/x", "http://u:p@127.0.0.1/x", "https://exa mple/x"])
@pytest.mark.parametrize("at", [ARCHIVE, FILE])
async def test_an_invalid_url_is_an_invalid_response(storage, tmp_path, at, location):
    storage.script(answer(200))
    storage.server.script(at, answer(302, headers={"location": location}))
    with pytest.raises(InvalidResponse, match="invalid URL of the archive"):
        await storage.download()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_a_service_that_knows_only_names_is_asked_by_name(storage):
    storage.server.script(ARCHIVE, answer(404, json={"detail": "Not Found"}))
    bare = ARCHIVE.replace("sampler_weights/", "")
    storage.server.script(bare, answer(302, headers={"location": f"{storage.server.url}{FILE}"}))
    storage.server.script(FILE, serving())
    await storage.download()
    storage.check()


@pytest.mark.asyncio
async def test_a_folder_in_use_is_refused_before_anything_is_sent(storage, tmp_path):
    storage.target.mkdir()
    (storage.target / "mine").write_text("x")
    with pytest.raises(InvalidData, match="is not empty"):
        await storage.download()
    (storage.target / "mine").unlink()
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(storage.target)
    for bad in (file, link, Path("/")):
        with pytest.raises(InvalidData):
            await storage.rest.download_checkpoint(PATH, bad)
    assert storage.server.requests == []
    storage.script(serving())
    await storage.download()  # an empty folder is fine
    assert (storage.target / "adapter_config.json").exists()


@pytest.mark.asyncio
async def test_two_downloads_into_one_folder_do_not_mix(storage):
    storage.script(serving(cut=100), stall(), serving())
    first = asyncio.create_task(storage.download())
    await storage.server.until(lambda: len(storage.server.requests_to(FILE)) == 2)
    with pytest.raises(InvalidData, match="another download into"):
        await storage.download()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with filelock.FileLock(storage.workspace / "lock"), pytest.raises(InvalidData, match="another download into"):
        await storage.download()
    await storage.download()
    storage.check()


@pytest.mark.asyncio
async def test_closing_the_service_ends_the_download(storage):
    storage.script(serving(cut=100), stall())
    task = asyncio.create_task(storage.download())
    await storage.server.until(lambda: len(storage.server.requests_to(FILE)) == 2)
    await storage.service.aclose()
    with pytest.raises(ClientClosed):
        await task
    with pytest.raises(ClientClosed):
        await storage.download()


@pytest.mark.asyncio
async def test_an_error_of_the_callback_ends_the_download_and_keeps_what_is_there(storage):
    storage.script(serving())

    def stop(progress: Any) -> None:
        if progress.received_bytes:
            raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await storage.download(on_progress=stop)
    await storage.download()
    assert storage.starts()[1] > 0
    storage.check()


@pytest.mark.asyncio
async def test_cancelled_at_every_stage_and_then_whole(storage):
    """Cancels after more and more turns of the event loop; each call continues from the one before."""
    storage.script(serving())
    steps = 1
    while steps < 2000:
        task = asyncio.create_task(storage.download())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        done = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(done, Path) or storage.target.exists():
            break
        assert isinstance(done, asyncio.CancelledError)
        steps += max(1, steps // 8)
    storage.check()


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    for field, value in fields.items():
        setattr(entry, field, value)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry, io.BytesIO(b"\0" * entry.size))
    return buffer.getvalue()


UNSAFE = {
    "parent": member("../evil"),
    "parent inside": member("a/../../evil"),
    "absolute": member("/evil"),
    "backslash": member("..\\evil"),
    "drive": member("C:evil"),
    "NUL": member("evil", pax_headers={"path": "evil\0.txt"}),
    "newline": member("evil\nname"),
    "symlink": member("link", tarfile.SYMTYPE, linkname="/etc"),
    "hard link": member("link", tarfile.LNKTYPE, linkname="../evil"),
    "device": member("null", tarfile.CHRTYPE),
    "pipe": member("pipe", tarfile.FIFOTYPE),
    "twice": tar_of({"a": b"1"})[:1024] + tar_of({"a": b"2"}),
    "file as folder": tar_of({"a": b"1"})[:1024] + tar_of({"a/b": b"2"}),
    "empty": tar_of({}),
    "no files": member("folder", tarfile.DIRTYPE),
    "no archive": b"<html>sign in</html>",
    "nothing": b"",
    "cut off": TAR[:1_000_000],
    "cut off between two files": TAR[:1024],
    "damaged between two files": TAR[:1024] + b"x" + TAR[1025:],
    "damaged gzip": tar_of(CONTENT, "w:gz")[:-3000] + b"\0" * 3000,
    "damaged xz": tar_of(CONTENT, "w:xz")[:-300] + b"\0" * 300,
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", UNSAFE)
async def test_unsafe_and_damaged_archives_leave_nothing(storage, tmp_path, name):
    storage.script(serving(UNSAFE[name]))
    with pytest.raises(InvalidResponse, match="archive of the checkpoint"):
        await storage.download()
    assert list(tmp_path.iterdir()) == []
    assert not (tmp_path.parent / "evil").exists()


@settings(max_examples=60)
@given(st.binary(max_size=3000))
def test_any_bytes_are_an_archive_or_a_typed_error(tmp_path_factory, noise):
    folder = tmp_path_factory.mktemp("noise")
    archive = folder / "archive"
    archive.write_bytes(TAR[:600] + noise)
    with pytest.raises(InvalidResponse):
        extract(archive, folder / "files", lambda: None)
