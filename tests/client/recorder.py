"""An ASGI layer in front of the embedded service that sees every request, and can spoil an answer."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
import zstandard

from tinkex_py import AsyncServiceClient, RetryPolicy, TinkexConfig
from tinkex_py.local import LocalOptions, LocalService
from tinkex_py.transport import wire

PASS_PATH = "/api/v1/forward_backward"
KEY = "tml-test-client"
QUICK = RetryPolicy(deadline=30.0, initial_wait=0.0, max_wait=0.01)


@dataclass
class Arrival:
    """One request as the service got it."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    status: int | None = None

    @property
    def is_protobuf(self) -> bool:
        return self.path == PASS_PATH and self.headers.get("content-type") == "application/x-protobuf"

    @property
    def message(self) -> wire.ForwardBackwardRequest:
        assert self.is_protobuf
        is_packed = self.headers.get("content-encoding") == "zstd"
        body = zstandard.ZstdDecompressor().decompress(self.body) if is_packed else self.body
        return wire.ForwardBackwardRequest.FromString(body)

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    @property
    def kind(self) -> str:
        """F, B, or the endpoint's name."""
        if self.is_protobuf:
            return "F" if self.message.forward_only else "B"
        endpoint = self.path.rsplit("/", 1)[-1]
        return {"forward": "F", "forward_backward": "B"}.get(endpoint, endpoint)

    @property
    def number(self) -> tuple[str, int] | None:
        """Model and seq_id of a training request."""
        if self.is_protobuf:
            return self.message.model_id, self.message.seq_id
        if self.path.startswith("/api/v1/") and self.body.startswith(b"{"):
            fields = self.json
            if "model_id" in fields and "seq_id" in fields:
                return fields["model_id"], fields["seq_id"]
        return None


Send = Callable[[Any], Awaitable[None]]
Serve = Callable[[Send], Awaitable[None]]
Fault = Callable[[Arrival, Serve, Send], Awaitable[None]]


async def lose_the_answer(arrival: Arrival, serve: Serve, send: Send) -> None:
    """The service does the work, then the connection breaks in the middle of the answer."""
    held: list[Any] = []

    async def hold(event: Any) -> None:
        held.append(event)

    await serve(hold)
    arrival.status = held[0]["status"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
    await send({"type": "http.response.body", "body": b"{", "more_body": True})


def answering(status: int, body: object = None, **headers: str) -> Fault:
    """Answers without asking the service."""

    async def fault(arrival: Arrival, serve: Serve, send: Send) -> None:
        payload = json.dumps(body if body is not None else {"detail": f"scripted {status}"}).encode()
        sent = {"content-type": "application/json", "content-length": str(len(payload)), **headers}
        encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in sent.items()]
        arrival.status = status
        await send({"type": "http.response.start", "status": status, "headers": encoded})
        await send({"type": "http.response.body", "body": payload})

    return fault


def after(gate: asyncio.Event, then: Fault | None = None) -> Fault:
    """Waits for the event first."""

    async def fault(arrival: Arrival, serve: Serve, send: Send) -> None:
        await gate.wait()
        await (serve(send) if then is None else then(arrival, serve, send))

    return fault


@dataclass
class Recorder:
    """The layer.

    Attributes:
        arrivals: all requests, in the order their bodies were complete.
        faults: per kind (see `Arrival.kind`) what happens to the next requests of that kind; None lets one through.
        always: per kind what happens once `faults` is used up.
    """

    app: Any
    arrivals: list[Arrival] = field(default_factory=list)
    faults: dict[str, list[Fault | None]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._changed = asyncio.Condition()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        arrival = Arrival(scope["path"], headers, bytes(body))
        self.arrivals.append(arrival)
        async with self._changed:
            self._changed.notify_all()
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        async def note(event: Any) -> None:
            if event["type"] == "http.response.start":
                arrival.status = event["status"]
            await send(event)

        async def serve(where: Send) -> None:
            await self.app(scope, replay, where)

        waiting = self.faults.get(arrival.kind)
        fault = waiting.pop(0) if waiting else self.always.get(arrival.kind)
        if fault is None:
            await serve(note)
        else:
            await fault(arrival, serve, note)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that becomes true through arrivals."""
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(condition)

    def of(self, *kinds: str) -> list[Arrival]:
        return [arrival for arrival in self.arrivals if arrival.kind in kinds]

    def line(self, model_id: str) -> list[tuple[int, str]]:
        """(number, kind) of a model's requests in the order of arrival, repeats left out.

        Checks on the way that numbers arrive as 1..n and that none comes with two payloads.
        """
        payloads: dict[int, bytes] = {}
        line: list[tuple[int, str]] = []
        for arrival in self.arrivals:
            number = arrival.number
            if number is None or number[0] != model_id:
                continue
            if number[1] not in payloads:
                line.append((number[1], arrival.kind))
            assert payloads.setdefault(number[1], arrival.body) == arrival.body, f"{number} came with two payloads"
        assert [number for number, _ in line] == list(range(1, len(line) + 1)), f"gap or disorder: {line}"
        return line

    def kinds(self, model_id: str) -> list[str]:
        """Kinds of a model's requests in order; see `line`."""
        return [kind for _, kind in self.line(model_id)]


def quick_config(base_url: str = "http://embedded", **settings: Any) -> TinkexConfig:
    """A config for loopback services."""
    return TinkexConfig(**{"base_url": base_url, "api_key": KEY, "retry": QUICK, **settings})


def chunked(datums: int) -> Fault:
    """Answers client/config so that a chunk holds so many datums."""
    flags = {"fwdbwd_max_chunk_len": datums, "proto_write_fwdbwd": True, "parallel_fwdbwd_chunks": False}
    return answering(200, flags)


@asynccontextmanager
async def http_recorder(options: LocalOptions | None = None) -> AsyncIterator[tuple[Recorder, str]]:
    """The embedded service behind a real socket, with a recorder in front of it."""
    service = LocalService(options or LocalOptions(model="tiny", device="cpu"))
    await service.start()
    recorder = Recorder(service.app)
    config = uvicorn.Config(
        recorder,
        host="127.0.0.1",
        port=0,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve())
    try:
        async with asyncio.timeout(30):
            while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
                await asyncio.sleep(0.01)
        yield recorder, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        service.close_polls()
        server.should_exit = True
        await running
        await service.stop()


@asynccontextmanager
async def http_client(**settings: Any) -> AsyncIterator[tuple[AsyncServiceClient, Recorder]]:
    """A service client over a real socket."""
    async with http_recorder() as (recorder, url), AsyncServiceClient(quick_config(url, **settings)) as service:
        yield service, recorder


def sent_weights(messages: list[wire.ForwardBackwardRequest]) -> np.ndarray:
    """All weights of the messages end to end."""
    tensors = [datum.loss_fn_inputs["weights"] for message in messages for datum in message.data]
    assert all(tensor.dtype == wire.DTYPE_FLOAT32 and tensor.WhichOneof("encoding") == "dense" for tensor in tensors)
    return np.concatenate([np.frombuffer(tensor.dense, "<f4") for tensor in tensors])
