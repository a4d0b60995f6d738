"""AsyncRestClient against the real embedded service over HTTP, and against services that lack things."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from safetensors.torch import load_file

from tests.client.data import datum
from tests.client.recorder import KEY, after, answering, lose_the_answer, quick_config
from tests.support.scripted_server import Request, ScriptedServer, answer, computed
from tinkex_py import (
    APIStatusError,
    AsyncRestClient,
    AsyncServiceClient,
    Authentication,
    Checkpoint,
    CheckpointPath,
    ClientClosed,
    InvalidData,
    InvalidResponse,
    NotFound,
    SessionQuery,
    TrainingRun,
    UnsupportedFeature,
)
from tinkex_py.types import Cursor
from tinkex_py.types.checkpoint_path import url_segment

pytestmark = pytest.mark.asyncio
CONFIG = "/api/v1/client/config"
NOWHERE = "tinker://nowhere/weights/x"


def asked(server: ScriptedServer) -> list[Request]:
    """All requests but the one for the service's settings."""
    return [request for request in server.requests if request.path != CONFIG]


@pytest_asyncio.fixture
async def scripted() -> AsyncIterator[tuple[ScriptedServer, AsyncRestClient]]:
    """A scripted service and a REST client of it."""
    async with ScriptedServer() as server:
        server.script(CONFIG, answer(json={}))
        async with aclosing(AsyncServiceClient(quick_config(server.url))) as service:
            yield server, service.create_rest_client()


async def collect(items: Any) -> list[Any]:
    return [item async for item in items]


async def test_runs_and_checkpoints_newest_first_page_by_page(http_bench):
    rest = http_bench.service.create_rest_client()
    trainings = [await http_bench.train() for _ in range(5)]
    ids = [training.model_id for training in reversed(trainings)]
    for size in (1, 2, 5, 100):
        assert [run.training_run_id for run in await collect(rest.training_runs(page_size=size))] == ids
    page = await rest.training_runs_page(limit=2, offset=3)
    assert [run.training_run_id for run in page.training_runs] == ids[3:]
    assert page.cursor == Cursor(offset=3, limit=2, total_count=5)
    assert (await rest.training_runs_page(limit=2, offset=9)).training_runs == ()

    first, second = trainings[:2]
    paths = [(await first.save_state(f"s{number}")).path for number in range(3)]
    paths.append((await first.save_weights_for_sampler("s0")).path)
    paths.append((await second.save_state("s0")).path)
    for size in (1, 3, 100):
        assert [item.tinker_path for item in await collect(rest.checkpoints(page_size=size))] == paths[::-1]
    of_first = await collect(rest.checkpoints(first.model_id))
    assert [item.tinker_path for item in of_first] == paths[3::-1]
    assert of_first == await collect(rest.checkpoints(paths[0], page_size=1))
    assert [item.checkpoint_type for item in of_first] == ["sampler", "training", "training", "training"]

    run = await rest.get_training_run(paths[0])
    assert run == await rest.get_training_run(first.model_id)
    assert (run.base_model, run.lora_rank, run.is_lora, run.corrupted) == ("tiny", 4, True, False)
    assert run.last_checkpoint == of_first[1]
    assert run.last_sampler_checkpoint == of_first[0]
    assert timedelta(0) <= datetime.now(UTC) - run.last_request_time < timedelta(minutes=5)


async def test_what_a_checkpoint_is(http_bench):
    rest = http_bench.service.create_rest_client()
    training = await http_bench.train(train_unembed=False)
    path = (await training.save_state("one")).path
    checkpoint = await rest.get_checkpoint(path)
    assert isinstance(checkpoint, Checkpoint)
    assert (checkpoint.checkpoint_id, checkpoint.tinker_path) == ("weights/one", path)
    assert checkpoint.size_bytes > 1000
    assert (checkpoint.public, checkpoint.expires_at) == (False, None)
    info = await rest.get_weights_info(path)
    assert (info.base_model, info.lora_rank) == ("tiny", 4)
    assert (info.train_unembed, info.train_mlp, info.train_attn) == (False, True, True)


