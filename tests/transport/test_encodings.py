"""The encodings of passes, and how a client detects the one that a service accepts."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import zstandard

from tinkex_py.errors import APIStatusError, ConnectionFailed, status_error_class
from tinkex_py.transport import encoding, wire
from tinkex_py.transport.encoding import JsonEncoding, PassHeader, ProtobufEncoding, encode_batch
from tinkex_py.transport.messages import Request
from tinkex_py.transport.negotiation import choose_encoding, refuses_protobuf
from tinkex_py.transport.server_config import ServerConfig
from tinkex_py.types import Datum, ModelInput

DATUM = Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0, 0.5]})
FORWARD = PassHeader("m", 3, "cross_entropy", {}, forward_only=True)
BACKWARD = PassHeader("m", 4, "ppo", {"beta": 0.5}, forward_only=False)


def test_protobuf_has_one_endpoint():
    for request in (FORWARD, BACKWARD):
        encoded = ProtobufEncoding().encode(encode_batch([DATUM]), request)
        assert (encoded.path, type_of(encoded)) == ("/api/v1/forward_backward", "application/x-protobuf")
        assert "content-encoding" not in encoded.headers
        message = wire.ForwardBackwardRequest.FromString(body_of(encoded))
        assert (message.seq_id, message.forward_only) == (request.seq_id, request.forward_only)


def test_json_has_two_endpoints():
    batch = encode_batch([DATUM])
    forward = JsonEncoding().encode(batch, FORWARD)
    assert (forward.path, type_of(forward)) == ("/api/v1/forward", "application/json")
    assert set(json.loads(body_of(forward))) == {"model_id", "seq_id", "forward_input"}
    backward = JsonEncoding().encode(batch, BACKWARD)
    assert backward.path == "/api/v1/forward_backward"
    assert json.loads(body_of(backward))["forward_backward_input"]["loss_fn_config"] == {"beta": 0.5}
    assert batch.data[0] == DATUM


def test_zstd_is_the_same_message():
    batch = encode_batch([DATUM] * 50)
    plain = ProtobufEncoding().encode(batch, BACKWARD)
    packed = ProtobufEncoding(compress=True).encode(batch, BACKWARD)
    assert packed.headers["content-encoding"] == "zstd"
    assert len(body_of(packed)) < len(body_of(plain))
    assert zstandard.ZstdDecompressor().decompress(body_of(packed)) == body_of(plain)


def test_without_zstandard_it_goes_plain(monkeypatch):
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(encoding.importlib, "import_module", missing)
    encoded = ProtobufEncoding(compress=True).encode(encode_batch([DATUM]), FORWARD)
    assert "content-encoding" not in encoded.headers
    assert wire.ForwardBackwardRequest.FromString(body_of(encoded)).model_id == "m"


def body_of(encoded: Request) -> bytes:
    return b"".join(encoded.content or ())


def type_of(encoded: Request) -> str:
    return encoded.headers["content-type"]


class Service:
    """Responds to probes with these statuses and bodies in order."""

    def __init__(self, *answers: tuple[int, object] | Exception) -> None:
        self.answers = list(answers)
        self.probes: list[Request] = []

    async def __call__(self, encoded: Request) -> object:
        self.probes.append(encoded)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        if status >= 400:
            raise status_error_class(status)("refused", status=status, body=body)
        return body


def fastapi(*places: Sequence[object]) -> dict[str, Any]:
    return {"detail": [{"type": "model_attributes_type", "loc": list(place), "msg": "odd"} for place in places]}


NO_MODEL = {"detail": "Model not found"}
ANSWERS = {
    "SkyRL 0.4.0": ([(404, NO_MODEL)], "protobuf"),
    "a model id that is refused": ([(400, {"detail": "no model 'probe-nonexistent'"})], "protobuf"),
    "no right to the model": ([(403, {"error": {"message": "model of somebody else"}})], "protobuf"),
    "accepted": ([(200, {"request_id": "1"})], "protobuf"),
    "unsupported media type": ([(415, "no")], "json"),
    "a JSON endpoint of FastAPI": ([(422, fastapi(["body"]))], "json"),
    "SkyRL 0.3.0, 500 at bytes": ([(500, "Internal Server Error"), (404, NO_MODEL)], "json"),
    "500 at bytes, then a field that does not fit": (
        [(500, ""), (422, fastapi(["body", "forward_input", "data"]))],
        "json",
    ),
    "500 at bytes, and JSON is not read either": ([(500, ""), (422, fastapi(["body"]))], "protobuf"),
    "500 at bytes, and JSON is accepted": ([(500, ""), (200, {"request_id": "1"})], "json"),
    "500 whatever comes": ([(500, ""), (500, "")], "protobuf"),
    "no such address, but one for JSON": ([(404, {"detail": "Not Found"}), (404, NO_MODEL)], "json"),
    "no such address at all": ([(404, {"detail": "Not Found"}), (404, {"detail": "Not Found"})], "protobuf"),
    "a page that speaks of models": ([(404, "<h1>our models</h1>"), (404, "<h1>our models</h1>")], "protobuf"),
    "some other refusal": ([(401, {"detail": "who are you?"})], "protobuf"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ANSWERS)
async def test_what_a_probe_detects(name):
    answers, expected = ANSWERS[name]
    service = Service(*answers)
    encoding = await choose_encoding("auto", ServerConfig(), service)
    assert encoding.name == expected
    assert service.answers == []
    first = wire.ForwardBackwardRequest.FromString(body_of(service.probes[0]))
    assert (first.model_id, first.seq_id, first.forward_only, len(first.data)) == ("probe-nonexistent", 1, True, 0)
    for later in service.probes[1:]:
        assert later.path == "/api/v1/forward"
        assert json.loads(body_of(later))["model_id"] == "probe-nonexistent"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("wanted", "told", "expected"),
    [
        ("json", True, "json"),
        ("json", None, "json"),
        ("protobuf", False, "protobuf"),
        ("protobuf", None, "protobuf"),
        ("auto", True, "protobuf"),
        ("auto", False, "json"),
    ],
)
async def test_no_probe_if_the_encoding_is_known(wanted, told, expected):
    service = Service()
    flags = ServerConfig(proto_write_fwdbwd=told, proto_compress_fwdbwd=True)
    encoding = await choose_encoding(wanted, flags, service)
    assert encoding.name == expected
    assert service.probes == []
    encoded = encoding.encode(encode_batch([DATUM]), BACKWARD)
    assert encoded.headers.get("content-encoding") == ("zstd" if expected == "protobuf" else None)


@pytest.mark.asyncio
async def test_a_failed_probe_is_not_guessed():
    with pytest.raises(ConnectionFailed):
        await choose_encoding("auto", ServerConfig(), Service(ConnectionFailed("gone")))


def test_which_refusals_are_about_the_body():
    def refusal(status: int, body: object) -> APIStatusError:
        return status_error_class(status)("no", status=status, body=body)

    assert refuses_protobuf(refusal(415, None))
    assert refuses_protobuf(refusal(422, fastapi(["body"])))
    for status, body in (
        (422, fastapi(["body", "loss_fn"])),
        (422, {"detail": "loss_fn 'x' is not known"}),
        (422, "text"),
        (400, fastapi(["body"])),
        (404, NO_MODEL),
    ):
        assert not refuses_protobuf(refusal(status, body)), (status, body)


def test_server_config_is_parsed_leniently():
    assert ServerConfig.read({}) == ServerConfig()
    told = ServerConfig.read(
        {
            "pjwt_auth_enabled": True,
            "fwdbwd_max_chunk_len": 7,
            "fwdbwd_max_chunk_bytes_count": -1,
            "parallel_fwdbwd_chunks": "no",
            "proto_write_fwdbwd": False,
            "credential_default_source": 3,
            "sample_max_concurrent_requests": True,
            "billing_exception_max_pause_duration_sec": 9.5,
            "something_new": {"a": 1},
        }
    )
    assert told == ServerConfig(pjwt_auth_enabled=True, fwdbwd_max_chunk_len=7, proto_write_fwdbwd=False)
    assert ServerConfig.read({"proto_write_fwdbwd": 1, "fwdbwd_max_chunk_len": None}) == ServerConfig()


@pytest.mark.parametrize(("asked", "longest"), [(60, 60), (3600, 3600), (3601, 3600), (10**30, 3600)])
def test_a_service_can_only_shorten_the_wait_for_a_payment(asked, longest):
    config = ServerConfig.read({"billing_exception_max_pause_duration_sec": asked})
    assert config.billing_exception_max_pause_duration_sec == longest
