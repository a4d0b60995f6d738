"""A real service in process and behind a socket, both with a recorder in front; datums of the tiny model."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.client.recorder import Recorder, http_client, quick_config
from tests.support.torch_threads import one_torch_thread  # noqa: F401
from tinkex_py import AsyncServiceClient, AsyncTrainingClient
from tinkex_py.local import LocalService


class Bench:
    """A service client in process and what the service saw of it."""

    def __init__(self, service: AsyncServiceClient, recorder: Recorder) -> None:
        self.service = service
        self.recorder = recorder

    async def train(self, **settings: Any) -> AsyncTrainingClient:
        return await self.service.create_lora_training_client("tiny", **{"rank": 4, "seed": 1, **settings})

    def kinds(self, training: AsyncTrainingClient) -> list[str]:
        return self.recorder.kinds(training.model_id)


class RecordedService(LocalService):
    """The embedded service with a recorder as its app."""

    latest: "RecordedService"

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.recorder = Recorder(super().app)
        RecordedService.latest = self

    @property
    def app(self) -> Any:
        return self.recorder


@pytest.fixture
def local_bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a bench around `AsyncServiceClient.local`; not yet entered."""
    monkeypatch.setattr("tinkex_py.local.LocalService", RecordedService)

    def make(options: Any = None, **settings: Any) -> Bench:
        service = AsyncServiceClient.local(model="tiny", config=quick_config(**settings), **(options or {}))
        return Bench(service, RecordedService.latest.recorder)

    return make


@pytest_asyncio.fixture
async def bench(local_bench: Any) -> AsyncIterator[Bench]:
    made = local_bench()
    async with made.service:
        yield made


@pytest_asyncio.fixture
async def http_bench() -> AsyncIterator[Bench]:
    async with http_client() as (service, recorder):
        yield Bench(service, recorder)