async def test_expiry_publishing_and_deleting(http_bench):
    rest = http_bench.service.create_rest_client()
    training = await http_bench.train()
    path = (await training.save_state("one", ttl_seconds=7200)).path

    async def state() -> tuple[bool, int | None]:
        found = await rest.get_checkpoint(path)
        left = None if found.expires_at is None else round((found.expires_at - datetime.now(UTC)).total_seconds(), -2)
        return found.public, left

    assert await state() == (False, 7200)
    await rest.set_checkpoint_ttl(path, 36000)
    for _ in range(2):
        await rest.publish_checkpoint(path)
    assert await state() == (True, 36000)
    await rest.set_checkpoint_ttl(path, None)
    for _ in range(2):
        await rest.unpublish_checkpoint(path)
    assert await state() == (False, None)
    await rest.delete_checkpoint(path)
    assert await collect(rest.checkpoints()) == []
    for call in (
        rest.get_checkpoint(path),
        rest.delete_checkpoint(path),
        rest.publish_checkpoint(path),
        rest.unpublish_checkpoint(path),
        rest.set_checkpoint_ttl(path, 3600),
        rest.get_weights_info(path),
        rest.get_archive_url(path),
        rest.get_training_run("nowhere"),
        rest.get_checkpoint(NOWHERE),
        rest.get_session("nowhere"),
        rest.get_sampler("nowhere"),
        collect(rest.checkpoints("nowhere")),
    ):
        with pytest.raises(NotFound):
            await call
    assert [run.last_checkpoint for run in await collect(rest.training_runs())] == [None]


async def test_a_delete_whose_answer_is_lost_is_done(http_bench):
    rest = http_bench.service.create_rest_client()
    path = (await (await http_bench.train()).save_state("one")).path
    http_bench.recorder.faults["one"] = [lose_the_answer]
    await rest.delete_checkpoint(path)
    assert [arrival.status for arrival in http_bench.recorder.of("one")] == [200, 404]


async def test_sessions_samplers_and_search(http_bench):
    service, recorder = http_bench.service, http_bench.recorder
    rest = service.create_rest_client()
    training = await http_bench.train()
    sampler = await service.create_sampling_client(base_model="tiny")
    named = (await training.save_weights_for_sampler("final")).path
    trained = await service.create_sampling_client(model_path=named)
    (session_id,) = await collect(rest.sessions())
    session = await rest.get_session(session_id)
    assert session.training_run_ids == (training.model_id,)
    assert set(session.sampler_ids) == {sampler.sampling_session_id, trained.sampling_session_id}
    found = await rest.get_sampler(trained.sampling_session_id)
    assert (found.base_model, found.model_path) == ("tiny", named)
    assert (await rest.get_sampler(sampler.sampling_session_id)).model_path is None

    url = service.config.base_url
    for number in range(4):
        labels = {"kind": "even" if number % 2 == 0 else "odd"}
        async with AsyncServiceClient(quick_config(url, user_metadata=labels, project_id=f"p{number // 2}")):
            pass
    ids = await collect(rest.sessions(page_size=2))
    assert len(ids) == 5
    assert ids[-1] == session_id
    assert list((await rest.sessions_page(limit=2, offset=1)).sessions) == ids[1:3]

    async def searched(page_size: int = 50, **query: Any) -> list[str]:
        return [found.session_id async for found in rest.search_sessions(SessionQuery(**query), page_size=page_size)]

    for size in (1, 2, 50):
        assert await searched(size) == ids
    assert await searched(user_metadata={"kind": "odd"}, page_size=1) == [ids[0], ids[2]]
    assert await searched(project_ids=["p0"]) == ids[2:4]
    assert await searched(statuses=["active"]) == [session_id]
    assert await searched(statuses=["client_finished"]) == ids[:4]
    assert await searched(statuses=["cancelled", "failed"]) == []
    assert await searched(session_id=ids[1]) == [ids[1]]
    assert await searched(session_id="nowhere") == []
    summary = (await rest.search_sessions_page(SessionQuery(session_id=session_id), limit=1)).sessions[0]
    assert summary.checkpoints_count == 1
    assert summary.checkpoint_storage_bytes == (await rest.get_checkpoint(named)).size_bytes
    (over,) = (await rest.search_sessions_page(SessionQuery(session_id=ids[0]))).sessions
    assert (over.status.type, over.status.reason) == ("client_finished", {"type": "success"})
    assert over.project_id == "p1"
    assert "create_session" not in [arrival.kind for arrival in recorder.arrivals[-5:]]


