"""Shared by the tests of the composition: the guide's numbers, small terms, recorders, gates."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tinkex_py import Datum, ModelInput, RegularizerSpec, telemetry
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.telemetry import Event
from tinkex_py.types import PackedTensor

# All numbers of the guide are derived by hand from these five logprobs.
GUIDE_VALUES = (-0.5, -1.2, -0.8, -2.1, -0.3)
LIMIT = 5.0  # seconds after which a test calls a wait a hang


def guide_logprobs() -> torch.Tensor:
    return torch.tensor(GUIDE_VALUES)


def nll(data: Sequence[Datum], logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    return -logprobs.mean(), {}


async def async_nll(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.mean()


def l1(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.abs().sum()


def l2(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.pow(2).sum()


def entropy(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs.exp() * logprobs).sum()


async def async_l2(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    await asyncio.sleep(0)
    return logprobs.pow(2).sum()


def guide_specs() -> list[RegularizerSpec]:
    return [
        RegularizerSpec(fn=l1, weight=0.01, name="l1_sparsity"),
        RegularizerSpec(fn=l2, weight=0.005, name="l2_weight_decay"),
        RegularizerSpec(fn=entropy, weight=0.001, name="entropy"),
    ]


def spec(fn: Any, name: str, weight: Any = 1.0, **options: Any) -> RegularizerSpec:
    return RegularizerSpec(fn=fn, weight=weight, name=name, **options)


def datum(length: int, candidates: int | None = None) -> Datum:
    shape = (length,) if candidates is None else (length, candidates)
    return Datum(
        model_input=ModelInput.from_ints(list(range(length))),
        loss_fn_inputs={"target_tokens": np.zeros(shape, np.int64)},
    )


def packed(arrays: Sequence[np.ndarray]) -> Logprobs:
    return Logprobs.from_packed(PackedTensor.from_arrays([array.astype(np.float32) for array in arrays]))


@contextmanager
def recorded(events: str | None = None) -> Iterator[list[Event]]:
    seen: list[Event] = []
    handler = telemetry.attach(seen.append, events=events)
    try:
        yield seen
    finally:
        telemetry.detach(handler)


def names_of(events: Sequence[Event]) -> list[str]:
    return [event.name for event in events]


async def until(condition: Callable[[], bool]) -> None:
    """Waits, turn by turn of the loop, until something that another thread or task does is visible."""
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110  # a thread sets no asyncio.Event
            await asyncio.sleep(0.001)


@dataclass
class Gate:
    """A sync term that counts how many of it run at once and ends when it is opened."""

    value: float = 1.0
    opened: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: int = 0
    peak: int = 0
    calls: int = 0
    threads: set[int] = field(default_factory=set)

    def __call__(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.calls += 1
            self.running += 1
            self.peak = max(self.peak, self.running)
            self.threads.add(threading.get_ident())
        self.entered.release()
        assert self.opened.wait(30.0)
        with self.lock:
            self.running -= 1
        return logprobs.sum() * self.value

    @contextmanager
    def opening(self) -> Iterator["Gate"]:
        """Opens at the end, however the test ends, so that no thread stays behind."""
        try:
            yield self
        finally:
            self.opened.set()


@dataclass
class Crowd:
    """An async term that counts how many of it run at once, and waits until `enough` are there."""

    enough: int
    running: int = 0
    peak: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def compute(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        self.running += 1
        self.peak = max(self.peak, self.running)
        if self.running >= self.enough:
            self.arrived.set()
        await self.arrived.wait()
        self.running -= 1
        return logprobs.sum()
