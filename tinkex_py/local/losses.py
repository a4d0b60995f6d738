"""The built-in losses: formulas over one datum's target logprobs, always a plain sum over tokens.

p = logprobs of the model, q = `logprobs` of the datum, A = `advantages`, r = exp(p - q).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tinkex_py.errors import InvalidData

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]


@dataclass(frozen=True)
class BuiltinLoss:
    """One loss: what a datum must bring, and the formula."""

    compute: Callable[[Tensor, Inputs, Config], Tensor]
    required: tuple[str, ...]
    options: Mapping[str, float]
    optional: tuple[str, ...] = ()
    matrix_targets: bool = False


def _cross_entropy(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    del config
    weights = inputs.get("weights")
    return -(p if weights is None else weights * p).sum()


def _importance_sampling(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    del config
    return -(torch.exp(p - inputs["logprobs"]) * inputs["advantages"]).sum()


def _ppo(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    ratio = torch.exp(p - inputs["logprobs"])
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"]).sum()


def _cispo(p: Tensor, inputs: Inputs, config: Config) -> Tensor:
    ratio = torch.exp(p - inputs["logprobs"]).detach()
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -(clipped * p * inputs["advantages"]).sum()


_SAMPLED = ("logprobs", "advantages")

LOSSES: Mapping[str, BuiltinLoss] = {
    "cross_entropy": BuiltinLoss(_cross_entropy, (), {}, optional=("weights",), matrix_targets=True),
    "importance_sampling": BuiltinLoss(_importance_sampling, _SAMPLED, {}),
    "ppo": BuiltinLoss(_ppo, _SAMPLED, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": BuiltinLoss(_cispo, _SAMPLED, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
}


def find_loss(name: str, config: Mapping[str, float | str]) -> tuple[BuiltinLoss, dict[str, float]]:
    """A loss by name, with the defaults of its options filled in.

    Raises:
        InvalidData: unknown loss, unknown option, or an option that is not a number.
    """
    loss = LOSSES.get(name)
    if loss is None:
        raise InvalidData(f"loss_fn {name!r} is not known here. Known: {', '.join(sorted(LOSSES))}")
    settings = dict(loss.options)
    for key, value in config.items():
        if key not in settings:
            raise InvalidData(f"loss_fn {name!r} has no option {key!r}. Known: {sorted(settings) or 'none'}")
        if isinstance(value, str):
            raise InvalidData(f"option {key!r} of loss_fn {name!r} must be a number, not {value!r}")
        settings[key] = value
    return loss, settings
