"""Rules about masks, extreme values, and samples of another model."""

from collections.abc import Callable

import numpy as np
import torch

from tinkex_py.lint.cases import Case
from tinkex_py.lint.findings import LossFinding
from tinkex_py.lint.subject import Subject

_FAR = 120.0  # nats; exp(120) is no float32
_IMPOSSIBLE_CANDIDATE = -30.0
_OFF_POLICY = 0.02  # mean distance from the sampler, in nats


async def mask_rule(subject: Subject) -> LossFinding | None:
    """Positions with weight 0 have no influence."""
    excluded = subject.case.excluded(subject.mask)
    if excluded is None:
        return None
    moved = subject.case.with_logprobs(lambda part, index: part - 1.3 * excluded[index].to(part).reshape(_rows(part)))
    other = await subject.measured(moved)
    pulled = any(bool(part[out].any()) for part, out in zip(subject.at.gradient, excluded, strict=True))
    moves = other is not None and other.finite and not other.same_value(subject.at)
    if not (pulled or moves):
        return None
    count = sum(int(out.sum()) for out in excluded)
    return LossFinding(
        subject.name,
        "mask",
        "error" if subject.is_base else "warning",
        f"the {count} positions where {subject.mask!r} is 0, such as those of prompts, "
        f"{'have a gradient' if pulled else 'change the loss'}",
        f"Leave them out: logprobs[packed_field(data, {subject.mask!r}) != 0], or the mask= of a ready-made term",
    )


async def finite_rule(subject: Subject) -> LossFinding | None:
    """The loss is finite at the edges: an impossible token outside of the mask, sure tokens, and an empty mask."""
    case, excluded = subject.case, subject.case.excluded(subject.mask)
    edges = list[tuple[str, str, Case]]()
    if excluded is not None and await mask_rule(subject) is None:
        hidden = case.with_logprobs(lambda part, index: part.masked_fill(excluded[index].reshape(_rows(part)), -np.inf))
        edges.append(
            (
                "a logprob is -inf where the mask is 0",
                "Select the positions before any arithmetic: -inf * 0 is nan, logprobs[mask != 0] has no -inf",
                hidden,
            )
        )
    edges.append(
        (
            "logprobs are 0, those of tokens that the model is sure of",
            "Limit what is divided by or has a logarithm, such as log(1 - p): clamp(min=1e-6) before it",
            case.with_logprobs(lambda part, _: _sure(part)),
        )
    )
    weights = None if subject.mask is None else case.values(subject.mask)
    if subject.mask is not None and weights is not None:
        nothing = case.with_values(subject.mask, [np.zeros_like(own) for own in weights])
        edges.append(("the mask leaves no position", "Divide by max(count, 1), so that the loss is 0", nothing))
    for what, way_out, edge in edges:
        found = await subject.measured(edge)
        if found is not None and not found.finite:
            problem = f"the loss or its gradient is not finite if {what}"
            return LossFinding(subject.name, "finite", "error", problem, way_out)
    return None


async def overflow_rule(subject: Subject) -> LossFinding | None:
    """The exponential of a difference of logprobs does not overflow."""
    for name, found in subject.influences.items():
        values = subject.case.values(name)
        if name == subject.advantages or values is None or not found.value:
            continue
        near = _single(subject.case.with_logprobs(lambda part, _: part.clamp(min=-5.0)))
        far = _single(subject.case.with_logprobs(lambda part, _: torch.full_like(part, -_FAR)))
        sides = {
            f"{name!r} is far below the model's logprob": near.with_values(name, [own * 0 - _FAR for own in values]),
            f"the model's logprob is far below {name!r}": far.with_values(name, [own * 0 - 1.0 for own in values]),
        }
        for what, case in sides.items():
            other = await subject.measured(case)
            if other is not None and not other.finite:
                return LossFinding(
                    subject.name,
                    "overflow",
                    "error",
                    f"the loss or its gradient is not finite if {what}, by {_FAR:g} nats: a ratio has no limit",
                    "Clamp the difference before exp(), for example (p - q).clamp(-20, 20); clamping the ratio is too "
                    "late for its gradient. Or use a ready-made term",
                )
    return None


async def off_policy_rule(subject: Subject) -> LossFinding | None:
    """A policy loss reads the logprobs of the sampler, if that is another model than the current one."""
    sampler = subject.influences.get("logprobs")
    if not subject.reads_advantages or sampler is None or sampler.gradient:
        return None
    if subject.ready_made is not None and not subject.given:
        return None  # Reinforce on invented logprobs
    distance = _distance(subject.case, "logprobs")
    if distance < _OFF_POLICY:
        return None
    return LossFinding(
        subject.name,
        "off-policy",
        "warning",
        "the loss ignores the sampler's 'logprobs' of the data"
        + (f", from which the model is {distance:.2g} nats per token away" if subject.given else ""),
        "Use ImportanceSampling, PPO or Corrected for samples of an older model; Reinforce is for those of the current "
        "one",
    )


def _distance(case: Case, name: str) -> float:
    sampler = case.values(name)
    assert sampler is not None, "a term reads it"
    gaps = [np.abs(part.numpy() - own)[own < 0] for part, own in zip(case.logprobs, sampler, strict=True)]
    together = np.concatenate(gaps)
    return float(together.mean()) if together.size else 0.0


def _rows(part: torch.Tensor) -> tuple[int, ...]:
    return (-1, *[1] * (part.ndim - 1))


def _sure(part: torch.Tensor) -> torch.Tensor:
    sure = torch.zeros_like(part)
    if part.ndim > 1:
        sure[:, 1:] = _IMPOSSIBLE_CANDIDATE
    return sure


def _single(case: Case) -> Case:
    """Returns the case in float32, which services answer with."""
    to_single: Callable[[torch.Tensor, int], torch.Tensor] = lambda part, _: part.float()  # noqa: E731
    return case.with_logprobs(to_single)
