"""Rules about the gradient that is sent: is it the derivative of the loss, and does it lead where it should?"""

import numpy as np
import torch

from tinkex_py.lint.findings import LossFinding
from tinkex_py.lint.subject import Subject

_DIRECTIONS = 4
_DISTANCES = (3.0, 30.0, 300.0)  # nats along a step, to see whether a loss falls without bound


async def random_rule(subject: Subject) -> LossFinding | None:
    """The same call has the same result."""
    again = await subject.measured(subject.case)
    if again is None or again.equals(subject.at):
        return None
    return LossFinding(
        subject.name,
        "random",
        "warning",
        f"two calls with the same logprobs gave {subject.at.value:.6g} and {again.value:.6g}, so that no step can be "
        "replayed, and the other rules cannot compare calls",
        "Seed the draw, or read it from a field of the datums",
    )


async def detached_rule(subject: Subject) -> LossFinding | None:
    """A loss that depends on the logprobs has a gradient."""
    if subject.at.norm > 0:
        return None
    moved = subject.case.with_logprobs(lambda part, index: 1.1 * part - 0.01 * (1 + index))
    other = await subject.measured(moved)
    depends = other is not None and other.finite and not other.same_value(subject.at)
    if not depends and (subject.at.differentiable or not subject.is_base):
        return None
    return LossFinding(
        subject.name,
        "detached",
        "error",
        "the loss has no gradient, although other logprobs change it" if depends else "the loss has no gradient",
        "detach(), numpy(), item(), torch.no_grad() and torch.tensor(x) cut a loss off from the logprobs: remove them",
    )


async def gradient_rule(subject: Subject) -> LossFinding | None:
    """Finite differences agree with the gradient, and do not have the opposite sign."""
    if subject.surrogate is not None or not subject.at.norm:
        return None
    slopes = await _slopes(subject, [-part / subject.at.norm for part in subject.at.gradient])
    if slopes is None:
        return None
    # A surrogate may raise its own value, but not by exactly as much as a step against the derivative does.
    if all(abs(slope / subject.at.norm - 1.0) < 1e-2 for slope in slopes):
        return LossFinding(
            subject.name,
            "sign",
            "error",
            "a step along the gradient raises this loss: the gradient is minus the derivative",
            "Check the sign in backward() of an autograd function, or of a value whose gradient is replaced",
        )
    generator = torch.Generator().manual_seed(0)
    wrong: list[tuple[float, float]] = []
    for _ in range(_DIRECTIONS):
        drawn = [torch.randint(0, 2, part.shape, generator=generator) for part in subject.case.logprobs]
        signs = [2.0 * one.to(part) - 1.0 for one, part in zip(drawn, subject.case.logprobs, strict=True)]
        slopes = await _slopes(subject, signs)
        expected = sum(float((one * two).sum()) for one, two in zip(subject.at.gradient, signs, strict=True))
        if slopes is None:
            continue
        # At a kink, such as that of a clip, the gradient is between the slopes of both sides.
        nearest = min(max(expected, min(slopes)), max(slopes))
        if abs(nearest - expected) > _tolerance(subject) * (subject.at.norm + abs(expected)):
            wrong.append((nearest, expected))
    if len(wrong) < _DIRECTIONS // 2:
        return None
    return LossFinding(
        subject.name,
        "gradient",
        "warning",
        f"the gradient is not the derivative of the loss: in one direction the loss changes by {wrong[0][0]:.4g} per "
        f"nat, and the gradient says {wrong[0][1]:.4g}. A part of the loss is cut off from the logprobs, or a "
        "backward() is wrong",
        "Remove detach() or no_grad() from what shall have a gradient. If the rest is constant on purpose, as the "
        "ratio of CISPO, give the term the attribute surrogate = 'why'",
    )


async def advantages_rule(subject: Subject) -> LossFinding | None:
    """A higher advantage makes a token likelier."""
    advantages = subject.case.values(subject.advantages)
    if not subject.reads_advantages or advantages is None:
        return None
    other = await subject.measured(subject.case.with_values(subject.advantages, [-own for own in advantages]))
    if other is None or not other.finite:
        return None
    pull = 0.0
    for index, own in enumerate(advantages):
        change = (subject.at.gradient[index] - other.gradient[index]).numpy()
        pull += float((change * own.reshape(-1, *[1] * (change.ndim - 1)) if own.size == len(change) else change).sum())
    if pull <= 1e-3 * subject.at.norm:
        return None
    return LossFinding(
        subject.name,
        "sign",
        "error",
        f"a higher value in {subject.advantages!r} makes a token less likely",
        "A pipeline minimizes: put a minus before the loss, -ratio * advantage",
    )


