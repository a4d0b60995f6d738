"""Planted mistakes: losses as people write them, each with one mistake, and the correct ones beside them."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.lint.support import packed
from tinkex_py import Datum, per_datum

Data = Sequence[Datum]
Parts = Sequence[torch.Tensor]


def selected(data: Data, logprobs: torch.Tensor, *names: str) -> list[torch.Tensor]:
    """The logprobs and fields where the weights are not 0."""
    kept = packed(data, "weights", logprobs) != 0
    return [logprobs[kept], *(packed(data, name, logprobs)[kept] for name in names)]


def nll(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    (own,) = selected(data, logprobs)
    return -own.sum()


def likelihood(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    """The sign is missing."""
    return -nll(data, logprobs)


def policy(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own, sampler, advantages = selected(data, logprobs, "logprobs", "advantages")
    ratio = (own - sampler).clamp(-20, 20).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()


def policy_with_plus(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own, sampler, advantages = selected(data, logprobs, "logprobs", "advantages")
    return ((own - sampler).clamp(-20, 20).exp() * advantages).sum()


def ratio_without_clamp(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own, sampler, advantages = selected(data, logprobs, "logprobs", "advantages")
    return -((own - sampler).exp() * advantages).sum()


def ratio_clamped_too_late(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    """exp() overflows to infinity, whose gradient times 0 is nan, although the ratio is clamped."""
    own, sampler, advantages = selected(data, logprobs, "logprobs", "advantages")
    ratio = (own - sampler).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()


def reinforce(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    """Ignores the sampler."""
    own, advantages = selected(data, logprobs, "advantages")
    return -(own * advantages).sum()


def advantages_scaled_in_the_call(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own, sampler, advantages = selected(data, logprobs, "logprobs", "advantages")
    centred = advantages - advantages.mean()
    scaled = centred / centred.square().mean().sqrt()
    return -((own - sampler).clamp(-20, 20).exp() * scaled).sum()


def policy_with_all_positions(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    """A KL estimate without the mask."""
    own, sampler = logprobs, packed(data, "logprobs", logprobs)
    return policy(data, logprobs) + 0.01 * (own - sampler).square().sum()


def nll_of_prompts(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.sum()


def mask_by_multiplying(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    return -(logprobs * packed(data, "weights", logprobs)).sum()


def mean_of_mask(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    weights = packed(data, "weights", logprobs)
    return -logprobs[weights != 0].sum() / weights.sum()


def mean_over_call(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    (own,) = selected(data, logprobs)
    return -own.sum() / max(own.numel(), 1)


def mean_of_means(data: Data, parts: Parts) -> torch.Tensor:
    kept = [part[1:] for part in parts]
    return torch.stack([-part.mean() for part in kept]).sum()


def detached(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    return nll(data, logprobs.detach())


def kept_as_number(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    return torch.tensor(nll(data, logprobs).item())


def ratio_detached(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    """The unbiased k3 needs the gradient of its ratio."""
    own, sampler, reference = selected(data, logprobs, "logprobs", "reference_logprobs")
    difference = (own - reference).clamp(-20, 20)
    ratio = (own - sampler).clamp(-20, 20).exp()
    return (ratio.detach() * ((-difference).exp() - 1 + difference)).sum()


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        return -own.sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.expand(sum(LENGTH_OF_ANSWERS))


LENGTH_OF_ANSWERS = (3, 5, 2, 6, 4, 7)


def own_backward(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    (own,) = selected(data, logprobs)
    return Backwards.apply(own)  # type: ignore[no-any-return]


def k1(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own, reference = selected(data, logprobs, "reference_logprobs")
    return (own - reference).sum()


def k2(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own, reference = selected(data, logprobs, "reference_logprobs")
    return 0.5 * (own - reference).square().sum()


def k1_to_base(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own, reference = selected(data, logprobs, "base")
    return (own - reference).sum()


def away_from_reference(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    return -k2(data, logprobs)


def k3_without_clamp(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own, reference = selected(data, logprobs, "reference_logprobs")
    return ((reference - own).exp() - 1 + own - reference).sum()


def entropy_of_samples(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    """The derivative of log p is 0 on average; minimized, it only makes samples less likely."""
    (own,) = selected(data, logprobs)
    return 0.01 * own.sum()


def log_of_rest(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    (own,) = selected(data, logprobs)
    return -(1 - own.exp()).log().sum()


def margins(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    weights = packed(data, "weights", logprobs)
    difference = torch.where(weights != 0, logprobs - packed(data, "reference_logprobs", logprobs), 0.0)
    lengths = [len(datum.loss_fn_inputs["weights"].tolist()) for datum in data]
    return torch.stack([part.sum() for part in torch.split(difference, lengths)])


def dpo(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own = margins(data, logprobs)
    return torch.nn.functional.softplus(-0.1 * (own[0::2] - own[1::2])).sum()


def dpo_swapped(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own = margins(data, logprobs)
    return torch.nn.functional.softplus(-0.1 * (own[1::2] - own[0::2])).sum()


def unpaired_swapped(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    own = margins(data, logprobs)
    labels = own.new_tensor([datum.loss_fn_inputs["label"].tolist()[0] for datum in data])
    return torch.sigmoid(0.1 * labels * own).sum()


def with_dropout(data: Data, logprobs: torch.Tensor) -> torch.Tensor:
    (own,) = selected(data, logprobs)
    return -torch.nn.functional.dropout(own, 0.5).sum()


def per_answer(data: Data, parts: Parts) -> torch.Tensor:
    """Correct, and written for lists."""
    return torch.stack([-part[1:].sum() for part in parts]).sum()


def rewards_by_place(data: Data, parts: Parts) -> torch.Tensor:
    """Correct if the rewards are those of these datums; a loss on pairs has no such order."""
    return torch.stack([-float(index) * part[1:].sum() for index, part in enumerate(parts)]).sum()


rewards_by_place.coupling = "the rewards are by the place of a datum"  # type: ignore[attr-defined]
MEAN_OF_MEANS, PER_ANSWER = per_datum(mean_of_means), per_datum(per_answer)


class Sharded:
    """A term that runs on shards of one datum each, which add up, as `RayTerm` does with many replicas."""

    shards = 4

    def __init__(self, unsharded: Any) -> None:
        self.unsharded = unsharded

    def compute(self, data: Data, logprobs: torch.Tensor) -> torch.Tensor:
        parts = torch.split(logprobs, [datum.model_input.length for datum in data])
        return torch.stack([self.unsharded([datum], own) for datum, own in zip(data, parts, strict=True)]).sum()
