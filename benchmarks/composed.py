"""Eight typical regularizers, each one line of torch."""

from typing import Any

import torch

from tinkex_py import RegularizerSpec


def l1(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.abs().sum()


def l2(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.square().sum()


def mean_confidence(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.exp().mean()


def sampled_entropy(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs * logprobs.exp()).sum()


def smooth(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(-logprobs).sum()


def floor(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return torch.relu(-4.0 - logprobs).sum()


def spread(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs - logprobs.detach().mean()).square().mean()


def huber(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.smooth_l1_loss(logprobs, torch.zeros_like(logprobs), reduction="sum")


TERMS = (l1, l2, mean_confidence, sampled_entropy, smooth, floor, spread, huber)
WEIGHTS = tuple(0.01 * (place + 1) for place in range(len(TERMS)))


def base_loss(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.sum()


def regularizers() -> list[RegularizerSpec]:
    """Returns all eight as specs."""
    return [
        RegularizerSpec(fn=term, weight=weight, name=term.__name__) for term, weight in zip(TERMS, WEIGHTS, strict=True)
    ]
