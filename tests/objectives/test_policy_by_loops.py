"""Policy losses and corrections on random batches, against their formulas written out datum by datum in plain Python.

The sheet's batch has two datums of two tokens and no mask; here datums have different lengths, some tokens are left out
and others have other weights.
"""

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch

from tests.objectives.entries import batch, evaluated
from tinkex_py.base_losses import (
    CISPO,
    DRO,
    GMPO,
    GSPO,
    PPO,
    SAPO,
    TOPR,
    VESPO,
    Corrected,
    ImportanceSampling,
    MaskedIS,
    OffPolicyMask,
    ProbabilityMask,
    Reinforce,
    Rejection,
    TruncatedIS,
)
from tinkex_py.terms.ready_made import ReadyMadeTerm

Token = tuple[float, float, float]  # logprob, the sampler's, advantage
Slopes = list[tuple[float, float]]  # loss of each token, and its slope in the own logprob
LOW, HIGH = 0.8, 1.2
CLIP = {"clip_low_threshold": LOW, "clip_high_threshold": HIGH}


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def ppo(ratio: float, a: float, cap: float = math.inf) -> tuple[float, float]:
    stopped = (a > 0 and ratio > HIGH) or (a < 0 and ratio < LOW) or (a < 0 and ratio > cap)
    loss = -min(ratio * a, clip(ratio, LOW, HIGH) * a)
    return (min(loss, -cap * a) if a < 0 and cap < math.inf else loss), 0.0 if stopped else -ratio * a


def each(of_token: Callable[[float, float, float], tuple[float, float]]) -> Callable[[Sequence[Token]], Slopes]:
    return lambda tokens: [of_token(*token) for token in tokens]


def mean_difference(tokens: Sequence[Token]) -> float:
    return sum(x - q for x, q, _ in tokens) / len(tokens)


def product(tokens: Sequence[Token]) -> float:
    return math.exp(sum(x - q for x, q, _ in tokens))


def cispo(x: float, q: float, a: float) -> tuple[float, float]:
    limited = clip(math.exp(x - q), LOW, HIGH)
    return -limited * a * x, -limited * a


def sapo(x: float, q: float, a: float) -> tuple[float, float]:
    ratio, tau = math.exp(x - q), 1.0 if a > 0 else 1.05
    s = 1 / (1 + math.exp(-tau * (ratio - 1)))
    return -4 / tau * s * a, -4 * s * (1 - s) * ratio * a


def gspo(tokens: Sequence[Token]) -> Slopes:
    return [ppo(math.exp(mean_difference(tokens)), a) for _, _, a in tokens]


def gmpo(tokens: Sequence[Token]) -> Slopes:
    """Every token has the loss of the answer; its slope is that of the answer's mean, times the number of tokens."""
    a = tokens[0][2]
    free = [x - q for x, q, _ in tokens]
    limited = [min(d, 0.4) if a > 0 else max(d, -0.4) for d in free]
    g = math.exp(sum(limited) / len(limited))
    return [(-a * g, -a * g if d == own else 0.0) for d, own in zip(free, limited, strict=True)]


def vespo(tokens: Sequence[Token]) -> Slopes:
    w = product(tokens)
    rows = []
    for x, _, a in tokens:
        k, lam = (2, 3) if a >= 0 else (3, 2)
        phi = w**k * math.exp(lam * (1 - w))
        rows.append((-phi * a * x, -phi * a))
    return rows


def topr(tokens: Sequence[Token]) -> Slopes:
    factors = [1.0 if a > 0 else min(product(tokens), 1.0) for _, _, a in tokens]
    return [(-f * a * x, -f * a) for f, (x, _, a) in zip(factors, tokens, strict=True)]


def corrected(factors: Callable[[Sequence[Token]], Sequence[float]]) -> Callable[[Sequence[Token]], Slopes]:
    return lambda tokens: [(-f * a * x, -f * a) for f, (x, _, a) in zip(factors(tokens), tokens, strict=True)]


def ratios(tokens: Sequence[Token]) -> list[float]:
    return [math.exp(x - q) for x, q, _ in tokens]


def moved(tokens: Sequence[Token]) -> list[float]:
    changes = [(math.exp(x) - math.exp(q), a) for x, q, a in tokens]
    return [float(not ((a > 0 and d > 0.1) or (a < 0 and d < -0.1))) for d, a in changes]


def around(*corrections: Any) -> Corrected:
    return Corrected(policy=Reinforce(), corrections=corrections)


