"""The REST calls, written by hand: listings, search, expiry, downloads with ranges, unsupported features."""

import asyncio
import io
import sys
import tarfile
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import pyrage
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings, strategies as st

from tinkex_py.local import LocalOptions
from tinkex_py.local.checkpoints import write_archive
from tinkex_py.local.records import SessionEnd, SessionInfo
from tinkex_py.local.routes_rest import matches
from tinkex_py.local.schemas import SearchBody


async def saved(client: Any, *names: str, **fields: Any) -> list[str]:
    """Checkpoints of a new model; their paths."""
    model_id = await client.model()
    done = [
        await client.done("save_weights", {"model_id": model_id, "seq_id": number, "path": name, **fields})
        for number, name in enumerate(names, 1)
    ]
    return [answer["path"] for answer in done]


def rest_path(path: str) -> str:
    run, kind, name = path.removeprefix("tinker://").split("/")
    return f"/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"


@pytest.mark.asyncio
async def test_the_answers_have_the_fields_of_the_protocol(client):
    (path,) = await saved(client, "one", user_metadata={"a": "b"}, ttl_seconds=3600)
    run_id = path.split("/")[2]
    runs = (await client.http.get("/api/v1/training_runs")).json()
    (run,) = runs["training_runs"]
    assert runs["cursor"] == {"offset": 0, "limit": 20, "total_count": 1}
    checkpoint = run.pop("last_checkpoint")
    assert run.pop("last_request_time") >= checkpoint["time"]
    assert run == {
        "training_run_id": run_id,
        "base_model": "tiny",
        "model_owner": "local",
        "is_lora": True,
        "lora_rank": 8,
        "corrupted": False,
    }
    assert datetime.fromisoformat(checkpoint.pop("time")).tzinfo is not None
    left = datetime.fromisoformat(checkpoint.pop("expires_at")) - datetime.now(UTC)
    assert 3500 < left.total_seconds() <= 3600
    assert checkpoint.pop("size_bytes") > 0
    assert checkpoint == {
        "checkpoint_id": "weights/one",
        "checkpoint_type": "training",
        "tinker_path": path,
        "public": False,
        "user_metadata": {"a": "b"},
    }
    of_run = (await client.http.get(f"/api/v1/training_runs/{run_id}/checkpoints")).json()
    assert set(of_run) == {"checkpoints"}
    assert (await client.http.get("/api/v1/checkpoints")).json() == {
        **of_run,
        "cursor": {"offset": 0, "limit": 100, "total_count": 1},
    }


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "query",
    [
        "limit=x",
        "limit=-1",
        "offset=-1",
        "limit=1e3",
        "offset=99999999999",
        "limit=²",
        "limit=-0",
        "limit=+1",
        "limit=1_0",
    ],
)
async def test_pages_that_make_no_sense_are_refused(shared, query):
    for path in ("training_runs", "checkpoints", "sessions"):
        assert (await shared.http.get(f"/api/v1/{path}?{query}")).status_code == 422


@pytest.mark.asyncio
async def test_pages_of_runs(client):
    runs = [await client.model(number) for number in range(2)]
    client.session_id = (await client.ask("create_session", {"project_id": "p"}))["session_id"]
    runs.append(await client.model())
    for project, expected in (("p", runs[2:]), ("q", [])):
        answer = (await client.http.get(f"/api/v1/training_runs?project_id={project}")).json()
        assert [run["training_run_id"] for run in answer["training_runs"]] == expected
    for query, page, expected in (
        ("", {"offset": 0, "limit": 20}, runs[::-1]),
        ("?limit=2", {"offset": 0, "limit": 2}, runs[:0:-1]),
        ("?limit=0&offset=4", {"offset": 4, "limit": 0}, []),
        ("?offset=2", {"offset": 2, "limit": 20}, runs[:1]),
    ):
        answer = (await client.http.get(f"/api/v1/training_runs{query}")).json()
        assert answer["cursor"] == {**page, "total_count": 3}
        assert [run["training_run_id"] for run in answer["training_runs"]] == expected