async def test_copies_and_external_weights(http_bench):
    rest = http_bench.service.create_rest_client()
    path = (await (await http_bench.train()).save_state("one", ttl_seconds=3600)).path
    (session_id,) = await collect(rest.sessions())
    copies = [await rest.copy_checkpoint(path, session_id=session_id, model_number=7) for _ in range(2)]
    assert copies == [f"tinker://{session_id}:train:7/weights/one"] * 2
    assert (await rest.get_checkpoint(copies[0])).expires_at is None
    await rest.delete_checkpoint(path)
    again = await http_bench.service.create_training_client_from_state(copies[0], with_optimizer=True)
    await again.forward_backward([datum(3, 1)])
    with pytest.raises(NotFound, match="no projects"):
        await rest.copy_checkpoint(copies[0], project_id="p")
    with pytest.raises(APIStatusError, match="choose another"):
        await rest.copy_checkpoint(copies[0], session_id=session_id, model_number=0)
    with pytest.raises(UnsupportedFeature, match="does not support putting sessions into projects"):
        await rest.assign_session_project(session_id, "p")
    with pytest.raises(InvalidData, match="only those have URLs of files"):
        await rest.get_external_weights_urls(copies[0])


async def test_a_downloaded_checkpoint_has_the_weights(http_bench, tmp_path):
    rest = http_bench.service.create_rest_client()
    training = await http_bench.train()
    await training.forward_backward([datum(5, 1)])
    await training.optim_step()
    path = (await training.save_state("one")).path
    folder = await rest.download_checkpoint(path, tmp_path / "deep" / "model")
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
    ]
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(weights[key].abs().max() > 0 for key in weights if "lora_B" in key)
    with pytest.raises(NotFound):
        await rest.download_checkpoint(NOWHERE, tmp_path / "other")
    assert [entry.name for entry in tmp_path.iterdir()] == ["deep"]


def cut_after(count: int) -> Any:
    """The connection breaks after so many bytes of the body."""

    async def fault(arrival: Any, serve: Any, send: Any) -> None:
        sent = 0

        async def forward(event: Any) -> None:
            nonlocal sent
            if event["type"] == "http.response.start":
                await send(event)
            elif sent < count:
                part = event["body"][: count - sent]
                sent += len(part)
                await send({**event, "body": part, "more_body": True})

        await serve(forward)

    return fault


async def test_a_broken_download_from_the_embedded_service_goes_on(http_bench, tmp_path):
    rest = http_bench.service.create_rest_client()
    path = (await (await http_bench.train(rank=32)).save_state("one")).path
    http_bench.recorder.faults["archive.tar"] = [cut_after(150_000), cut_after(20_000)]
    folder = await rest.download_checkpoint(path, tmp_path / "model")
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size == (await rest.get_checkpoint(path)).size_bytes
    load_file(folder / "optimizer.safetensors")
    starts = [arrival.headers.get("range") for arrival in http_bench.recorder.of("archive.tar")]
    assert starts == [None, "bytes=150000-", "bytes=170000-"]
    assert [arrival.status for arrival in http_bench.recorder.of("archive.tar")] == [200, 206, 206]


async def test_it_needs_no_session_and_does_no_work_before_the_first_call(http_bench):
    url = http_bench.service.config.base_url
    before = len(http_bench.recorder.arrivals)
    service = AsyncServiceClient(quick_config(url))
    rest = service.create_rest_client()
    assert len(http_bench.recorder.arrivals) == before
    (model,) = (await rest.get_server_capabilities()).supported_models
    assert model.model_name == "tiny"
    await collect(rest.training_runs())
    assert [arrival.kind for arrival in http_bench.recorder.arrivals[before:]] == [
        "config",
        "get_server_capabilities",
        "training_runs",
    ]
    await service.aclose()
    with pytest.raises(ClientClosed):
        await rest.training_runs_page()


