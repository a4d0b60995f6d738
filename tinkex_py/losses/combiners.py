"""How much of each term's gradient the total has, from the products of all pairs of gradients.

The n x n matrix of products (Gram matrix) contains everything that these methods need, and n, the number of terms, is
small: they are solved exactly, by trying every subset of the terms.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, cast

import numpy as np

from tinkex_py.errors import PipelineError

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
Balancing = Literal["upgrad", "mgda", "cagrad", "nash_mtl", "aligned_mtl"]

MOST_TERMS = 8
_CAGRAD_RADIUS = 0.5
# Relative to the largest number of a matrix whose diagonal is at most 1.
_ROUNDING = 1e-10
_SMALLEST_STEP = 1e-12


def check_terms(method: str, count: int) -> None:
    """Raises PipelineError if a method has more terms than it can try all subsets of."""
    if count > MOST_TERMS:
        raise PipelineError(
            f"combine={method!r} is solved exactly for at most {MOST_TERMS} terms, the base loss included, got "
            f"{count}: use combine='pcgrad' or 'sum', or fewer regularizers"
        )


def balancing_factors(method: Balancing, products: Matrix, scales: Vector) -> Vector:
    """Returns the factor of each weighted gradient in the total, so that the total is `sum(factor * scale * gradient)`.

    Terms without a gradient or with the scale 0 stay out: their factor is 1. So that learning rates carry over, the
    total of gradients that do not conflict has about the size of their sum.

    Args:
        method: the method.
        products: dot products of all pairs of unweighted gradients, `[n, n]`.
        scales: the weight of each gradient, `[n]`, >= 0.

    Raises:
        PipelineError: there are too many terms.
    """
    check_terms(method, len(scales))
    factors = np.ones_like(scales)
    active = np.flatnonzero((np.diag(products) > 0) & (scales > 0))
    if len(active) > 1:
        kept = products[np.ix_(active, active)]
        factors[active] = _METHODS[method](kept, scales[active])
    return factors


def upgrad(gram: Matrix, shares: Vector) -> Vector:
    """Returns coefficients: each gradient, projected to where it opposes none, times its share; summed.

    Source: P. Quinton and V. Rey, "Jacobian Descent for Multi-Objective Optimization".
    """
    total = np.zeros_like(shares)
    for index, share in enumerate(shares):
        least = np.zeros_like(shares)
        least[index] = share
        total += _smallest_above(gram, least)
    return total


def mgda(gram: Matrix) -> Vector:
    """Returns the coefficients of the shortest convex combination, >= 0 and with sum 1.

    Source: O. Sener and V. Koltun, "Multi-Task Learning as Multi-Objective Optimization".
    """
    candidates: list[Vector] = []
    for support in _supports(len(gram)):
        ones = np.ones(len(support))
        system = np.block([[gram[np.ix_(support, support)], ones[:, None]], [ones[None], np.zeros((1, 1))]])
        found = _spread(_solved(system, np.append(0.0 * ones, 1.0))[:-1], support, len(gram))
        if (found >= -_ROUNDING).all() and abs(found.sum() - 1.0) < _ROUNDING**0.5:
            candidates.append(found.clip(min=0.0))
            if (gram @ found >= found @ gram @ found - _ROUNDING * gram.max()).all():
                return candidates[-1]
    return min(candidates, key=lambda one: float(one @ gram @ one))


def cagrad(gram: Matrix, radius: float) -> Vector:
    """Returns the coefficients of the direction that is best for the worst term, in a ball around the mean gradient.

    Source: B. Liu et al., "Conflict-Averse Gradient Descent for Multi-Task Learning".

    Args:
        gram: products of the gradients.
        radius: of the ball, as a share of the norm of the mean gradient.
    """
    count = len(gram)
    mean = np.full(count, 1.0 / count)
    size = radius * math.sqrt(max(float(mean @ gram @ mean), 0.0))

    def worst(weights: Vector) -> float:
        return float(weights @ gram @ mean) + size * math.sqrt(max(float(weights @ gram @ weights), 0.0))

    best = min([mgda(gram), *_on_the_ball(gram, mean, size)], key=worst)
    length = math.sqrt(max(float(best @ gram @ best), 0.0))
    if length <= _ROUNDING * math.sqrt(float(np.diag(gram).max())):
        return mean  # no direction is better for all terms
    return mean + size / length * best


def nash(gram: Matrix, powers: Vector) -> Vector:
    """Returns the coefficients c > 0 with `c * (G c) = powers`: bargaining, which no scale of a gradient changes.

    Minimizes `c'Gc / 2 - sum(powers * log c)` by Newton's method.

    Source: A. Navon et al., "Multi-Task Learning as a Bargaining Game".
    """

    def objective(point: Vector) -> float:
        return float(0.5 * point @ gram @ point - powers @ np.log(point))

    point: Vector = np.sqrt(powers / np.diag(gram))
    for _ in range(200):
        slope = gram @ point - powers / point
        if np.abs(slope * point).max() < _ROUNDING * powers.max():
            break
        step = np.linalg.solve(gram + np.diag(powers / point**2), slope)
        length, before, gain = 1.0, objective(point), float(slope @ step)
        while length > _SMALLEST_STEP:
            moved: Vector = point - length * step
            if (moved > 0).all() and objective(moved) <= before - 0.25 * length * gain:
                break
            length /= 2
        point = point - length * step
    return point


def aligned(gram: Matrix) -> Vector:
    """Returns coefficients that give all principal components of the gradients the size of the smallest one.

    They can be negative.

    Source: D. Senushkin et al., "Independent Component Alignment for Multi-Task Learning".
    """
    values, vectors = np.linalg.eigh(gram)
    kept = values > _ROUNDING * values.max()
    values, vectors = values[kept], vectors[:, kept]
    scaled = (vectors / np.sqrt(values)) @ vectors.T
    return cast("Vector", math.sqrt(values.min()) * scaled @ np.ones(len(gram)))


def _upgrad(products: Matrix, scales: Vector) -> Vector:
    return upgrad(_weighted(products, scales), np.ones_like(scales))


def _cagrad(products: Matrix, scales: Vector) -> Vector:
    return len(scales) * cagrad(_weighted(products, scales), _CAGRAD_RADIUS)


def _mgda(products: Matrix, scales: Vector) -> Vector:
    """The method on gradients of length 1, whose total has the sum of the weighted lengths as its unit."""
    lengths = scales * np.sqrt(np.diag(products))
    return lengths.sum() * mgda(_cosines(products)) / lengths


def _nash_mtl(products: Matrix, scales: Vector) -> Vector:
    """The method on unweighted gradients with the scales as powers, at the length of the plain sum."""
    cosines = _cosines(products)
    shortest = mgda(cosines)
    if shortest @ cosines @ shortest < _ROUNDING:  # no direction is better for all terms
        return np.zeros_like(scales)
    point = nash(cosines, scales / scales.sum())
    lengths = scales * np.sqrt(np.diag(products))
    plain = math.sqrt(max(float(lengths @ cosines @ lengths), 0.0))
    return plain * point / lengths / math.sqrt(float(point @ cosines @ point))


def _aligned_mtl(products: Matrix, scales: Vector) -> Vector:
    """The method with negative coefficients at 0: they would raise the loss of their term."""
    return aligned(_weighted(products, scales)).clip(min=0.0)


_METHODS: Mapping[Balancing, Callable[[Matrix, Vector], Vector]] = {
    "upgrad": _upgrad,
    "mgda": _mgda,
    "cagrad": _cagrad,
    "nash_mtl": _nash_mtl,
    "aligned_mtl": _aligned_mtl,
}


def _weighted(products: Matrix, scales: Vector) -> Matrix:
    """Returns the products of the weighted gradients, of which the longest has length 1."""
    weighted = products * np.outer(scales, scales)
    return cast("Matrix", weighted / np.diag(weighted).max())


def _cosines(products: Matrix) -> Matrix:
    lengths = np.sqrt(np.diag(products))
    return cast("Matrix", products / np.outer(lengths, lengths))


def _supports(count: int) -> Iterator[list[int]]:
    for size in range(1, count + 1):
        yield from map(list, itertools.combinations(range(count), size))


def _spread(part: Vector, support: list[int], count: int) -> Vector:
    spread = np.zeros(count)
    spread[support] = part
    return spread


def _solved(matrix: Matrix, right: Vector) -> Vector:
    """Returns a solution, the shortest one if there are many; the nearest one if there is none."""
    return cast("Vector", np.linalg.lstsq(matrix, right, rcond=None)[0])


def _smallest_above(gram: Matrix, least: Vector) -> Vector:
    """Returns the v >= least with the smallest `v'Gv`, which no gradient opposes."""
    candidates: list[Vector] = []
    for free in itertools.chain([[]], _supports(len(gram))):
        held = [index for index in range(len(gram)) if index not in free]
        moved = least.copy()
        moved[free] = _solved(gram[np.ix_(free, free)], -gram[np.ix_(free, held)] @ least[held])
        if (moved >= least - _ROUNDING).all():
            candidates.append(np.maximum(moved, least))
            if (gram @ candidates[-1] >= -_ROUNDING).all():
                return candidates[-1]
    return min(candidates, key=lambda one: float(one @ gram @ one))


def _on_the_ball(gram: Matrix, mean: Vector, size: float) -> Iterator[Vector]:
    """Yields, for each set of terms, the weights for which all of its terms gain the same."""
    if not size:
        return
    for support in _supports(len(gram)):
        inner = gram[np.ix_(support, support)]
        # v = weights / length has size * G v = gain - G mean, and v'Gv = 1.
        constant = _solved(inner, -(gram @ mean)[support] / size)
        slope = _solved(inner, np.full(len(support), 1.0 / size))
        second, first = float(slope @ inner @ slope), 2 * float(slope @ inner @ constant)
        for gain in _roots(second, first, float(constant @ inner @ constant) - 1.0):
            weights = constant + gain * slope
            if (weights >= -_ROUNDING).all() and weights.sum() > 0:
                weights = weights.clip(min=0.0)
                yield _spread(weights / weights.sum(), support, len(gram))


def _roots(second: float, first: float, zeroth: float) -> Iterator[float]:
    inside = first * first - 4 * second * zeroth
    if second > 0 and inside >= 0:
        yield (-first - math.sqrt(inside)) / (2 * second)
        yield (-first + math.sqrt(inside)) / (2 * second)
