"""A training service without computation: it responds to every pass at once with stored logprobs, over real HTTP.

    python -m benchmarks.replay_service [--retrieve-futures]

All datums of a request must have targets of the shape of its first datum; nothing else of them is read. The service
stores only the bodies of the latest backward pass, which `GET /replay/gradient` and `/replay/bytes` report. Samples are
done when they are submitted; with `--retrieve-futures` the service asks clients to wait for many with one poll.
"""

import http.server
import itertools
import json
import math
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from tinkex_py.transport import wire

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
MODEL = "replayed"
# Logprobs of this many tokens are drawn; longer responses repeat them.
_STORED = 1_000_003

# Seconds for which a poll for samples is held.
_HOLD = 20.0

Array = npt.NDArray[Any]
Answer = tuple[HTTPStatus, str, bytes]


def _light_request() -> Any:
    """Makes a ForwardBackwardRequest that leaves its datums unparsed: a response needs only their number."""
    file = descriptor_pb2.FileDescriptorProto(name="light_request.proto", package="replay", syntax="proto3")
    message = file.message_type.add(name="LightRequest")
    one, many = FieldDescriptorProto.LABEL_OPTIONAL, FieldDescriptorProto.LABEL_REPEATED
    message.field.add(name="seq_id", number=2, type=FieldDescriptorProto.TYPE_INT32, label=one)
    message.field.add(name="data", number=3, type=FieldDescriptorProto.TYPE_BYTES, label=many)
    message.field.add(name="forward_only", number=6, type=FieldDescriptorProto.TYPE_BOOL, label=one)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # pyright: ignore[reportUnknownMemberType]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("replay.LightRequest"))


LightRequest = _light_request()


def stored_logprobs(datums: int, shape: tuple[int, ...]) -> Array:
    """Returns the logprobs for this many datums, float32 `[datums * prod(shape)]`; always the same."""
    drawn = -np.random.default_rng(7).gamma(1.5, 0.8, _STORED).astype(np.float32)
    return np.resize(drawn, datums * math.prod(shape))


def packed_answer(datums: int, shape: tuple[int, ...], *, loss: bool) -> bytes:
    """Encodes a ForwardBackwardOutput. `loss` adds the metric that the official SDK requires of a backward pass."""
    size = 4 * math.prod(shape)
    field = wire.BatchedTensor(
        data=stored_logprobs(datums, shape).tobytes(),
        offsets=(np.arange(datums + 1, dtype="<i8") * size).tobytes(),
        dtype=wire.DTYPE_FLOAT32,
        trailing_shape=shape[1:],
    )
    record = wire.ArrayRecord(fields={"logprobs": field}, num_datums=datums)
    return wire.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record], metrics={"loss:sum": 0.0} if loss else {}
    ).SerializeToString()


SAMPLE = wire.SampleResponse(
    sequences=[
        wire.SampledSequence(
            stop_reason=wire.STOP_REASON_LENGTH,
            tokens=np.array([5, 6, 7, 8], "<i4").tobytes(),
            logprobs=np.array([-0.5, -1.0, -1.5, -2.0], "<f4").tobytes(),
        )
    ]
).SerializeToString()