async def test_rest_calls_to_the_embedded_service(tmp_path):
    service = AsyncServiceClient.local(model="tiny", state_dir=tmp_path / "state")
    rest = service.create_rest_client()
    assert await collect(rest.training_runs()) == []
    training = await service.create_lora_training_client("tiny", rank=4)
    path = (await training.save_state("one")).path
    folder = await rest.download_checkpoint(path, tmp_path / "model")
    assert (folder / "adapter_config.json").is_file()
    await service.aclose()


async def test_a_client_left_open_is_warned_about():
    async with ScriptedServer() as server:
        server.script("/api/v1/sessions", answer(json={"sessions": []}))
        service = AsyncServiceClient(quick_config(server.url))
        await collect(service.create_rest_client().sessions())
        finalizer = service._finalizer
        with pytest.warns(ResourceWarning, match="was left open"):
            finalizer()
        await service.aclose()


async def test_listings_are_cancelled_at_once(http_bench):
    rest = http_bench.service.create_rest_client()
    gate = asyncio.Event()
    http_bench.recorder.faults["training_runs"] = [after(gate)]
    task = asyncio.create_task(collect(rest.training_runs()))
    await http_bench.recorder.until(lambda: bool(http_bench.recorder.of("training_runs")))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    assert await collect(rest.training_runs()) == []


MISSING = {
    "a framework's 404": answer(404, json={"detail": "Not Found"}),
    "a bare 404": answer(404),
    "another router's 404": answer(404, b"404 page not found"),
    "another method": answer(405, json={"detail": "Method Not Allowed"}),
    "not implemented": answer(501),
    "said by code": answer(404, json={"detail": "we have none", "code": "unsupported_feature"}),
}


@pytest.mark.parametrize("name", MISSING)
async def test_a_missing_endpoint_names_the_server_and_the_feature(name):
    async with ScriptedServer() as server:
        server._default = MISSING[name]
        server.script(CONFIG, answer(json={}))
        service = AsyncServiceClient(quick_config(server.url, retry=quick_config().retry.none()))
        rest = service.create_rest_client()
        path = "tinker://run/weights/x"
        calls = {
            "listing training runs": rest.training_runs_page(),
            "showing a training run": rest.get_training_run("run"),
            "listing checkpoints": rest.checkpoints_page("run"),
            "listing the checkpoints of all runs": rest.checkpoints_page(),
            "describing a checkpoint": rest.get_weights_info(path),
            "changing when a checkpoint expires": rest.set_checkpoint_ttl(path, 3600),
            "publishing checkpoints": rest.publish_checkpoint(path),
            "deleting checkpoints": rest.delete_checkpoint(path),
            "copying checkpoints": rest.copy_checkpoint(path, project_id="p"),
            "checkpoints as archives": rest.get_archive_url(path),
            "listing sessions": rest.sessions_page(),
            "showing a session": rest.get_session("s"),
            "searching sessions": rest.search_sessions_page(),
            "showing a sampler": rest.get_sampler("s"),
            "putting sessions into projects": rest.assign_session_project("s", "p"),
            "addresses of external weights": rest.get_external_weights_urls("tinker://r/external_weights/x"),
        }
        for feature, call in calls.items():
            with pytest.raises(
                UnsupportedFeature, match=f"127.0.0.1:{server.port} does not support {feature} "
            ) as caught:
                await call
            assert isinstance(caught.value.__cause__, APIStatusError)
        await service.aclose()


async def test_a_missing_thing_is_not_a_missing_endpoint(scripted):
    server, rest = scripted
    server._default = answer(404, json={"detail": "Training run not found"})
    with pytest.raises(NotFound, match="Training run not found"):
        await rest.get_training_run("run")
    with pytest.raises(UnsupportedFeature):  # it names nothing that could be missing
        await rest.training_runs_page()


def runs(*ids: str) -> list[dict[str, Any]]:
    return [{"training_run_id": run_id, "base_model": "m"} for run_id in ids]


