"""Real parts for the tests of the embedded service: an engine alone, and a running service with a raw HTTP client."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
import torch
import zstandard

from tinkex_py.local import LocalOptions, LocalService
from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.data import EncodedDatum, EnginePass, PassResult
from tinkex_py.local.engine import Engine
from tinkex_py.local.models import LoadedModel, load_model
from tinkex_py.local.records import CheckpointInfo, TrainingRunInfo
from tinkex_py.transport import wire
from tinkex_py.types import LoraConfig

PROTOBUF = "application/x-protobuf"


@pytest.fixture(autouse=True)
def one_compute_thread() -> Iterator[None]:
    """A tiny network gains nothing from more threads, and loses a lot where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_datum(length: int, seed: int, **inputs: Any) -> EncodedDatum:
    """Random tokens of the tiny model, pre-shifted targets."""
    ids = np.random.default_rng(seed).integers(0, 256, length + 1)
    arrays = {name: np.asarray(value, dtype=np.float32) for name, value in inputs.items()}
    return EncodedDatum(tokens=ids[:-1], inputs={"target_tokens": ids[1:], **arrays})


class EngineBench:
    """An engine on this thread, with short calls."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model: LoadedModel = load_model("tiny", "cpu", folder)
        self.store = CheckpointStore(folder)
        self.closing = threading.Event()
        self.engine = Engine(self.model, self.store, LocalOptions(**options), self.closing)

    def close(self) -> None:
        self.store.close()

    def run(self, model_id: str, rank: int = 8, **kinds: bool) -> TrainingRunInfo:
        which = {"train_unembed": True, "train_mlp": True, "train_attn": True, **kinds}
        return TrainingRunInfo(run_id=model_id, base_model="tiny", rank=rank, created=datetime.now(UTC), **which)

    def create(self, model_id: str, seed: int = 1, rank: int = 8, **kinds: bool) -> str:
        self.engine.create_model(self.run(model_id, rank, **kinds), LoraConfig(rank=rank, **kinds), seed)
        return model_id

    def passed(
        self,
        model_id: str,
        data: Sequence[EncodedDatum],
        loss_fn: str = "cross_entropy",
        *,
        forward_only: bool = False,
        keep: bool = False,
        **config: float,
    ) -> PassResult:
        return self.engine.run_pass(model_id, EnginePass(lambda: data, loss_fn, config, forward_only, keep))

    def checkpoint(self, model_id: str, name: str, kind: Any = "weights", *, overwrite: bool = False) -> CheckpointInfo:
        info = CheckpointInfo(run=self.run(model_id), kind=kind, name=name, folder="", time=datetime.now(UTC))
        return self.engine.save(model_id, info, overwrite=overwrite)


@pytest.fixture
def bench_with(tmp_path: Path) -> Iterator[Callable[..., EngineBench]]:
    made: list[EngineBench] = []

    def make(**options: Any) -> EngineBench:
        made.append(EngineBench(tmp_path, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(bench_with: Callable[..., EngineBench]) -> EngineBench:
    return bench_with()


class RawClient:
    """The protocol, spoken by hand."""

    def __init__(self, http: httpx.AsyncClient, service: LocalService) -> None:
        self.http = http
        self.service = service
        self.session_id = ""

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.http.post(f"/api/v1/{path}", json=body or {}, **options)

    async def ask(self, path: str, body: Any = None) -> dict[str, Any]:
        answer = await self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def result(self, request_id: str, *, accept: str = "application/json") -> httpx.Response:
        return await self.post("retrieve_future", {"request_id": request_id}, headers={"Accept": accept})

    async def final(self, request_id: str, *, accept: str = "application/json") -> httpx.Response:
        """Poll until there is a result."""
        while (answer := await self.result(request_id, accept=accept)).status_code == 408:
            pass
        return answer

    async def done(self, path: str, body: Any) -> dict[str, Any]:
        """Submit, then the JSON result."""
        answer = await self.final((await self.ask(path, body))["request_id"])
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def session(self) -> str:
        self.session_id = (await self.ask("create_session", {"tags": [], "sdk_version": "0"}))["session_id"]
        return self.session_id

    async def model(self, number: int = 0, base_model: str = "tiny", **lora: Any) -> str:
        if not self.session_id:
            await self.session()
        body = {
            "session_id": self.session_id,
            "model_seq_id": number,
            "base_model": base_model,
            "lora_config": {"rank": 8, "seed": 1, **lora},
        }
        return (await self.done("create_model", body))["model_id"]

    async def send_pass(
        self, message: wire.ForwardBackwardRequest, *, zstd: bool = False, **headers: str
    ) -> httpx.Response:
        body = message.SerializeToString()
        if zstd:
            body, headers = zstandard.ZstdCompressor().compress(body), {**headers, "Content-Encoding": "zstd"}
        headers["Content-Type"] = PROTOBUF
        return await self.http.post("/api/v1/forward_backward", content=body, headers=headers)

    async def pass_result(self, message: wire.ForwardBackwardRequest, **options: Any) -> wire.ForwardBackwardOutput:
        submitted = await self.send_pass(message, **options)
        assert submitted.status_code == 200, submitted.text
        answer = await self.final(submitted.json()["request_id"], accept=PROTOBUF)
        assert answer.headers["content-type"] == PROTOBUF, answer.text
        return wire.ForwardBackwardOutput.FromString(answer.content)


async def all_threads_started(service: LocalService) -> None:
    """Threads that start with the first work belong to the service, not to the test that needs them first."""
    core, files, bodies = service.core, threading.Barrier(2), threading.Barrier(2)
    assert core is not None
    for_files = [core.stored(lambda store: files.wait()) for _ in range(2)]
    await asyncio.gather(*for_files, *[core.aside(bodies.wait) for _ in range(2)])


@asynccontextmanager
async def running(options: LocalOptions) -> AsyncIterator[RawClient]:
    service = LocalService(options)
    await service.start()
    await all_threads_started(service)
    try:
        transport = httpx.ASGITransport(app=service.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://local") as http:
            yield RawClient(http, service)
    finally:
        await service.stop()


@pytest.fixture
def run_service() -> Callable[[LocalOptions], Any]:
    return running


@pytest_asyncio.fixture
async def client() -> AsyncIterator[RawClient]:
    async with running(LocalOptions(model="tiny", device="cpu", hold_seconds=5)) as raw:
        yield raw


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[RawClient]:
    """One service for the tests of a module, which create their own models; they run on the module's loop."""
    async with running(LocalOptions(model="tiny", device="cpu", hold_seconds=5)) as raw:
        yield raw


