"""Makes datums and terms from their plans."""

import asyncio
import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.soak.plan import DataPlan, TermPlan
from tinkex_py import Datum, ModelInput, RegularizerSpec, packed_field, per_datum
from tinkex_py.base_losses import NLL
from tinkex_py.losses.weights import Weight
from tinkex_py.regularizers import L1

PLANNED = "planned"
HANGING = 0.05
"""Timeout of a term that hangs, in seconds."""
SLOW = 0.01
"""Seconds that a slow coroutine takes."""

Values = dict[str, np.ndarray[Any, Any]]


@dataclass
class Stage:
    """Controls the waiting terms of a step.

    Attributes:
        entered: set when a waiting term is called.
        let_go: ends the waits in worker threads.
    """

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def enter(self) -> None:
        """Called by a term, from any thread."""
        self.loop.call_soon_threadsafe(self.entered.set)


def datums(plan: DataPlan) -> list[Datum]:
    """Makes random tokens, targets and weights."""
    random = np.random.default_rng(plan.seed)
    data: list[Datum] = []
    for length in plan.lengths:
        shape = (length,) if plan.candidates is None else (length, plan.candidates)
        tokens = random.integers(0, 256, length).tolist()
        values: Values = {
            "target_tokens": random.integers(0, 256, shape),
            "weights": random.random(shape, dtype=np.float32),
        }
        inputs = {name: contained(value, plan.container) for name, value in values.items()}
        data.append(Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs=inputs))
    return data


def contained(value: np.ndarray[Any, Any], container: str) -> Any:
    """Returns the numbers as a list, an array or a tensor."""
    if container == "list":
        return value.tolist()
    return torch.from_numpy(value) if container == "torch" else value


# Arithmetic


def nll(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.sum()


def weighted_nll(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return -(packed_field(data, "weights") * logprobs).sum()


def squares(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs**2).sum()


def absolute(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.abs().sum()


def spread(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.var(unbiased=False)


def by_numpy(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    coefficients = np.tanh(logprobs.detach().numpy())
    return (torch.from_numpy(coefficients) * logprobs).sum()


def every_datum(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(own**2).mean() for own in logprobs]).sum()


def with_metrics(data: Sequence[Datum], logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    return (logprobs.exp() * logprobs).sum(), {"least": float(logprobs.min().detach())}


FUNCTIONS: dict[str, Any] = {
    "squares": squares,
    "absolute": absolute,
    "spread": spread,
    "weighted": weighted_nll,
    "by numpy": by_numpy,
    "per datum": every_datum,
    "with metrics": with_metrics,
    "ready-made L1": L1(mask=None),
}
BASES: dict[str, Any] = {"nll": nll, "weighted nll": weighted_nll, "ready-made NLL": NLL()}


# Terms


def spec(plan: TermPlan, stage: Stage) -> RegularizerSpec:
    """Makes the regularizer of a plan."""
    return RegularizerSpec(
        fn=_term(plan, stage),
        weight=_weight(plan),
        name=plan.name,
        timeout=HANGING if plan.fate == "hangs" else math.inf if plan.fate == "waits" else None,
        on_error="skip" if plan.skipped else "raise",
    )


def _weight(plan: TermPlan) -> Weight:
    return (lambda step: plan.weight * (1 + step % 5)) if plan.scheduled else plan.weight


def _term(plan: TermPlan, stage: Stage) -> Any:
    function = FUNCTIONS[plan.shape]
    if plan.fate == "fine" and not (plan.is_async or plan.slow):
        return per_datum(function) if plan.shape == "per datum" else function
    arithmetic: Callable[..., Any] = getattr(function, "compute", function)
    term = _coroutine(plan, stage, arithmetic) if plan.is_async else _in_a_thread(plan, stage, arithmetic)
    return per_datum(term) if plan.shape == "per datum" else term


def _coroutine(plan: TermPlan, stage: Stage, arithmetic: Callable[..., Any]) -> Any:
    async def term(data: Sequence[Datum], logprobs: Any) -> Any:
        await asyncio.sleep(SLOW if plan.slow else 0)
        if plan.fate == "raises":
            raise ValueError(PLANNED)
        if plan.fate in ("hangs", "waits"):
            stage.enter()
            await asyncio.Event().wait()
        return arithmetic(data, logprobs)

    return term


def _in_a_thread(plan: TermPlan, stage: Stage, arithmetic: Callable[..., Any]) -> Any:
    def term(data: Sequence[Datum], logprobs: Any) -> Any:
        if plan.slow:
            functools.reduce(lambda product, _: torch.tanh(product @ product), range(40), torch.eye(64))
        if plan.fate == "raises":
            raise ValueError(PLANNED)
        if plan.fate in ("hangs", "waits"):
            stage.enter()
            stage.let_go.wait(60)
        return arithmetic(data, logprobs)

    return term