async def test_listings_end_whatever_the_service_does_with_pages(scripted):
    everything = [f"r{number}" for number in range(7)]
    page = runs(*everything)

    def without_cursor(request: Any) -> Any:
        query = dict(part.split("=") for part in request.target.partition("?")[2].split("&"))
        start = int(query["offset"])
        return answer(json={"training_runs": page[start : start + int(query["limit"])]})

    server, rest = scripted
    path = "/api/v1/training_runs"

    async def listed(size: int) -> list[str]:
        return [run.training_run_id async for run in rest.training_runs(page_size=size)]

    server.script(path, computed(without_cursor))
    for size in (1, 3, 7, 10):
        assert await listed(size) == everything
    server.script(path, answer(json={"training_runs": page}))  # ignores the page
    for size in (3, 7, 10):
        before = len(server.requests)
        assert await listed(size) == everything
        assert len(server.requests) - before <= 2
    moved = [runs("b", "a"), runs("a", "z"), []]  # one was added between two pages
    cursor = {"offset": 0, "limit": 2, "total_count": 5}
    server.script(path, *(answer(json={"training_runs": part, "cursor": cursor}) for part in moved))
    assert await listed(2) == ["b", "a", "z"]


async def test_answers_are_read_leniently_and_checked(scripted):
    server, rest = scripted
    path = "/api/v1/training_runs/r"
    fields = {
        **runs("r")[0],
        "last_request_time": "2026-01-02T03:04:05",
        "brand_new": [1],
        "last_checkpoint": {"checkpoint_id": "x", "checkpoint_type": "later", "tinker_path": "p", "time": None},
    }
    server.script(path, answer(json=fields))
    run = await rest.get_training_run("r")
    assert run.last_request_time == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert run.last_checkpoint.checkpoint_type == "later"
    assert TrainingRun.model_validate_json(run.model_dump_json()) == run
    for bad in ({"training_run_id": "r"}, {**fields, "lora_rank": "many"}, {**fields, "last_request_time": "soon"}):
        server.script(path, answer(json=bad))
        with pytest.raises(InvalidResponse, match="an invalid TrainingRun"):
            await rest.get_training_run("r")
    server.script(path, answer(json=[1]))
    with pytest.raises(InvalidResponse, match="not an object"):
        await rest.get_training_run("r")
    server.script(path, answer(401))
    with pytest.raises(Authentication):
        await rest.get_training_run("r")


async def test_bad_arguments_are_named_and_nothing_is_sent(scripted):
    server, rest = scripted
    good = "tinker://run/weights/x"
    bad_paths = ["", "x", "http://run/weights/x", "tinker://run/weights", "tinker://run/weights/x/y", None, 3]
    bad_paths += ["tinker:///weights/x", "tinker://run/weights/", "tinker://run/other/x", "tinker://../weights/x"]
    bad_paths += ["tinker://run/weights/..", "tinker://run/weights/a\0b", "tinker://run/weights/a\nb"]
    for path in bad_paths:
        for call in (rest.get_checkpoint, rest.delete_checkpoint, rest.get_archive_url, rest.publish_checkpoint):
            with pytest.raises(InvalidData):
                await call(path)
    for run in ("", "a/b", "..", "a\0", None, "tinker://x"):
        with pytest.raises(InvalidData):
            await rest.get_training_run(run)
    for size in (0, -1, 1.5, True, "2", None):
        with pytest.raises(InvalidData, match="page_size"):
            await collect(rest.checkpoints(page_size=size))
        with pytest.raises(InvalidData, match="limit"):
            await rest.sessions_page(limit=size)
    for offset in (-1, None, 0.5):
        with pytest.raises(InvalidData, match="offset"):
            await rest.training_runs_page(offset=offset)
    for ttl in (0, -5, 1.5, True, "3600"):
        with pytest.raises(InvalidData, match="ttl_seconds"):
            await rest.set_checkpoint_ttl(good, ttl)
    for place in ({}, {"project_id": "p", "session_id": "s"}, {"session_id": "s"}, {"model_number": 1}):
        with pytest.raises(InvalidData, match="pass either project_id, or"):
            await rest.copy_checkpoint(good, **place)
    for session_id in ("", "a/b", "..", None):
        with pytest.raises(InvalidData, match="session_id"):
            await rest.get_session(session_id)
    assert server.requests == []


async def test_odd_names_arrive_as_they_are(scripted):
    server, rest = scripted
    server._default = answer(json={})
    await rest.delete_checkpoint("tinker://s1:train:0/weights/a b?c#d%é")
    (request,) = asked(server)
    assert request.target == ("/api/v1/training_runs/s1:train:0/checkpoints/weights/a%20b%3Fc%23d%25%C3%A9")


