"""Probes: a step of a throwaway model along a known gradient, and the change of the logprobs that follows."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from tinkex_py.certify.models import Batch, ThrowawayModels, logprobs_of
from tinkex_py.client.surrogate import SurrogateName
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import BadRequest, RequestFailed, Unprocessable
from tinkex_py.types import AdamParams, Datum, ModelInput, TensorData
from tinkex_py.types.tensors import Array

Value = TypeVar("Value")

REFUSED = (BadRequest, RequestFailed, Unprocessable)
"""What a service answers that does not have a loss or a setting; other errors end the measurement."""

LENGTHS = (3, 9, 4, 6)
MANY_LENGTHS = tuple(2 + index % 5 for index in range(16))
CANDIDATES = 2
# Token ids that every vocabulary has.
_TOKENS = (32, 256)


@dataclass(frozen=True)
class Step:
    """One AdamW step with beta1 = beta2 = 0, which is linear in a gradient that is small against eps.

    Attributes:
        rate: the learning rate divided by eps, which is the step per unit of gradient.
        eps: eps of AdamW.
    """

    rate: float
    eps: float

    def params(self) -> AdamParams:
        """Returns the parameters of the optimizer step."""
        return AdamParams(learning_rate=self.rate * self.eps, beta1=0.0, beta2=0.0, eps=self.eps)

    def times(self, rate: float = 1.0, eps: float = 1.0) -> "Step":
        """Returns the step with multiplied numbers."""
        return Step(self.rate * rate, self.eps * eps)


@dataclass(frozen=True)
class Call:
    """Datums of one `forward_backward_custom`, and the gradient of its loss, concatenated over them."""

    data: Sequence[Datum]
    gradient: Array


@dataclass(frozen=True)
class ProbeResponse:
    """What a step did.

    Attributes:
        change: the change of the watched logprobs, float64.
        norm: the norm of the gradient that the service reports; None if it reports none.
    """

    change: Array
    norm: float | None

    @property
    def size(self) -> float:
        """The largest change of a logprob."""
        return float(np.abs(self.change).max())


class Probes:
    """Makes the probes of one surrogate.

    Args:
        models: the throwaway models.
        surrogate: the surrogate that carries the gradients.
    """

    def __init__(self, models: ThrowawayModels, surrogate: SurrogateName) -> None:
        self.models = models
        self.surrogate: SurrogateName = surrogate

    async def one_sided(self, calls: Sequence[Call], watched: Batch, step: Step, *, sign: float = 1.0) -> ProbeResponse:
        """Returns the response to the gradient of the calls times `sign`."""
        if self.models.shared is not None:
            return (await self._there_and_back(calls, watched, step, sign))[0]
        before = await self.models.before(watched)
        async with self.models.fresh() as model:
            return await self._moved(model, calls, watched, step, sign, before)

    async def odd(self, calls: Sequence[Call], watched: Batch, step: Step) -> ProbeResponse:
        """Returns half of the difference of the responses to the gradient and its negative, which has no curvature."""
        if self.models.shared is not None:
            plus, minus = await self._there_and_back(calls, watched, step, 1.0)
        else:
            plus, minus = await together(
                self.one_sided(calls, watched, step), self.one_sided(calls, watched, step, sign=-1.0)
            )
        norm = None if plus.norm is None or minus.norm is None else (plus.norm + minus.norm) / 2
        return ProbeResponse((plus.change - minus.change) / 2, norm)

    async def _there_and_back(
        self, calls: Sequence[Call], watched: Batch, step: Step, sign: float
    ) -> tuple[ProbeResponse, ProbeResponse]:
        async with self.models.fresh() as model:
            before = logprobs_of(await model.forward(watched.data))
            there = await self._moved(model, calls, watched, step, sign, before)
            back = await self._moved(model, calls, watched, step, -sign, before + there.change)
        drift = float(np.abs(there.change + back.change).max())
        self.models.drift = max(self.models.drift or 0.0, drift)
        return there, back

    async def _moved(
        self,
        model: AsyncTrainingClient,
        calls: Sequence[Call],
        watched: Batch,
        step: Step,
        sign: float,
        before: Array,
    ) -> ProbeResponse:
        datums = sum(len(call.data) for call in calls)
        for call in calls:
            loss = _with_gradient(sign * call.gradient)
            await model.forward_backward_custom(call.data, loss, surrogate=self.surrogate, sequences_per_step=datums)
        done = await model.optim_step(step.params())
        after = logprobs_of(await model.forward(watched.data))
        return ProbeResponse(after - before, done.grad_norm)


async def together(*work: Awaitable[Value]) -> list[Value]:
    """Awaits all, and raises the first error when all have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def apart(found: Array, expected: Array) -> float:
    """Returns the distance of two responses, relative to the larger one; 1 if it is not a number."""
    size = max(float(np.linalg.norm(found)), float(np.linalg.norm(expected)))
    distance = float(np.linalg.norm(found - expected))
    relative = distance / size if size else 0.0
    return relative if np.isfinite(relative) else 1.0


def small_batch() -> Batch:
    """Returns four datums of unequal lengths; two are the beginnings of the others, so that they move each other."""
    return Batch("small", tuple(_datum(length, index // 2) for index, length in enumerate(LENGTHS)))


def many_batch() -> Batch:
    """Returns the datums of the accumulation."""
    return Batch("many", tuple(_datum(length, 100 + seed) for seed, length in enumerate(MANY_LENGTHS)))


def candidates() -> tuple[dict[str, Datum], Batch]:
    """Returns a datum with targets `[T, 2]`, dense and sparse, and the two datums with one of its columns each."""
    plain = _datum(LENGTHS[-1], 200)
    targets = np.stack([plain.loss_fn_inputs["target_tokens"].to_numpy(), _tokens(LENGTHS[-1], 201)], axis=1)
    columns = [Datum(model_input=plain.model_input, loss_fn_inputs={"target_tokens": column}) for column in targets.T]
    sparse = TensorData(
        data=targets.reshape(-1),
        shape=targets.shape,
        sparse_crow_indices=np.arange(0, targets.size + 1, CANDIDATES),
        sparse_col_indices=np.tile(np.arange(CANDIDATES), LENGTHS[-1]),
    )
    forms = {
        name: Datum(model_input=plain.model_input, loss_fn_inputs={"target_tokens": form})
        for name, form in {"dense": targets, "sparse": sparse}.items()
    }
    return forms, Batch("columns", tuple(columns))


def pattern(size: int) -> Array:
    """Returns a gradient with both signs whose sum is far from 0, because some services divide by the sum."""
    return np.cos(np.arange(size, dtype=np.float64)) - 0.7


def _datum(length: int, seed: int) -> Datum:
    return Datum(
        model_input=ModelInput.from_ints(_tokens(length, 1000 + seed)),
        loss_fn_inputs={"target_tokens": _tokens(length, 2000 + seed)},
    )


def _tokens(length: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(*_TOKENS, max(LENGTHS))[:length]


def _with_gradient(gradient: Array) -> Callable[[Sequence[Datum], torch.Tensor], torch.Tensor]:
    numbers = torch.tensor(gradient, dtype=torch.float32)

    def loss(_data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        return (logprobs * numbers.view_as(logprobs)).sum()

    return loss
