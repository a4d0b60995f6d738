"""The measured batches, as datums of both SDKs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.benchmark import Settings

VOCABULARY = 32_000
# A step on fewer numbers takes only milliseconds, so it is measured more often.
SMALL = 100_000
MORE_ROUNDS = 10


@dataclass(frozen=True)
class Batch:
    """Datums with targets of one shape: `(T,)` or `(T, K)`."""

    datums: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        tokens, *candidates = self.shape
        return f"{self.datums:,} x {tokens:,}" + "".join(f" x K={count}" for count in candidates)

    @property
    def logprobs(self) -> int:
        return self.datums * math.prod(self.shape)


BATCHES = (
    Batch(64, (512,)),
    Batch(1_024, (512,)),
    Batch(256, (8_192,)),
    Batch(4_096, (128,)),
    Batch(1_024, (512, 8)),
)


def rounds_of(batch: Batch, settings: Settings) -> int:
    """Returns how often a batch is measured."""
    is_short = batch.logprobs < SMALL and not settings.quick
    return settings.rounds * MORE_ROUNDS if is_short else settings.rounds


def arrays(datums: int, shape: tuple[int, ...]) -> Iterator[tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]]:
    """Yields the tokens and loss inputs of every datum."""
    numbers = np.random.default_rng(3)
    for _ in range(datums):
        tokens = numbers.integers(0, VOCABULARY, shape[0], dtype=np.int32)
        targets = numbers.integers(0, VOCABULARY, shape, dtype=np.int64)
        yield tokens, {"target_tokens": targets, "weights": np.ones(shape, np.float32)}


def own(datums: int, shape: tuple[int, ...]) -> list[Any]:
    """Returns the batch as datums of this package."""
    from tinkex_py import Datum, ModelInput

    return [
        Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs=inputs)
        for tokens, inputs in arrays(datums, shape)
    ]


def official(datums: int, shape: tuple[int, ...]) -> list[Any]:
    """Returns the batch as datums of the official SDK."""
    from tinker import types

    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens.tolist()),
            loss_fn_inputs={name: types.TensorData.from_numpy(values) for name, values in inputs.items()},
        )
        for tokens, inputs in arrays(datums, shape)
    ]
