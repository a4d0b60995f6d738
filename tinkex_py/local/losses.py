"""The built-in losses: formulas over one datum's target logprobs, as a plain sum over positions.

p = logprobs of the model, q = `logprobs` of the datum, A = `advantages`, r = exp(p - q). Source: the protocol's table
of losses; GSPO also "Group Sequence Policy Optimization" (Zheng et al., 2025), section 4.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinkex_py.errors import InvalidData, UnsupportedFeature

Inputs = Mapping[str, Tensor]
Settings = Mapping[str, float]


@dataclass(frozen=True)
class DatumLoss:
    """The loss of one datum.

    Args:
        value: 0-d, with its graph.
        elementwise: the loss of each position, shaped like target_tokens, without a graph; None if the loss does not
            have it.
        metrics: names with the suffix ":sum" or ":mean", which says how they merge over datums.
    """

    value: Tensor
    elementwise: Tensor | None = None
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict[str, "Tensor | float"])


@dataclass(frozen=True)
class Loss:
    """A loss with its settings.

    Args:
        name: its name on the wire.
        compute: from the logprobs of one datum, shaped like its target_tokens, and its loss inputs.
        required: loss inputs that a datum must have.
        optional: loss inputs that it may have.
        refused: loss inputs that would be ignored although they look as if they counted.
        matrix_targets: whether target_tokens may be [T, K].
        ranks: number of dimensions of each input; None if each is float32 and shaped like target_tokens.
        logprobs_rank: number of dimensions of target_tokens; None if `matrix_targets` decides.
    """

    name: str
    compute: Callable[[Tensor, Inputs], DatumLoss]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    matrix_targets: bool = False
    ranks: Mapping[str, int] | None = None
    logprobs_rank: int | None = None


@dataclass(frozen=True)
class Formula:
    """A built-in loss with the defaults of its settings."""

    compute: Callable[[Tensor, Inputs, Settings], DatumLoss]
    required: tuple[str, ...]
    settings: Mapping[str, float]
    optional: tuple[str, ...] = ()
    matrix_targets: bool = False


def _cross_entropy(p: Tensor, inputs: Inputs, settings: Settings) -> DatumLoss:
    del settings
    weights = inputs.get("weights")
    # Its elementwise loss is -weights * logprobs, which clients have anyway.
    return DatumLoss(-(p if weights is None else weights * p).sum())


def _importance_sampling(p: Tensor, inputs: Inputs, settings: Settings) -> DatumLoss:
    del settings
    return _summed(-torch.exp(p - inputs["logprobs"]) * inputs["advantages"], _divergence(p, inputs))


def _ppo(p: Tensor, inputs: Inputs, settings: Settings) -> DatumLoss:
    return _clipped(torch.exp(p - inputs["logprobs"]), p, inputs, settings)


def _cispo(p: Tensor, inputs: Inputs, settings: Settings) -> DatumLoss:
    ratio = torch.exp(p.detach() - inputs["logprobs"])
    clipped = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    metrics = {**_divergence(p, inputs), "clipped_tokens:sum": (clipped != ratio).sum()}
    return _summed(-clipped * p * inputs["advantages"], metrics)


def _dro(p: Tensor, inputs: Inputs, settings: Settings) -> DatumLoss:
    penalty = 0.5 * settings["beta"] * (p - inputs["logprobs"]).square()
    return _summed(-(p * inputs["advantages"] - penalty), _divergence(p, inputs))


def _gspo(p: Tensor, inputs: Inputs, settings: Settings) -> DatumLoss:
    counted = inputs["sequence_ratio_mask"] != 0
    if not bool(counted.any()):
        raise InvalidData("sequence_ratio_mask has only zeros, so that there is no sequence ratio: leave the datum out")
    ratio = torch.exp((p.detach() - inputs["logprobs"])[counted].mean())
    loss = _clipped(ratio * torch.exp(p - p.detach()), p, inputs, settings)
    return DatumLoss(loss.value, loss.elementwise, {**loss.metrics, "sequence_ratio:mean": ratio})


def _clipped(ratio: Tensor, p: Tensor, inputs: Inputs, settings: Settings) -> DatumLoss:
    advantages = inputs["advantages"]
    free = ratio * advantages
    clipped = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"]) * advantages
    metrics = {**_divergence(p, inputs), "clipped_tokens:sum": (clipped < free).sum()}
    return _summed(-torch.minimum(free, clipped), metrics)


def _divergence(p: Tensor, inputs: Inputs) -> dict[str, Tensor | float]:
    """Minus the sum over the tokens estimates the KL divergence of the sampling model from this one."""
    return {"tokens:sum": float(p.numel()), "logprob_difference:sum": (p.detach() - inputs["logprobs"]).sum()}


def _summed(elementwise: Tensor, metrics: Mapping[str, Tensor | float]) -> DatumLoss:
    return DatumLoss(elementwise.sum(), elementwise.detach(), metrics)


_SAMPLED = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

FORMULAS: Mapping[str, Formula] = {
    "cross_entropy": Formula(_cross_entropy, (), {}, optional=("weights",), matrix_targets=True),
    "importance_sampling": Formula(_importance_sampling, _SAMPLED, {}),
    "ppo": Formula(_ppo, _SAMPLED, _CLIP),
    "cispo": Formula(_cispo, _SAMPLED, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    # The protocol has no defaults for the next two: 0.05 is the example of its documentation, the others are ppo's.
    "dro": Formula(_dro, _SAMPLED, {"beta": 0.05}),
    "gspo": Formula(_gspo, (*_SAMPLED, "sequence_ratio_mask"), _CLIP),
}
UNPUBLISHED = ("stable_reinforce",)

GRADIENT_PRODUCTS = "gradient_products"
"""A forward pass that takes gradients of the logprobs, and returns the dot products of the gradients of the weights."""
MAX_GRADIENTS = 64


def find_loss(name: str, config: Mapping[str, float | str]) -> Loss:
    """Returns a built-in loss with its settings, or their defaults.

    Raises:
        InvalidData: the loss or a setting is unknown, or a setting is out of range.
        UnsupportedFeature: the formula of the loss is not published.
    """
    known = f"Known: {', '.join(sorted([*FORMULAS, 'custom']))}"
    if name in UNPUBLISHED:
        raise UnsupportedFeature(
            f"the embedded service does not support loss_fn {name!r}: its formula is not published. {known}"
        )
    formula = FORMULAS.get(name)
    if formula is None:
        raise InvalidData(f"unknown loss_fn {name!r}. {known}")
    settings = dict(formula.settings)
    for key, value in config.items():
        if key not in settings:
            raise InvalidData(f"loss_fn {name!r} has no option {key!r}. Known: {sorted(settings) or 'none'}")
        if isinstance(value, str) or not math.isfinite(value):
            raise InvalidData(f"option {key!r} of loss_fn {name!r} must be a finite number, not {value!r}")
        settings[key] = value
    low, high = settings.get("clip_low_threshold", 0.0), settings.get("clip_high_threshold", math.inf)
    if low > high:
        raise InvalidData(f"loss_fn {name!r}: clip_low_threshold={low} is above clip_high_threshold={high}")
    return Loss(
        name=name,
        compute=lambda p, inputs: formula.compute(p, inputs, settings),
        required=formula.required,
        optional=formula.optional,
        refused=tuple(key for key in settings if key.startswith("clip_")),
        matrix_targets=formula.matrix_targets,
    )


def gradient_products(config: Mapping[str, float | str]) -> Loss:
    """Returns the loss that is linear in the logprobs with the sum of `gradient_0`, `gradient_1`, ... as gradient.

    Args:
        config: `gradients`, the number of these inputs.

    Raises:
        InvalidData: the number is out of range, or there are other options.
    """
    count = config.get("gradients")
    if len(config) != 1 or not isinstance(count, int | float) or count not in range(1, MAX_GRADIENTS + 1):
        raise InvalidData(
            f"loss_fn {GRADIENT_PRODUCTS!r} takes exactly one option, gradients, from 1 to {MAX_GRADIENTS}; got "
            f"{dict(config)}"
        )
    names = tuple(f"gradient_{index}" for index in range(int(count)))
    return Loss(
        name=GRADIENT_PRODUCTS,
        compute=lambda p, inputs: DatumLoss(torch.stack([(p * inputs[name]).sum() for name in names]).sum()),
        required=names,
        matrix_targets=True,
    )