@pytest.mark.asyncio
async def test_what_can_be_got_can_be_asked_for_without_its_body(client):
    (path,) = await saved(client, "one")
    archive = await client.http.head(f"{rest_path(path)}/archive")
    assert archive.status_code == 302
    got, asked = [await client.http.request(method, archive.headers["location"]) for method in ("GET", "HEAD")]
    assert asked.status_code == 200
    assert (asked.headers["content-length"], asked.content) == (got.headers["content-length"], b"")
    for known in ("/api/v1/healthz", "/api/v1/training_runs"):
        assert (await client.http.head(known)).status_code == 200
    assert (await client.http.head("/api/v1/asample")).status_code == 405


@pytest.mark.asyncio
async def test_expired_checkpoints_are_gone_with_their_files(client):
    """The service itself deletes them when their time comes, without being asked."""
    paths = await saved(client, "short", "long")
    store = client.service.core.store
    folders = [store.file(store.find(path), "") for path in paths]
    for invalid in (0, -1, "soon", 1.5, 10**12):
        answer = await client.http.put(f"{rest_path(paths[0])}/ttl", json={"ttl_seconds": invalid})
        assert answer.status_code == 422, invalid
    answer = await client.http.put(f"{rest_path(paths[0])}/ttl", json={"ttl_seconds": 1})
    assert answer.status_code == 200
    assert folders[0].exists()
    async with asyncio.timeout(20):
        while folders[0].exists():  # noqa: ASYNC110  (a folder has no event)
            await asyncio.sleep(0.02)
    assert folders[1].exists()
    listed = (await client.http.get("/api/v1/checkpoints")).json()["checkpoints"]
    assert [item["tinker_path"] for item in listed] == [paths[1]]
    load = {"session_id": client.session_id, "model_seq_id": 1, "path": paths[0]}
    assert "there is no checkpoint" in (await client.done("load_weights", load))["error"]
    model_id = paths[0].split("/")[2]
    again = {"model_id": model_id, "seq_id": 3, "path": "short", "overwrite": False}
    assert (await client.done("save_weights", again))["path"] == paths[0]


@pytest.mark.asyncio
async def test_what_belongs_to_accounts_is_clearly_not_there(client):
    session_id = await client.session()
    for method, path in (
        ("GET", "billing/usage/events?starting_on=a&ending_before=b"),
        ("GET", "billing/usage/checkpoints/current"),
        ("GET", "audit?event_type=all"),
        ("PUT", f"sessions/{session_id}/project"),
        ("GET", f"sessions/{session_id}/trace_export"),
    ):
        answer = await client.http.request(method, f"/api/v1/{path}")
        assert answer.status_code == 404
        assert answer.json()["code"] == "unsupported_feature"
        assert "no accounts" in answer.json()["detail"]


@pytest.mark.asyncio
async def test_the_first_reason_for_a_session_to_end_wins(client):
    session_id = await client.session()
    for reason, detail in (("errored", "it broke"), ("success", None)):
        body = {"reason": {"type": reason}, "detail": detail}
        assert (await client.post(f"sessions/{session_id}/finish", body)).status_code == 200
    assert (await client.post("session_heartbeat", {"session_id": session_id})).status_code == 410
    (summary,) = (await client.ask("sessions/search", {"session_id": session_id}))["sessions"]
    expected = {"type": "client_finished", "reason": {"type": "errored"}, "detail": "it broke"}
    assert summary["status"] == expected
    assert (await client.post(f"sessions/{session_id}/finish", {"reason": {"type": "bored"}})).status_code == 422
    assert (await client.post("sessions/nowhere/finish", {})).status_code == 404


def session(name: str | None = None, end: str | None = None, **fields: Any) -> SessionInfo:
    finished = None if end is None else SessionEnd(reason=end)
    return SessionInfo(session_id="s1", created=datetime.now(UTC), display_name=name, end=finished, **fields)