CASES: list[tuple[ReadyMadeTerm, Callable[[Sequence[Token]], Slopes]]] = [
    (Reinforce(), each(lambda x, q, a: (-a * x, -a))),
    (ImportanceSampling(), each(lambda x, q, a: (-math.exp(x - q) * a, -math.exp(x - q) * a))),
    (PPO(), each(lambda x, q, a: ppo(math.exp(x - q), a))),
    (PPO(dual_clip=1.5), each(lambda x, q, a: ppo(math.exp(x - q), a, 1.5))),
    (
        CISPO(**CLIP),
        each(lambda x, q, a: (-clip(math.exp(x - q), LOW, HIGH) * a * x, -clip(math.exp(x - q), LOW, HIGH) * a)),
    ),
    (SAPO(), each(sapo)),
    (DRO(beta=0.3), each(lambda x, q, a: (0.15 * (x - q) ** 2 - x * a, 0.3 * (x - q) - a))),
    (GSPO(**CLIP), gspo),
    (GMPO(), gmpo),
    (VESPO(), vespo),
    (TOPR(), topr),
    (around(TruncatedIS(cap=1.5, floor=0.5)), corrected(lambda t: [clip(x, 0.5, 1.5) for x in ratios(t)])),
    (around(TruncatedIS(cap=1.5, level="sequence")), corrected(lambda t: [min(product(t), 1.5)] * len(t))),
    (around(MaskedIS(low=0.7, high=1.3)), corrected(lambda t: [x if 0.7 <= x <= 1.3 else 0.0 for x in ratios(t)])),
    (
        around(Rejection(statistic="geometric", low=0.9, high=1.1)),
        corrected(lambda t: [float(0.9 <= math.exp(mean_difference(t)) <= 1.1)] * len(t)),
    ),
    (
        around(Rejection(statistic="k3-max", high=0.05)),
        corrected(lambda t: [float(max(x - 1 - math.log(x) for x in ratios(t)) <= 0.05)] * len(t)),
    ),
    (
        around(OffPolicyMask(limit=0.1)),
        corrected(lambda t: [float(not (t[0][2] < 0 and -mean_difference(t) > 0.1))] * len(t)),
    ),
    (around(ProbabilityMask(low=0.1, high=0.1)), corrected(moved)),
]


def float32(numbers: Sequence[float]) -> list[float]:
    return torch.tensor(numbers, dtype=torch.float32).double().tolist()


@pytest.mark.parametrize(("term", "by_hand"), CASES, ids=[f"{at}-{term.name}" for at, (term, _) in enumerate(CASES)])
@pytest.mark.parametrize("reduction", ["sum", "token-mean", "seq-mean-token-mean"])
def test_random_batches(term: ReadyMadeTerm, by_hand: Callable[[Sequence[Token]], Slopes], reduction: str) -> None:
    random = Random(7)
    for _ in range(20):
        answers = [random_answer(random) for _ in range(random.randint(1, 4))]
        term = term.with_options({"mask": "own", "reduction": reduction})
        given = batch(
            [[x for (x, _, _), _ in answer] for answer in answers],
            logprobs=[[q for (_, q, _), _ in answer] for answer in answers],
            advantages=[[a for (_, _, a), _ in answer] for answer in answers],
            own=[[weight for _, weight in answer] for answer in answers],
        )
        value, gradient, _ = evaluated(term, given)
        expected, slopes = reduced(answers, by_hand, reduction, of_answers=isinstance(term, GMPO))
        assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)


def random_answer(random: Random) -> list[tuple[Token, float]]:
    """Tokens and their weights; the fields are float32, the logprobs of the model are not."""
    (advantage,) = float32([random.uniform(-2, 2)])
    tokens = []
    for _ in range(random.randint(1, 5)):
        (q,) = float32([random.uniform(-4, -0.25)])
        token = (min(q + random.uniform(-1, 1), -0.01), q, advantage)
        tokens.append((token, random.choice([0.0, 0.5, 1.0, 2.0])))
    return tokens


def reduced(
    answers: Sequence[Sequence[tuple[Token, float]]],
    by_hand: Callable[[Sequence[Token]], Slopes],
    reduction: str,
    *,
    of_answers: bool,
) -> tuple[float, list[float]]:
    """Loss and gradient of all positions. `of_answers`: the weights scale the loss of an answer, not of a token."""
    counted = [[(token, weight) for token, weight in answer if weight] for answer in answers]
    sizes = [sum(weight for _, weight in answer) for answer in counted]
    total = {"sum": 1.0, "token-mean": sum(sizes), "seq-mean-token-mean": sum(map(bool, counted))}[reduction] or 1.0
    loss, slopes = 0.0, []
    for answer, kept, size in zip(answers, counted, sizes, strict=True):
        scale = 1 / (total * (size if reduction == "seq-mean-token-mean" and size else 1.0))
        own = iter(by_hand([token for token, _ in kept]) if kept else [])
        for _, weight in answer:
            if not weight:
                slopes.append(0.0)
                continue
            value, slope = next(own)
            loss += scale * weight * value
            slopes.append(scale * (size / len(kept) if of_answers else weight) * slope)
    return loss, slopes
