"""Terms in worker processes, seen from the program: the data of a step, the call of a term, and its evaluation."""

import asyncio
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from tinkex_py.errors import PipelineError, RegularizerTimeout
from tinkex_py.limits import time_limit
from tinkex_py.losses.crossed_datums import packed
from tinkex_py.losses.gradients import Evaluation
from tinkex_py.losses.logprobs import Logprobs, bits_of
from tinkex_py.losses.outcomes import PreparedTerm
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.processes.crossing import write_file
from tinkex_py.processes.pool import Worker
from tinkex_py.types import Datum

# Seconds for the start of a worker, and for loading the function of a term there.
START_LIMIT = 60.0


@dataclass(frozen=True)
class CrossedTensor:
    """A tensor of any dtype as an array of integers, which can be mapped."""

    bits: Any
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "CrossedTensor":
        """Makes it of a tensor on the CPU, with the same memory if possible."""
        return cls(bits_of(tensor).numpy(), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> torch.Tensor:
        """Returns the tensor, over the same memory."""
        return torch.from_numpy(self.bits).view(self.dtype).reshape(self.shape)  # pyright: ignore[reportUnknownMemberType]


@dataclass(frozen=True)
class StepData:
    """What the terms of a step receive; see `Logprobs`, and `crossed_datums` for the layouts."""

    layouts: Sequence[object]
    buffer: CrossedTensor
    shapes: Sequence[tuple[int, ...]] | None
    packable: bool
    guarded: bool


@dataclass(frozen=True)
class Job:
    """How a worker evaluates a term; the first fields are those of `PreparedTerm`."""

    name: str
    per_datum: bool
    weight: float | None
    max_grad_norm: float | None
    track_grad_norms: bool
    torch_threads: int
    default_dtype: torch.dtype


class StepFile:
    """What the terms of a step receive, in a file that is written once for all terms in worker processes.

    Args:
        data: the datums.
        logprobs: the logprobs.
        workers: threads and processes.

    Raises:
        PipelineError: the logprobs are not on the CPU.
    """

    def __init__(self, data: Sequence[Datum], logprobs: Logprobs, workers: WorkerPool) -> None:
        if logprobs.buffer.device.type != "cpu":
            raise PipelineError(
                f"terms with runs_in='process' need logprobs on the CPU, got device {logprobs.buffer.device}: move "
                "them there, or use runs_in='thread'"
            )
        self._data = data
        self._logprobs = logprobs
        self._workers = workers
        self._writing = asyncio.Lock()
        self._lock = threading.Lock()
        self._is_open = True
        self._spare = workers.processes.spare_file()
        self._file: int | None = None
        self._readers = 0

    async def written(self) -> None:
        """Waits until the file is written; the first caller has it written, in a thread."""
        async with self._writing:
            if self._file is None:
                await self._workers.compute("data", self._write)

    def _write(self) -> None:
        layouts, column = packed(self._data)
        logprobs = self._logprobs
        buffer = CrossedTensor.of(logprobs.buffer)
        step = StepData(layouts, buffer, logprobs.shapes, logprobs.packable, logprobs.guarded)
        with self._lock:
            if not self._is_open:
                return
            spare, self._spare = self._spare, None
        file = write_file(step, column, over=spare)
        with self._lock:
            if self._is_open and self._file is None:
                self._file = file
                return
        os.close(file)

    def close(self) -> None:
        """Closes the file, unless no worker can read it any more: then a later step writes over it."""
        with self._lock:
            self._is_open = False
            files, self._spare, self._file = (self._spare, self._file), None, None
        spare, file = files
        if file is not None and self._readers:
            os.close(file)
            file = None
        for unread in (spare, file):
            if unread is not None:
                self._workers.processes.keep_file(unread)

    async def read_by(self, worker: Worker, key: bytes, job: Job) -> object:
        """Returns the answer of a worker that reads the file."""
        assert self._file is not None, "it was written"
        self._readers += 1
        answer, may_read = await self._workers.processes.call(worker, key, job, self._file)
        if not may_read:
            self._readers -= 1
        return answer


async def ready_worker(workers: WorkerPool, term: PreparedTerm) -> Worker:
    """Returns a worker that has loaded the function of a term; give it back to `workers.processes`.

    Raises:
        RegularizerTimeout: it was not ready in time, and was killed.
    """
    assert term.crossing is not None, "it runs in a process"

    def late() -> RegularizerTimeout:
        return RegularizerTimeout(
            f"the worker process of term {term.name!r} was not ready within {START_LIMIT} s: reduce what the modules "
            "of the term do when they are imported",
            name=term.name,
            timeout=START_LIMIT,
        )

    async with time_limit(START_LIMIT, late):
        return await workers.processes.worker_with(*term.crossing)


async def evaluated_in(
    worker: Worker, workers: WorkerPool, term: PreparedTerm, file: StepFile, *, track_grad_norms: bool
) -> Evaluation:
    """Returns the evaluation of a term in a worker. A cancelled caller kills the worker."""
    assert term.crossing is not None, "it runs in a process"
    job = Job(
        term.name,
        term.per_datum,
        term.weight,
        term.max_grad_norm,
        track_grad_norms,
        workers.torch_threads(),
        torch.get_default_dtype(),
    )
    answer = await file.read_by(worker, term.crossing[0], job)
    evaluation, gradient = cast("tuple[Evaluation, CrossedTensor | None]", answer)
    return evaluation if gradient is None else replace(evaluation, gradient=gradient.tensor())