class ReplayService:
    """Maps requests to responses."""

    def __init__(self, *, retrieve_futures: bool = False) -> None:
        self._settings = {"proto_write_fwdbwd": True, "sample_use_retrieve_futures": retrieve_futures}
        self._samples: dict[str, list[str]] = {}  # done, by sampling session, in the order of their submission
        self._sampled = threading.Condition()
        self._answers: dict[str, bytes] = {}
        self._backward: dict[int, bytes] = {}
        self._sessions = 0
        self._lock = threading.Lock()

    def answer(self, path: str, body: bytes) -> Answer:
        """Returns status, media type and body for one request."""
        known: dict[str, Callable[[bytes], Answer]] = {
            "forward_backward": self._pass,
            "retrieve_future": self._result,
            "optim_step": lambda _: _future("optim_step"),
            "create_model": self._create_model,
            "create_session": self._create_session,
            "get_info": self._info,
            # Announces protobuf, which this package would probe for otherwise; the official SDK does not probe.
            "client/config": lambda _: _json(self._settings),
            "create_sampling_session": self._create_sampling_session,
            "asample": self._sample,
            "retrieve_futures": self._samples_done,
            "telemetry": lambda _: _json({"status": "accepted"}),
            "healthz": lambda _: _json({"status": "ok"}),
        }
        if path == "/replay/gradient":
            return HTTPStatus.OK, "application/octet-stream", self.gradient().tobytes()
        if path == "/replay/bytes":
            with self._lock:
                return _json(sum(map(len, self._backward.values())))
        answer = known.get(path.removeprefix("/api/v1/"), lambda _: _json({}))
        return answer(body)

    def gradient(self) -> Array:
        """Returns the weights of the latest backward pass, all datums concatenated, float32."""
        with self._lock:
            bodies = [body for _, body in sorted(self._backward.items())]
        data = [datum for body in bodies for datum in wire.ForwardBackwardRequest.FromString(body).data]
        parts = [np.frombuffer(datum.loss_fn_inputs["weights"].dense, "<f4") for datum in data]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _pass(self, body: bytes) -> Answer:
        request = LightRequest.FromString(body)
        with self._lock:
            if request.forward_only:
                self._backward.clear()
            else:
                self._backward[request.seq_id] = body
        kind = "forward" if request.forward_only else "backward"
        shape = wire.Datum.FromString(request.data[0]).loss_fn_inputs["target_tokens"].shape
        return _future(f"{kind}:{len(request.data)}:{','.join(map(str, shape))}")

    def _result(self, body: bytes) -> Answer:
        request_id: str = json.loads(body)["request_id"]
        kind, _, detail = request_id.partition(":")
        if kind == "optim_step":
            return _json({})
        if kind == "model":
            return _json({"model_id": detail})
        if kind == "sample":
            return HTTPStatus.OK, PROTOBUF, SAMPLE
        return HTTPStatus.OK, PROTOBUF, self._packed(request_id)

    def _packed(self, request_id: str) -> bytes:
        with self._lock:
            if request_id not in self._answers:
                kind, datums, shape = request_id.split(":")
                sizes = tuple(int(size) for size in shape.split(","))
                self._answers[request_id] = packed_answer(int(datums), sizes, loss=kind == "backward")
            return self._answers[request_id]

    def _create_sampling_session(self, body: bytes) -> Answer:
        fields = json.loads(body)
        return _json({"sampling_session_id": f"{fields['session_id']}:sample:{fields['sampling_session_seq_id']}"})

    def _sample(self, body: bytes) -> Answer:
        fields = json.loads(body)
        request_id = f"sample:{fields['sampling_session_id']}:{fields['seq_id']}"
        with self._sampled:
            self._samples.setdefault(fields["sampling_session_id"], []).append(request_id)
            self._sampled.notify_all()
        return _json({"request_id": request_id, "sample_sequence_ids": [f"{request_id}:0"]})

    def _samples_done(self, body: bytes) -> Answer:
        fields = json.loads(body)
        session, cursor = fields["target"]["sampling_session_id"], fields["prev_cursor"]
        with self._sampled:
            if "timeout" not in fields:
                self._sampled.wait_for(lambda: len(self._samples.get(session, ())) > cursor, timeout=_HOLD)
            done = self._samples.get(session, [])
            new = [{"state": "finished", "request_id": request_id} for request_id in done[cursor:]]
            return _json({"completions": new, "cursor": len(done)})

    def _create_session(self, _body: bytes) -> Answer:
        with self._lock:
            self._sessions += 1
            return _json({"session_id": f"s{self._sessions}"})

    def _create_model(self, body: bytes) -> Answer:
        fields = json.loads(body)
        return _future(f"model:{fields['session_id']}:train:{fields['model_seq_id']}")

    def _info(self, body: bytes) -> Answer:
        model_id = json.loads(body)["model_id"]
        return _json({"model_id": model_id, "model_data": {"model_name": MODEL}, "model_name": MODEL})


def _json(fields: object) -> Answer:
    return HTTPStatus.OK, JSON, json.dumps(fields).encode()


def _future(request_id: str) -> Answer:
    return _json({"request_id": request_id})


def handler_of(service: ReplayService) -> type[http.server.BaseHTTPRequestHandler]:
    """Returns the class that handles the requests of one connection."""
    numbers = itertools.count(1)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body in one packet

        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, media_type, answer = service.answer(self.path, body)
            self.send_response(status)
            self.send_header("content-type", media_type)
            self.send_header("content-length", str(len(answer)))
            self.send_header("x-request-id", str(next(numbers)))
            self.end_headers()
            self.wfile.write(answer)

        def do_GET(self) -> None:  # the names are http.server's
            self._reply()

        def do_POST(self) -> None:
            self._reply()

        def log_message(self, format: str, *_: object) -> None:  # noqa: A002
            pass

    return Handler


class Server(http.server.ThreadingHTTPServer):
    """Uses one thread per connection, with a long queue of new connections."""

    request_queue_size = 1024

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores clients that end without closing their connections."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # pyright: ignore


def main() -> None:
    service = ReplayService(retrieve_futures="--retrieve-futures" in sys.argv[1:])
    with Server(("127.0.0.1", 0), handler_of(service)) as server:
        print(f"Listening on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