@pytest.mark.parametrize(
    ("found", "query", "expected"),
    [
        (session(), {}, True),
        (session("Nightly Run 7"), {"display_name": "RUN night"}, True),
        (session("Nightly Run 7"), {"display_name": "run 8"}, False),
        (session("Nightly"), {"display_name": "other", "session_id": "s1"}, True),
        (session("Nightly"), {"display_name": "nightly", "session_id": "s2"}, True),
        (session("Nightly"), {"display_name": "other", "session_id": "s2"}, False),
        (session(), {"session_id": "s2"}, False),
        (session(), {"display_name": "x"}, False),
        (session(user_metadata={"a": "1", "b": "2"}), {"user_metadata": {"a": "1"}}, True),
        (session(user_metadata={"a": "1"}), {"user_metadata": {"a": "1", "b": "2"}}, False),
        (session(), {"user_metadata": {"a": "1"}}, False),
        (session(project_id="p"), {"project_ids": ["q", "p"]}, True),
        (session(project_id="p"), {"project_ids": []}, False),
        (session(), {"project_ids": ["local"]}, True),
        (session(), {"statuses": [{"type": "active"}]}, True),
        (session(end="success"), {"statuses": [{"type": "active"}]}, False),
        (session(end="success"), {"statuses": [{"type": "failed"}, {"type": "client_finished"}]}, True),
        (session(end="success"), {"statuses": [{"type": "client_finished", "reasons": ["errored"]}]}, False),
        (session(end="errored"), {"statuses": [{"type": "client_finished", "reasons": ["errored"]}]}, True),
        (session(), {"owner": {"type": "accessible"}}, True),
        (session(), {"owner": {"type": "user", "owner_urns": ["local"]}}, True),
        (session(), {"owner": {"type": "user", "owner_urns": ["else"]}}, False),
    ],
)
def test_which_sessions_fit_a_query(found, query, expected):
    assert matches(found, SearchBody.model_validate(query)) is expected


