"""Datums of the tiny model, and terms."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tinkex_py import Datum, ModelInput


def datum(length: int, seed: int = 0, candidates: int | None = None, **extra: Any) -> Datum:
    """Random tokens, random targets `[T]` or `[T, K]`, random weights."""
    random = np.random.default_rng(1000 * seed + length)
    shape = (length,) if candidates is None else (length, candidates)
    return Datum(
        model_input=ModelInput.from_ints(random.integers(0, 256, length)),
        loss_fn_inputs={
            "target_tokens": random.integers(0, 256, shape),
            "weights": random.random(shape, dtype=np.float32),
            **extra,
        },
    )


def bad_datum() -> Datum:
    """A datum that only the service can find fault with: token ids beyond the vocabulary."""
    return Datum(
        model_input=ModelInput.from_ints([1, 2, 99_999]),
        loss_fn_inputs={"target_tokens": [2, 3, 99_999], "weights": [1.0, 1.0, 1.0]},
    )


def nll(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.sum()
