"""Bodies that are larger, deeper or fuller than they look."""

import json
import tracemalloc

import pytest
import zstandard

from tinkex_py.local import LocalOptions
from tinkex_py.local.bodies import MAX_JSON_DEPTH, MAX_JSON_PARTS

pytestmark = pytest.mark.asyncio
LIMIT = 4096
SMALL = LocalOptions(max_body_bytes=LIMIT)
PATHS = ["create_session", "telemetry", "client/config", "forward_backward", "asample", "create_model"]


async def pieces(total, size=512):
    for _ in range(total // size):
        yield b" " * size


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_beyond_the_limit_is_413_whatever_its_length_says(run_service, path):
    async with run_service(SMALL) as client:
        url = f"/api/v1/{path}"
        for body in (b" " * (LIMIT + 1), pieces(LIMIT + 512)):
            answer = await client.http.post(url, content=body)
            assert answer.status_code == 413
            assert answer.json() == {"detail": f"the body is larger than {LIMIT} bytes"}
        within = await client.http.post(url, content=pieces(LIMIT))
        assert within.status_code != 413


async def test_reading_stops_at_the_limit(run_service):
    taken = 0

    async def receive():
        nonlocal taken
        taken += 1024
        assert taken <= 16 * LIMIT, "it goes on reading"
        return {"type": "http.request", "body": b"x" * 1024, "more_body": True}

    async with run_service(SMALL) as client:
        for path in ("create_session", "telemetry"):
            sent: list[dict] = []
            scope = {"type": "http", "method": "POST", "path": f"/api/v1/{path}", "headers": [], "query_string": b""}

            async def send(message, sent=sent):
                sent.append(message)

            taken = 0
            await client.service.app({**scope, "raw_path": b"", "root_path": ""}, receive, send)
            assert sent[0]["status"] == 413
            assert taken == LIMIT + 1024


@pytest.mark.parametrize("length", [b"x", b"-1", b"9" * 400, b"\xb2"])
async def test_an_invalid_content_length_does_not_crash(client, length):
    answer = await client.http.post("/api/v1/create_session", content=b"{}", headers={"Content-Length": length})
    assert answer.status_code in (200, 413)


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


async def send_zstd(client, body, path="create_session"):
    return await client.http.post(f"/api/v1/{path}", content=body, headers={"Content-Encoding": "zstd"})


async def test_a_zstd_bomb_is_413_and_is_not_unpacked(run_service):
    limit = 64 * 1024**2
    bomb = zstd(bytes(512 * 1024**2))
    assert len(bomb) < 20_000
    async with run_service(LocalOptions(max_body_bytes=limit)) as client:
        tracemalloc.start()
        try:
            answer = await send_zstd(client, bomb)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert answer.status_code == 413
        # The limit, and one step of the unpacker beyond it.
        assert peak < limit + 48 * 1024**2
        fits = zstd(b"{" + b" " * (limit - 2) + b"}")
        assert (await send_zstd(client, fits)).status_code == 200


async def test_truncated_zstd_returns_400(client):
    whole = zstd(json.dumps({"display_name": "x" * 5000}).encode())
    assert (await send_zstd(client, whole)).status_code == 200
    for body in (whole[:-1], whole[: len(whole) // 2], whole + b"x", whole + whole, b"", b"\x28\xb5\x2f\xfd"):
        answer = await send_zstd(client, body)
        assert answer.status_code == 400, body[-10:]
        assert "not a valid zstd stream" in answer.json()["detail"]


async def test_a_zstd_window_of_any_size_is_not_allocated(client):
    # A frame whose header asks for a window of 2 GiB (descriptor 0xA8: exponent 21, mantissa 0).
    answer = await send_zstd(client, b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00")
    assert answer.status_code == 400


def nested(depth: int, opening: str, closing: str) -> bytes:
    return b'{"user_metadata": {"a": ' + opening.encode() * depth + b"0" + closing.encode() * depth + b"}}"


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"]\\"[":', "}]")])
async def test_json_has_a_depth(client, opening, closing):
    per_level = 2 if opening.startswith("[{") else 1
    deepest = (MAX_JSON_DEPTH - 2) // per_level
    within = await client.http.post("/api/v1/create_session", content=nested(deepest, opening, closing))
    assert within.status_code == 200, within.text
    for depth in (deepest + 1, 500, 100_000):
        answer = await client.http.post("/api/v1/create_session", content=nested(depth, opening, closing))
        assert answer.status_code == 400
        assert f"nested too deeply: at most {MAX_JSON_DEPTH}" in answer.json()["detail"]


async def test_brackets_in_texts_and_beside_each_other_are_not_depth(client):
    body = {"user_metadata": {"text": '[{"\\' * 1000, "list": [[]] * 1000}}
    assert (await client.http.post("/api/v1/create_session", content=json.dumps(body))).status_code == 200


async def test_json_has_a_number_of_parts(client):
    for part in (b"[],", b'"",', b"{},"):
        answer = await client.http.post("/api/v1/create_session", content=b"[" + part * MAX_JSON_PARTS + b"0]")
        assert answer.status_code == 413
        assert str(MAX_JSON_PARTS) in answer.json()["detail"]


@pytest.mark.parametrize(
    "body", [b"\xff\xfe{\x00}\x00", '{"a": 1}'.encode("utf-16"), b'{"a": "\xff"}', b'{"a": ' + b"1" * 5000 + b"}"]
)
async def test_invalid_utf_8_and_numbers_return_400_without_the_body(client, body):
    answer = await client.http.post("/api/v1/create_session", content=body)
    assert answer.status_code == 400
    assert len(answer.json()["detail"]) < 100


async def test_a_decoding_error_does_not_quote_the_body(client):
    answer = await client.http.post("/api/v1/create_session", content=b'{"prompt": "a planted secret" oops}')
    assert answer.status_code == 400
    assert "planted" not in answer.text
    assert "character 30" in answer.json()["detail"]