@pytest.mark.asyncio
async def test_the_archive_is_a_tar_file_that_is_served_in_ranges(client):
    (path,) = await saved(client, "one")
    asked = await client.http.get(f"{rest_path(path)}/archive")
    assert asked.status_code == 302
    assert asked.headers["expires"].endswith("GMT")
    where = asked.headers["location"]
    whole = await client.http.get(where)
    assert whole.status_code == 200
    assert whole.headers["accept-ranges"] == "bytes"
    assert int(whole.headers["content-length"]) == len(whole.content)
    store = client.service.core.store
    files = {file.name: file.read_bytes() for file in store.files(store.find(path))}
    with tarfile.open(fileobj=io.BytesIO(whole.content)) as tar:
        assert {name: tar.extractfile(name).read() for name in tar.getnames()} == files
    tag = whole.headers["etag"]
    part = await client.http.get(where, headers={"Range": "bytes=1000-", "If-Range": tag})
    assert part.status_code == 206
    assert part.content == whole.content[1000:]
    assert part.headers["content-range"] == f"bytes 1000-{len(whole.content) - 1}/{len(whole.content)}"
    changed = await client.http.get(where, headers={"Range": "bytes=1000-", "If-Range": '"other"'})
    assert (changed.status_code, changed.content) == (200, whole.content)
    beyond = await client.http.get(where, headers={"Range": f"bytes={len(whole.content)}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(whole.content)}")


@pytest.mark.asyncio
async def test_an_archive_is_the_same_again_after_a_restart(run_service, tmp_path):
    options = LocalOptions(state_dir=tmp_path)
    answers = []
    async with run_service(options) as client:
        (path,) = await saved(client, "one")
        answers.append(await client.http.get((await client.http.get(f"{rest_path(path)}/archive")).headers["location"]))
    assert [file.suffix for file in (tmp_path / "archives").iterdir()] == [".tar"]
    async with run_service(options) as client:
        assert list((tmp_path / "archives").iterdir()) == []
        answers.append(await client.http.get((await client.http.get(f"{rest_path(path)}/archive")).headers["location"]))
        await client.http.delete(rest_path(path))
        assert list((tmp_path / "archives").iterdir()) == []
    assert answers[0].content == answers[1].content
    assert answers[0].headers["etag"] == answers[1].headers["etag"]


@pytest.mark.asyncio
async def test_external_weights_are_downloaded_file_by_file(client):
    model_id = await client.model()
    body = {"model_id": model_id, "seq_id": 1, "path": "out"}
    answer = await client.done("save_weights_external", body)
    assert answer["path"] == f"tinker://{model_id}/external_weights/out"
    asked = (await client.http.get(f"{rest_path(answer['path'])}/external_weights_urls")).json()
    assert set(asked["urls"]) == {"adapter_model.safetensors", "adapter_config.json"}
    assert datetime.fromisoformat(asked["expires"]) > datetime.now(UTC)
    contents = [(await client.http.get(url)).content for url in asked["urls"].values()]
    assert sum(map(len, contents)) == answer["size_bytes"]
    (listed,) = (await client.http.get("/api/v1/checkpoints")).json()["checkpoints"]
    assert listed["checkpoint_type"] == "external"
    training = await client.done("save_weights", {"model_id": model_id, "seq_id": 2, "path": "in"})
    refused = await client.http.get(f"{rest_path(training['path'])}/external_weights_urls")
    assert refused.status_code == 400
    sampling = {"session_id": client.session_id, "sampling_session_seq_id": 0, "model_path": answer["path"]}
    assert (await client.post("create_sampling_session", sampling)).status_code == 404
    load = {"session_id": client.session_id, "model_seq_id": 1, "path": answer["path"]}
    assert "needed here: weights" in (await client.done("load_weights", load))["error"]


@pytest.mark.asyncio
async def test_external_weights_are_encrypted_to_every_recipient(client):
    first, second = pyrage.x25519.Identity.generate(), Ed25519PrivateKey.generate()
    recipients = [str(first.to_public()), second.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)]
    model_id = await client.model()

    async def contents(seq_id: int, **fields):
        answer = await client.done("save_weights_external", {"model_id": model_id, "seq_id": seq_id, **fields})
        urls = (await client.http.get(f"{rest_path(answer['path'])}/external_weights_urls")).json()["urls"]
        return {name: (await client.http.get(url)).content for name, url in urls.items()}

    plain = await contents(1, path="plain")
    sealed = await contents(2, path="sealed", age_encryption_recipients=[recipients[0], recipients[1].decode()])
    private = second.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    for identity in (first, pyrage.ssh.Identity.from_buffer(private)):
        opened = {name: pyrage.decrypt(content, [identity]) for name, content in sealed.items()}
        assert opened == {f"{name}.age": content for name, content in plain.items()}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("recipients", "reason"),
    [
        (["age1"], "[0] is not a public key"),
        (["ssh-ed25519 x"], "[0] is not a public key"),
        (["age1"] * 11, "has 11 keys"),
        (["no pyrage"], "pip install 'tinkex-py[age]'"),
    ],
)
async def test_weights_that_cannot_be_encrypted_are_not_saved(client, monkeypatch, recipients, reason):
    if recipients == ["no pyrage"]:
        monkeypatch.setitem(sys.modules, "pyrage", None)
    body = {"model_id": await client.model(), "seq_id": 1, "path": "out", "age_encryption_recipients": recipients}
    assert reason in (await client.done("save_weights_external", body))["error"]
    assert (await client.http.get("/api/v1/checkpoints")).json()["checkpoints"] == []


@pytest.mark.asyncio
async def test_many_requests_at_once_are_all_kept(client):
    sessions = await asyncio.gather(*(client.ask("create_session", {}) for _ in range(40)))
    listed = (await client.http.get("/api/v1/sessions?limit=100")).json()["sessions"]
    assert sorted(listed) == sorted(answer["session_id"] for answer in sessions)


@settings(max_examples=30)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=5), st.binary(max_size=2000), min_size=1, max_size=4))
def test_an_archive_depends_on_names_contents_and_moment_alone(tmp_path_factory, contents):
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    archives = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("files")
        files = [folder / name for name in sorted(contents)]
        for file in files:
            file.write_bytes(contents[file.name])
        archive = tmp_path_factory.mktemp("archive") / "a.tar"
        write_archive(archive, files, moment)
        archives.append((archive.read_bytes(), archive.stat().st_mtime))
    assert archives[0] == archives[1]
    with tarfile.open(fileobj=io.BytesIO(archives[0][0])) as tar:
        assert {name: tar.extractfile(name).read() for name in tar.getnames()} == contents


@pytest.mark.asyncio
async def test_addresses_name_the_host_that_was_asked(client):
    (path,) = await saved(client, "one")
    answer = await client.http.get(f"{rest_path(path)}/archive", headers={"Host": "example.org:81"})
    assert urlsplit(answer.headers["location"]).netloc == "example.org:81"
