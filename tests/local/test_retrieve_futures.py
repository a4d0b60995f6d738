"""One poll for all samples of a client: what is completed, in whose queue, and until when."""

import asyncio
from typing import Any

import pytest

from tinkex_py.local import LocalOptions
from tinkex_py.local.results import CompletionQueues

PROTOBUF = "application/x-protobuf"


async def sampler_of(client: Any) -> str:
    await client.session()
    body = {"session_id": client.session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    return (await client.ask("create_sampling_session", body))["sampling_session_id"]


async def sample(client: Any, sampler: str, number: int, **params: Any) -> str:
    body = {
        "sampling_session_id": sampler,
        "seq_id": number,
        "prompt": {"chunks": [{"tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 2, "stop": [], **params},
    }
    return (await client.ask("asample", body))["request_id"]


async def poll(client: Any, sampler: str, cursor: int = 0, clone: int = 0, **fields: Any) -> dict[str, Any]:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    return await client.ask("retrieve_futures", {"target": target, "prev_cursor": cursor, **fields})


async def completed(client: Any, sampler: str, count: int, clone: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Poll until there are so many; all of them, and the last cursor."""
    found: list[dict[str, Any]] = []
    cursor = 0
    while len(found) < count:
        answer = await poll(client, sampler, cursor, clone)
        assert (answer["cursor"] > cursor) == bool(answer["completions"])
        found += answer["completions"]
        cursor = answer["cursor"]
    return found, cursor


@pytest.mark.asyncio
async def test_every_sample_is_announced_once_with_the_size_of_its_result(client):
    sampler = await sampler_of(client)
    ids = [await sample(client, sampler, number) for number in range(5)]
    ids.append(await sample(client, sampler, 5, stop=[""]))  # cannot be drawn
    assert await sample(client, sampler, 2) == ids[2]  # again
    found, _ = await completed(client, sampler, len(ids))
    assert sorted(item["request_id"] for item in found) == sorted(ids)
    for item in found:
        result = await client.result(item["request_id"], accept=PROTOBUF)
        assert result.status_code == 200
        if item["request_id"] == ids[-1]:
            assert item == {"state": "failed", "request_id": ids[-1]}
            assert result.json()["category"] == "user"
        else:
            assert item["state"] == "finished"
            assert item["response_payload_uncompressed_size"] == len(result.content)


@pytest.mark.asyncio
async def test_unacknowledged_completions_are_returned_again(client):
    sampler = await sampler_of(client)
    await sample(client, sampler, 0)
    first = await poll(client, sampler)
    assert len(first["completions"]) == 1
    assert await poll(client, sampler) == first
    assert await poll(client, sampler, first["cursor"], timeout=0.0) == {"completions": [], "cursor": first["cursor"]}
    assert await poll(client, sampler, 0, timeout=0) == {"completions": [], "cursor": 0}
    second_id = await sample(client, sampler, 1)
    second = await poll(client, sampler, first["cursor"])
    assert [item["request_id"] for item in second["completions"]] == [second_id]
    assert second["cursor"] > first["cursor"]


@pytest.mark.asyncio
async def test_each_copy_of_a_client_has_a_queue_of_its_own(client):
    sampler = await sampler_of(client)
    clones = (0, 3, 999_999_999)
    ids = {clone: await sample(client, sampler, clone * 1_000_000_000 + 7) for clone in clones}
    for clone in clones:
        found, _ = await completed(client, sampler, 1, clone)
        assert [item["request_id"] for item in found] == [ids[clone]]
    assert (await poll(client, sampler, 0, 1, timeout=0))["completions"] == []


@pytest.mark.asyncio
async def test_results_that_a_client_has_are_freed_and_those_of_others_are_not(client):
    sampler = await sampler_of(client)
    own, other = await sample(client, sampler, 0), await sample(client, sampler, 1_000_000_000)
    _, cursor = await completed(client, sampler, 1)
    await completed(client, sampler, 1, clone=1)
    await poll(client, sampler, cursor, timeout=0, retrieved_request_ids=[own, other, "no such"])
    assert (await client.result(own)).status_code == 410
    assert (await client.result(other)).status_code == 200


@pytest.mark.asyncio
async def test_a_result_that_was_forgotten_is_announced_and_then_gone(run_service):
    async with run_service(LocalOptions(max_results=1)) as client:
        sampler = await sampler_of(client)
        ids = [await sample(client, sampler, 0)]
        await client.final(ids[0])
        ids.append(await sample(client, sampler, 1))
        assert (await client.result(ids[0])).status_code == 410
        found, _ = await completed(client, sampler, 2)
        assert [item["request_id"] for item in found] == ids
        assert {item["state"] for item in found} == {"finished"}


@pytest.mark.asyncio
async def test_a_poll_waits_and_returns_when_the_service_stops(run_service):
    async with run_service(LocalOptions(hold_seconds=40)) as client:
        sampler = await sampler_of(client)
        core = client.service.core
        target = {"sampling_session_id": sampler}
        polls = [asyncio.create_task(client.post("retrieve_futures", {"target": target})) for _ in range(3)]
        queues = core.results.completions._queues
        while not queues or queues[(sampler, 0)].polls < 3:  # noqa: ASYNC110  (a poll that waits sets no event)
            await asyncio.sleep(0)
        await sample(client, sampler, 0)
        answers = [(await task).json() for task in polls]
        assert [len(answer["completions"]) for answer in answers] == [1, 1, 1]
        late = asyncio.create_task(client.post("retrieve_futures", {"target": target, "prev_cursor": 1}))
        while not queues or not queues[(sampler, 0)].polls:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await client.service.stop()
        assert (await late).status_code == 503
        assert queues == {}


@pytest.mark.asyncio
async def test_an_unknown_sampling_session_is_404(client):
    answer = await client.post("retrieve_futures", {"target": {"sampling_session_id": "s:sample:0"}})
    assert answer.status_code == 404


@pytest.mark.asyncio
async def test_unacknowledged_completions_are_bounded():
    queues = CompletionQueues(keep=100)
    for number in range(1000):
        queues.add((f"s{number % 7}", number % 3), f"r{number}")
    kept = [
        request_id for n in range(7) for clone in range(3) for request_id in await queues.after((f"s{n}", clone), 0, 0)
    ]
    assert sorted(kept) == sorted(f"r{number}" for number in range(900, 1000))
    for n in range(7):
        for clone in range(3):
            assert await queues.after((f"s{n}", clone), 1000, 0) == {}
    assert queues._queues == {}
    assert queues._kept == {}


@pytest.mark.asyncio
async def test_many_completions_come_in_pages():
    queues = CompletionQueues(keep=5000)
    for number in range(3000):
        queues.add(("s", 0), f"r{number}")
    seen: list[str] = []
    cursor = 0
    while page := await queues.after(("s", 0), cursor, 0):
        seen += page
        cursor = max(page.values())
    assert seen == [f"r{number}" for number in range(3000)]