def dense(values: Any, dtype: str) -> wire.Tensor:
    array = np.asarray(values, dtype=dtype)
    kind = wire.DTYPE_INT64 if array.dtype.kind == "i" else wire.DTYPE_FLOAT32
    return wire.Tensor(dense=array.tobytes(), dtype=kind, shape=array.shape)


def pass_message(
    model_id: str, seq_id: int, data: Sequence[EncodedDatum], loss_fn: str = "cross_entropy", **fields: Any
) -> wire.ForwardBackwardRequest:
    """The protobuf form of a pass."""
    message = wire.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, **fields)
    for datum in data:
        chunk = wire.Chunk(encoded_text=wire.EncodedTextChunk(tokens=datum.tokens.astype("<i4").tobytes()))
        inputs = {
            name: dense(value, "<i8" if value.dtype.kind == "i" else "<f4") for name, value in datum.inputs.items()
        }
        message.data.append(wire.Datum(model_input=[chunk], loss_fn_inputs=inputs))
    return message


def unpack(output: wire.ForwardBackwardOutput, name: str = "logprobs") -> list[np.ndarray]:
    """One field per datum of a ForwardBackwardOutput, read from the schema's words alone."""
    arrays = []
    for record in output.loss_fn_outputs:
        field = record.fields[name]
        offsets = np.frombuffer(field.offsets, "<i8")
        assert len(offsets) == record.num_datums + 1
        for start, end in itertools.pairwise(offsets):
            arrays.append(np.frombuffer(field.data[start:end], "<f4").reshape(-1, *field.trailing_shape))
    return arrays


class Kit:
    """Helpers that tests get through a fixture, so that test files import nothing from each other."""

    datum = staticmethod(make_datum)
    message = staticmethod(pass_message)
    unpack = staticmethod(unpack)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit
