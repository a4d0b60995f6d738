"""Throwaway models: all start from one checkpoint, and nothing of them stays on the service."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from tinkex_py.client.rest import AsyncRestClient
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import (
    BadRequest,
    InvalidResponse,
    NotFound,
    RequestFailed,
    Unprocessable,
    UnsupportedFeature,
)
from tinkex_py.types import Datum, ForwardBackwardOutput
from tinkex_py.types.tensors import Array

Result = TypeVar("Result")

# Of a service that cannot save checkpoints, or not create models from them.
_REFUSALS = (BadRequest, NotFound, RequestFailed, Unprocessable, UnsupportedFeature)


class Service(Protocol):
    """The part of `AsyncServiceClient` that the measurement needs."""

    async def create_lora_training_client(self, base_model: str, *, rank: int, seed: int) -> AsyncTrainingClient:
        """Creates a model."""
        ...

    async def create_training_client_from_state(self, path: str) -> AsyncTrainingClient:
        """Creates a model from a checkpoint."""
        ...

    def create_rest_client(self) -> AsyncRestClient:
        """Creates a client for checkpoints."""
        ...


@dataclass(frozen=True)
class Cost:
    """The most that a measurement can cost.

    Attributes:
        models: throwaway models, one after another.
        at_once: models that exist at a time.
        passes: forward and backward passes.
        tokens: tokens in all passes.
    """

    models: int
    at_once: int
    passes: int
    tokens: int


@dataclass(frozen=True)
class Batch:
    """Datums whose logprobs are watched, under a name."""

    name: str
    data: tuple[Datum, ...]


class ThrowawayModels:
    """Creates the models of a measurement. Use it with `async with`; `start` creates the first one.

    Args:
        service: the service.
        base_model: name of the base model.
        rank: rank of the adapters.
        at_once: maximum number of models at a time.
        close_timeout: seconds that removing them may take.

    Attributes:
        shared: the only model, where the service cannot create one from a checkpoint; else None.
        created: number of models so far.
        drift: largest change of a logprob of the shared model after a step there and back.
        notes: what remained on the service, in words.
    """

    def __init__(self, service: Service, base_model: str, rank: int, at_once: int, close_timeout: float) -> None:
        self.shared: AsyncTrainingClient | None = None
        self.created = 0
        self.drift: float | None = None
        self.notes: list[str] = []
        self._service = service
        self._base_model = base_model
        self._rank = rank
        self._room = asyncio.Semaphore(at_once)
        self._close_timeout = close_timeout
        self._path: str | None = None
        self._before: dict[str, Array] = {}
        self._creating: set[asyncio.Task[Any]] = set()
        self._alive: set[AsyncTrainingClient] = set()

    async def start(self) -> None:
        """Saves the state that all models start from, or keeps the one model if the service cannot restore it."""
        first = await self._new_model()
        try:
            path = await self._owned(self._saved(first))
            await self._unload(first)
            async with self._from_state(path):
                return
        except _REFUSALS as error:
            reason = " ".join(str(error).split())[:200]
            self.notes.append(f"models cannot be created from a checkpoint, so all probes use one model ({reason})")
        self.shared, self._room = first if first in self._alive else await self._new_model(), asyncio.Semaphore(1)

    @asynccontextmanager
    async def fresh(self) -> AsyncGenerator[AsyncTrainingClient]:
        """Yields a model in the common state, and removes it; the shared one is in the state that probes left."""
        async with self._room:
            if self.shared is not None:
                yield self.shared
                return
            assert self._path is not None, "start it first"
            async with self._from_state(self._path) as model:
                yield model

    @asynccontextmanager
    async def _from_state(self, path: str) -> AsyncGenerator[AsyncTrainingClient]:
        model = await self._owned(self._created(self._service.create_training_client_from_state(path)))
        try:
            yield model
        finally:
            await self._unload(model)

    async def _new_model(self) -> AsyncTrainingClient:
        creating = self._service.create_lora_training_client(self._base_model, rank=self._rank, seed=0)
        return await self._owned(self._created(creating))

    async def before(self, batch: Batch) -> Array:
        """Returns the logprobs of a batch in the common state."""
        if batch.name not in self._before:
            async with self.fresh() as model:
                self._before[batch.name] = logprobs_of(await model.forward(batch.data))
        return self._before[batch.name]

    async def __aenter__(self) -> "ThrowawayModels":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        removing = asyncio.create_task(self._remove(), name="tinkex.certify.remove")
        cancelled: asyncio.CancelledError | None = None
        while not removing.done():
            try:
                await asyncio.shield(removing)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        removing.result()

    async def _remove(self) -> None:
        failures: list[BaseException] = []
        try:
            async with asyncio.timeout(self._close_timeout):
                if self._creating:
                    await asyncio.wait(self._creating)
                work = [self._unload(model) for model in list(self._alive)]
                if self._path is not None:
                    work.append(self._service.create_rest_client().delete_checkpoint(self._path))
                results = await asyncio.gather(*work, return_exceptions=True)
                failures = [result for result in results if result is not None]
        except TimeoutError as error:
            failures = [error]
        self.notes += [f"something remained on the service: {type(error).__name__}: {error}" for error in failures]

    async def _owned(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Lets a creation run to its end, also if its caller is cancelled, so that its result can be removed."""
        task = asyncio.create_task(work, name="tinkex.certify.create")
        self._creating.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._creating.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left

    async def _created(self, work: Coroutine[Any, Any, AsyncTrainingClient]) -> AsyncTrainingClient:
        model = await work
        self.created += 1
        self._alive.add(model)
        return model

    async def _saved(self, model: AsyncTrainingClient) -> str:
        saved = await model.save_state(f"certify-{uuid.uuid4().hex[:12]}")
        self._path = saved.path
        return saved.path

    async def _unload(self, model: AsyncTrainingClient) -> None:
        try:
            await model.unload()
        except (BadRequest, RequestFailed, Unprocessable, UnsupportedFeature) as error:
            beginning = "throwaway models end with the session"
            if not any(note.startswith(beginning) for note in self.notes):
                self.notes.append(f"{beginning}: {' '.join(str(error).split())[:200]}")
        except NotFound:
            pass  # it was removed before
        self._alive.discard(model)


def logprobs_of(forward: ForwardBackwardOutput) -> Array:
    """Returns the logprobs of a pass, float64; raises InvalidResponse if there are none."""
    packed = forward.packed.get("logprobs")
    if packed is None:
        raise InvalidResponse("the forward pass returned no logprobs: its service cannot be measured")
    return packed.values.astype(np.float64)
