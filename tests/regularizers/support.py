"""Shared by the tests of ready-made terms: datums, leaves, losses and gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tinkex_py import Datum, ModelInput
from tinkex_py.losses.logprobs import PackedLogprobs
from tinkex_py.terms.ready_made import ReadyMadeTerm

LENGTHS = (3, 1, 4)


def datum(length: int, candidates: int | None = None, **fields: Any) -> Datum:
    shape = (length,) if candidates is None else (length, candidates)
    targets = np.zeros(shape, np.int64)
    return Datum(
        model_input=ModelInput.from_ints(list(range(length))), loss_fn_inputs={"target_tokens": targets, **fields}
    )


def datums(
    lengths: Sequence[int] = LENGTHS, candidates: int | None = None, **packed: torch.Tensor | Sequence[float]
) -> list[Datum]:
    """Datums whose fields are slices of packed ones."""
    pieces = {
        name: torch.split(torch.as_tensor(values, dtype=torch.float32), list(lengths))
        for name, values in packed.items()
    }
    return [
        datum(length, candidates, **{name: parts[index] for name, parts in pieces.items()})
        for index, length in enumerate(lengths)
    ]


def packed_leaf(values: torch.Tensor) -> torch.Tensor:
    """A leaf as a client passes it to terms: iterating over it raises."""
    return values.detach().clone().as_subclass(PackedLogprobs).requires_grad_()


def evaluated(
    term: ReadyMadeTerm, data: Sequence[Datum], logprobs: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Loss, gradient and metrics of a sync term."""
    leaf = packed_leaf(logprobs) if data and logprobs.ndim else logprobs.detach().clone().requires_grad_()
    result: Any = term.compute(data, leaf, **settings)
    loss, metrics = result
    assert loss.ndim == 0
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient.as_subclass(torch.Tensor), dict(metrics)


def loss_of(term: ReadyMadeTerm, data: Sequence[Datum] = ()) -> Callable[[torch.Tensor], torch.Tensor]:
    """The loss as a function of the logprobs, for gradcheck."""

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        result: Any = term.compute(data, logprobs)
        return result[0]

    return loss


def random_logprobs(*shape: int, seed: int = 0) -> torch.Tensor:
    """Distributions over the last axis for two or more axes; else numbers below 0. In float64."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.log_softmax(-1) if len(shape) > 1 else -numbers.abs() - 0.05