async def test_a_copy_has_one_key_over_all_attempts(scripted):
    server, rest = scripted
    server.script("/api/v1/copy_weights", answer(503), answer(json={"tinker_path": "tinker://a/weights/b"}))
    for token in ("secret", None):
        copied = await rest.copy_checkpoint("tinker://r/weights/x", project_id="p", access_token=token)
        assert copied == "tinker://a/weights/b"
    keys = [request.headers["x-idempotency-key"] for request in asked(server)]
    assert keys[0] == keys[1] != keys[2]
    tokens = [request.headers.get("x-tinker-weights-access-token") for request in asked(server)]
    assert tokens == ["secret", "secret", None]
    assert asked(server)[0].json() == {"source_path": "tinker://r/weights/x", "destination_project_id": "p"}


async def test_the_key_is_exchanged_where_the_service_wants_tokens(scripted, tmp_path):
    claims = base64.urlsafe_b64encode(json.dumps({"exp": time.time() + 3600, "iat": time.time()}).encode()).decode()
    token = f"eyJhbGciOiJub25lIn0.{claims.rstrip('=')}.x"
    server, rest = scripted
    server._default = answer(json={"sessions": []})
    server.script(CONFIG, answer(json={"pjwt_auth_enabled": True}))
    server.script("/api/v1/auth/token", answer(json={"jwt": token}))
    location = {"location": f"{server.url}/file"}
    server.script("/api/v1/training_runs/r/checkpoints/weights/x/archive", answer(302, headers=location))
    server.script("/file", answer(404, json={"detail": "gone"}))
    for _ in range(2):
        await rest.sessions_page()
    with pytest.raises(NotFound, match="gone"):
        await rest.download_checkpoint("tinker://r/weights/x", tmp_path / "model")
    sent = [(request.path.rsplit("/", 1)[-1], request.headers["x-api-key"]) for request in server.requests]
    assert sent == [
        ("config", KEY),
        ("token", KEY),
        *[("sessions", token)] * 2,
        ("archive", token),
        ("file", token),
    ]


async def test_an_http_fault_keeps_its_type(http_bench):
    rest = http_bench.service.create_rest_client()
    http_bench.recorder.faults["training_runs"] = [answering(500), answering(429), None]
    assert await collect(rest.training_runs()) == []
    http_bench.recorder.faults["training_runs"] = [answering(403)]
    with pytest.raises(PermissionError):
        await collect(rest.training_runs())


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
@pytest.mark.parametrize("name", ["x", "a b", "?#%&", "é", "...", "s:train:0", "tinker:"])
async def test_paths_are_read_back(kind, name):
    path = CheckpointPath(name, kind, name)
    assert CheckpointPath.parse(str(path)) == path
    assert path.checkpoint_id == f"{kind}/{name}"
    assert not set(url_segment(name)) & set("/?#% ") - {"%"}


async def test_addresses_in_the_forms_of_other_services():
    """SkyRL leaves the kind of sampler weights out; hatchery has a kind of its own."""
    archive = "/api/v1/training_runs/r/checkpoints/sampler_weights/x/archive"
    alone = "/api/v1/training_runs/r/checkpoints/x/archive"
    async with ScriptedServer() as server:
        server.script(archive, answer(404, json={"detail": "Not Found"}))
        server.script(alone, answer(302, headers={"location": "http://127.0.0.1:1/x.tar"}))
        server.script("/api/v1/weights_info", answer(json={"base_model": "tiny", "is_lora": True, "lora_rank": 4}))
        async with aclosing(AsyncServiceClient(quick_config(server.url))) as service:
            rest = service.create_rest_client()
            assert (await rest.get_archive_url("tinker://r/x")).url == "http://127.0.0.1:1/x.tar"
            assert (await rest.get_weights_info("tinker://r/checkpoints/x")).lora_rank == 4
            for bad in ("", "x", "tinker://r", "tinker://r/../x", "tinker://r//x", None):
                with pytest.raises(InvalidData):
                    await rest.get_weights_info(bad)
        (asked,) = server.requests_to("/api/v1/weights_info")
        assert asked.json() == {"tinker_path": "tinker://r/checkpoints/x"}