async def pairs_rule(subject: Subject) -> LossFinding | None:
    """The chosen answer of a pair becomes likelier, the rejected one less likely."""
    if subject.preference != -1:
        return None
    return LossFinding(
        subject.name,
        "pairs",
        "error",
        "a step makes the rejected answers likelier and the chosen ones less likely",
        "The chosen answers come first in each pair, data[0::2], or have the positive number in the field with the "
        "labels: check which side the loss takes, and its sign",
    )


async def falling_rule(subject: Subject) -> LossFinding | None:
    """The loss does not fall without bound along its own step."""
    if subject.surrogate is not None or subject.reads_advantages or subject.preference is not None:
        return None
    if not subject.at.norm or await estimator_rule(subject) is not None:
        return None
    step = _step(subject)
    lowers = all(bool((part <= 0).all()) for part in step) and any(bool(part.any()) for part in step)
    reads_reference = any(found.gradient for found in subject.influences.values())
    if not (lowers or reads_reference):
        return None
    values: list[float] = []
    for distance in _DISTANCES:
        case = subject.case.with_logprobs(
            lambda part, index, distance=distance: (part + distance * step[index]).clamp(max=0.0)
        )
        found = await subject.measured(case)
        if found is None:
            return None
        values.append(found.value)
    falls = values[0] < subject.at.value and values[1] < 0 and not values[2] > 5.0 * values[1]
    if not falls:
        return None
    what = "makes the target tokens less likely" if lowers else "moves the model away from the reference"
    return LossFinding(
        subject.name,
        "sign",
        "error",
        f"a step of this term alone {what}, and the loss falls without bound: {subject.at.value:.4g}, then "
        f"{values[0]:.4g}, {values[1]:.4g} and {values[2]:.4g}",
        "A pipeline minimizes: change the sign. For the entropy of sampled tokens, use SampledEntropy",
    )


async def estimator_rule(subject: Subject) -> LossFinding | None:
    """A reference that the loss reads has an influence on the gradient."""
    if subject.preference is not None or not subject.at.norm:
        return None
    blind = [name for name, found in subject.influences.items() if found.value and not found.gradient]
    blind = [name for name in blind if name != subject.advantages]
    if not blind:
        return None
    return LossFinding(
        subject.name,
        "estimator",
        "error",
        f"the loss reads {blind[0]!r}, but its gradient is the same whatever that holds: as the estimator k1, log p - "
        "log q, it has no pull to the reference, because its gradient is 0 on average over samples",
        "Use SampledKL with estimator='k3+' or 'k2'; k1 is for metrics",
    )


def _step(subject: Subject) -> list[torch.Tensor]:
    """Returns the direction of a step, at most 1 nat per position; 0 where the weight is negative."""
    largest = max(float(part.abs().max()) for part in subject.at.gradient if part.numel())
    weights = None if subject.mask is None else subject.case.values(subject.mask)
    steps: list[torch.Tensor] = []
    for index, part in enumerate(subject.at.gradient):
        step = -part / largest
        if weights is not None and weights[index].shape == tuple(part.shape):
            step = step * torch.tensor(weights[index] >= 0)
        steps.append(step)
    return steps


async def _slopes(subject: Subject, direction: list[torch.Tensor]) -> tuple[float, float] | None:
    """Returns the change of the loss per nat in a direction, ahead and behind."""
    width = 1e-2 if _is_coarse(subject) else 1e-4
    ahead = await subject.measured(subject.case.moved(direction, width))
    behind = await subject.measured(subject.case.moved(direction, -width))
    if ahead is None or behind is None or not (ahead.finite and behind.finite):
        return None
    return (ahead.value - subject.at.value) / width, (subject.at.value - behind.value) / width


def _tolerance(subject: Subject) -> float:
    return 5e-2 if _is_coarse(subject) else 1e-3


def _is_coarse(subject: Subject) -> bool:
    """Whether the loss has the digits of float32 only."""
    return float(np.float32(subject.at.value)) == subject.at.value
