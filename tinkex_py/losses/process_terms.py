"""Terms in worker processes, seen from the program: the data of a step, the call of a term, and its evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from tinkex_py.errors import PipelineError, RegularizerTimeout
from tinkex_py.limits import time_limit
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
    """What the terms of a step receive; see `Logprobs`."""

    data: Sequence[Datum]
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


def write_step(data: Sequence[Datum], logprobs: Logprobs) -> int:
    """Writes what the terms of a step receive into a file without a name, once per step. Returns its descriptor.

    Raises:
        PipelineError: the logprobs are not on the CPU.
    """
    if logprobs.buffer.device.type != "cpu":
        raise PipelineError(
            f"terms with runs_in='process' need logprobs on the CPU, got device {logprobs.buffer.device}: move them "
            "there, or use runs_in='thread'"
        )
    buffer = CrossedTensor.of(logprobs.buffer)
    return write_file(StepData(list(data), buffer, logprobs.shapes, logprobs.packable, logprobs.guarded))


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
    worker: Worker, workers: WorkerPool, term: PreparedTerm, file: int, *, track_grad_norms: bool
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
    answer: object = await workers.processes.call(worker, term.crossing[0], job, file)
    evaluation, gradient = cast("tuple[Evaluation, CrossedTensor | None]", answer)
    return evaluation if gradient is None else replace(evaluation, gradient=gradient.tensor())
