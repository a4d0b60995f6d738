"""How many files and calls of the package one custom step goes through, and that its shape stays as it is.

A warm client, 4 datums, one regularizer, over HTTP to a service that answers every poll at once. Worker threads count;
a coroutine or generator counts once, however often it is resumed.
"""

import inspect
import re
import sys
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch

import tinkex_py
from tests.support.scripted_server import Behaviour, Request, ScriptedServer, answer, computed
from tinkex_py import AsyncServiceClient, Datum, ModelInput, RegularizerSpec, TinkexConfig
from tinkex_py.transport import wire

ROOT = Path(tinkex_py.__file__).parent
MOST_FILES = 26
MOST_CALLS = 550
LENGTHS = (5, 3, 4, 6)
_RESUMED = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Way:
    """The calls of functions of the package, by file and name."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self._resumed: dict[int, FrameType] = {}
        self._lock = threading.Lock()

    @property
    def files(self) -> Counter[str]:
        files: Counter[str] = Counter()
        for (file, _), count in self.calls.items():
            files[file] += count
        return files

    def note(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(ROOT)):
            return
        with self._lock:
            if code.co_flags & _RESUMED:
                if id(frame) in self._resumed:
                    return
                self._resumed[id(frame)] = frame  # held, so that its id stays its own
            self.calls[str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname] += 1

    @contextmanager
    def noted(self) -> Generator[None]:
        threading.setprofile(self.note)
        sys.setprofile(self.note)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def table(self) -> str:
        lines = [f"{count:5d}  {file}" for file, count in self.files.most_common()]
        return "\n".join([f"one custom step: {len(self.files)} files, {self.calls.total()} calls", *lines])


class Service:
    """Keeps each pass, and answers every poll with its result."""

    def __init__(self, server: ScriptedServer) -> None:
        self._results: dict[str, Behaviour] = {"model": answer(json={"model_id": "m"})}
        server.script("/api/v1/client/config", answer(json={"proto_write_fwdbwd": True}))
        server.script("/api/v1/create_session", answer(json={"session_id": "s"}))
        server.script("/api/v1/sessions/s/finish", answer(json={}))
        server.script("/api/v1/get_server_capabilities", answer(json={"supported_models": [{"model_name": "m"}]}))
        server.script("/api/v1/create_model", answer(json={"request_id": "model"}))
        server.script("/api/v1/forward_backward", computed(self.run))
        server.script("/api/v1/retrieve_future", computed(lambda polled: self._results[polled.json()["request_id"]]))

    def run(self, request: Request) -> Behaviour:
        message = wire.ForwardBackwardRequest.FromString(request.body)
        logprobs = -np.linspace(0.1, 2.0, sum(LENGTHS), dtype=np.float32)
        weights = np.frombuffer(b"".join(datum.loss_fn_inputs["weights"].dense for datum in message.data), "<f4")
        field = wire.BatchedTensor(
            data=logprobs.tobytes(),
            offsets=np.cumsum([0, *LENGTHS], dtype=np.int64).__mul__(4).tobytes(),
            dtype=wire.DTYPE_FLOAT32,
        )
        record = wire.ArrayRecord(num_datums=len(message.data), fields={"logprobs": field})
        output = wire.ForwardBackwardOutput(
            loss_fn_outputs=[record], metrics={"loss:sum": -float(np.dot(weights, logprobs))}
        )
        request_id = f"pass {len(self._results)}"
        self._results[request_id] = answer(
            body=output.SerializeToString(), headers={"content-type": "application/x-protobuf"}
        )
        return answer(json={"request_id": request_id})


def figure_of_the_way() -> list[str]:
    """The files of the figure in "How a step travels", in its order."""
    page = ROOT.parent / "docs" / "explanation" / "how_a_step_travels.md"
    figure = page.read_text(encoding="utf-8").split("```")[1]
    return re.findall(r"[a-z_/]+\.py", figure)


def data() -> list[Datum]:
    return [
        Datum(model_input=ModelInput.from_ints(range(length)), loss_fn_inputs={"target_tokens": list(range(length))})
        for length in LENGTHS
    ]


def nll(_data: object, logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.mean()


def l1(_data: object, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.abs().mean()


@pytest.mark.asyncio
async def test_a_custom_step_stays_a_straight_way(capsys: pytest.CaptureFixture[str]):
    way = Way()
    async with ScriptedServer() as server:
        Service(server)
        config = TinkexConfig(base_url=server.url, api_key="tml-way")
        async with AsyncServiceClient(config) as service:
            training = await service.create_lora_training_client("m")
            specs = [RegularizerSpec(fn=l1, weight=0.1, name="l1")]
            for _ in range(3):
                await training.forward_backward_custom(data(), nll, regularizers=specs)
            batch = data()
            with way.noted():
                out = await training.forward_backward_custom(batch, nll, regularizers=specs)
    assert out.loss_total == pytest.approx(1.1 * 1.05)
    with capsys.disabled():
        print(f"\n{way.table()}")  # noqa: T201 - the table is what this test shows
    assert figure_of_the_way() == list(way.files)
    assert len(way.files) <= MOST_FILES
    assert way.calls.total() <= MOST_CALLS
