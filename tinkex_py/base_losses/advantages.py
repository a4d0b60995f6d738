"""Rewards to advantages, before the data are made."""

import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, cast

from tinkex_py.arguments import as_integer, as_number, check_choice, check_count, shown
from tinkex_py.errors import InvalidData

Normalize = Literal["std", "none", "leave-one-out"]

_NORMALIZATIONS = ("std", "none", "leave-one-out")


def group_advantages(
    rewards: Sequence[float],
    groups: int | Sequence[Hashable],
    *,
    normalize: Normalize = "std",
    eps: float = 1e-6,
    ddof: int = 1,
) -> list[float]:
    """Returns the advantage of each answer over the other answers to its prompt.

    With R the rewards of a group of G answers:

    - "std": `(R - mean R) / (std R + eps)`, as in GRPO
    - "none": `R - mean R`, as in Dr.GRPO
    - "leave-one-out": `(R - mean R) * G / (G - 1)`, the reward minus the mean of the others, as in RLOO

    Answers of a group whose rewards are all equal, or of a group of one, have the advantage 0.

    Source: Z. Shao et al., "DeepSeekMath" (GRPO); Z. Liu et al., "Understanding R1-Zero-Like Training" (Dr.GRPO);
    A. Ahmadian et al., "Back to Basics" (RLOO).

    Args:
        rewards: one finite number per answer.
        groups: the group of each answer, such as the prompt's number; or the size of all groups, whose answers follow
            each other.
        normalize: one of the three above.
        eps: added to the standard deviation, >= 0.
        ddof: 1 divides the squares by `G - 1`, as all libraries do; 0 by G.

    Raises:
        InvalidData: a reward is not finite, or the groups do not fit the rewards.
    """
    check_choice("normalize", normalize, _NORMALIZATIONS)
    smallest = as_number(eps)
    if smallest is None or not (math.isfinite(smallest) and smallest >= 0):
        raise InvalidData(f"eps must be a finite number >= 0, got {shown(eps)}")
    if as_integer(ddof) not in (0, 1):
        raise InvalidData(f"ddof must be 0 or 1, got {shown(ddof)}")
    given = _checked_rewards(rewards)
    advantages = [0.0] * len(given)
    for indices in _members(given, groups):
        own = [given[index] for index in indices]
        if max(own) == min(own):
            continue
        mean = statistics.fmean(own)
        factor = 1.0
        if normalize == "std":
            deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in own) / (len(own) - ddof))
            factor = 1.0 / (deviation + smallest)
        elif normalize == "leave-one-out":
            factor = len(own) / (len(own) - 1)
        for index, reward in zip(indices, own, strict=True):
            advantages[index] = (reward - mean) * factor
    return advantages


def in_varied_groups(rewards: Sequence[float], groups: int | Sequence[Hashable]) -> list[bool]:
    """Returns for each answer whether the rewards of its group differ, so that there is something to learn from.

    DAPO leaves out the others. The share of False is `frac_reward_zero_std` of TRL if all groups have the same size.

    Args:
        rewards: one finite number per answer.
        groups: as for `group_advantages`.

    Raises:
        InvalidData: as for `group_advantages`.
    """
    given = _checked_rewards(rewards)
    varied = [False] * len(given)
    for indices in _members(given, groups):
        own = [given[index] for index in indices]
        for index in indices:
            varied[index] = max(own) > min(own)
    return varied


def overlong_penalty(tokens: int, *, limit: int = 20480, cache: int = 4096) -> float:
    """Returns what DAPO adds to the reward of a long answer, from 0 to -1.

    It is 0 up to `limit - cache` tokens, falls to -1 at `limit`, and stays there.

    Source: Q. Yu et al., "DAPO" (equation 13).

    Args:
        tokens: length of the answer.
        limit: longest answer.
        cache: tokens over which the penalty grows, from 1 to `limit`.

    Raises:
        InvalidData: an argument is out of range.
    """
    check_count("tokens", tokens, least=0)
    check_count("limit", limit, least=1)
    if check_count("cache", cache, least=1) > limit:
        raise InvalidData(f"cache must be at most limit, got {cache} and {limit}")
    return min(0.0, max(-1.0, (limit - cache - tokens) / cache))


def _checked_rewards(rewards: Iterable[object]) -> list[float]:
    if isinstance(rewards, str | bytes) or not hasattr(rewards, "__iter__"):
        raise InvalidData(f"rewards must be a sequence of numbers, got {shown(rewards)}")
    numbers: list[float] = []
    for index, reward in enumerate(rewards):
        number = as_number(reward)
        if number is None or not math.isfinite(number):
            raise InvalidData(f"rewards[{index}] must be a finite number, got {shown(reward)}")
        numbers.append(number)
    return numbers


def _members(rewards: Sequence[float], groups: int | Sequence[Hashable]) -> list[list[int]]:
    """Returns the indices of the answers of each group."""
    if as_integer(groups) is not None:
        size = check_count("groups", groups, least=1)
        if len(rewards) % size:
            raise InvalidData(f"groups={size} must divide the number of rewards, which is {len(rewards)}")
        return [list(range(start, start + size)) for start in range(0, len(rewards), size)]
    if isinstance(groups, str | bytes) or not isinstance(cast("object", groups), Iterable):
        raise InvalidData(f"groups must be the size of all groups or a group per reward, got {shown(groups)}")
    names = list(cast("Sequence[Hashable]", groups))
    if len(names) != len(rewards):
        raise InvalidData(f"groups has {len(names)} entries for {len(rewards)} rewards: pass one per reward")
    members: dict[Hashable, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(name, []).append(index)
    return list(members.values())
