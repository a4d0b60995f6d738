"""Terms that Ray workers import."""

import os
import time
from pathlib import Path
from typing import Any

import torch

from tinkex_py import Scored


def entropy(data: Any, logprobs: torch.Tensor, scale: float = 1.0) -> Any:
    probabilities = torch.softmax(logprobs.double() * scale, 0)
    return (probabilities * probabilities.log()).sum(), {
        "pid": os.getpid(),
        "size": len(data),
        "grad": torch.is_grad_enabled(),
    }


def parts(data: Any, logprobs: list[torch.Tensor]) -> Any:
    total = sum(own.square().sum() for own in logprobs)
    return total, {"datums": len(data), "squares:mean": total.item() / len(logprobs)}


def squares(data: Any, logprobs: torch.Tensor) -> Any:
    return logprobs.square().sum(), {"pid": os.getpid()}


def mean(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.square().mean()


def note(folder: str) -> None:
    """Leaves a file that has the process id as its name."""
    (Path(folder) / str(os.getpid())).touch()


def naps(data: Any, logprobs: torch.Tensor, folder: str, seconds: float = 600.0) -> torch.Tensor:
    """Sleeps in the first process that calls it, wherever that is."""
    is_first = not any(Path(folder).iterdir())
    note(folder)
    if is_first:
        time.sleep(seconds)
    return logprobs.square().sum()


def names(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    import ray

    raise LookupError(ray.get_runtime_context().get_task_name())


def writes(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    logprobs.data[0] = 0.0
    return logprobs.sum()


def constant(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return torch.tensor(2.5)


def scored(data: Any, logprobs: torch.Tensor) -> Scored:
    return Scored(1.5, 3 * logprobs.detach(), {"count": len(data)})


def returns_text(data: Any, logprobs: torch.Tensor) -> Any:
    return "a loss"


class Model:
    """A model that takes long to load: each load leaves a file."""

    def __init__(self, folder: str, factor: float = 1.0) -> None:
        note(folder)
        self.factor = factor

    def compute(self, data: Any, logprobs: torch.Tensor, nap_in: str | None = None) -> Any:
        if nap_in is not None:
            naps(data, logprobs, nap_in)
        return (logprobs.square() * self.factor).sum(), {"pid": os.getpid()}


class Broken:
    def __init__(self) -> None:
        raise OSError("the weights are not there")

    def __call__(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.sum()
