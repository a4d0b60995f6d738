"""The checks: each compares responses that are equal, or have a known sign, if the gradient arrives as computed."""

import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tinkex_py.certify.models import Batch
from tinkex_py.certify.probes import (
    CANDIDATES,
    LENGTHS,
    REFUSED,
    Call,
    ProbeResponse,
    Probes,
    Step,
    apart,
    candidates,
    many_batch,
    pattern,
    small_batch,
    together,
)
from tinkex_py.client.certificates import SYSTEMATIC_NOISE, GradientCheck, State
from tinkex_py.errors import UnsupportedFeature
from tinkex_py.types.tensors import Array

# Entries of a probe's gradient, and the eps of its step. The norm in the space of the weights is then far below 1 and
# eps. Some services accept no eps above 1, and no large learning rate.
_SIZES_AND_EPS = ((1e-4, 1e4), (1e-3, 1.0))
_LIMITED_EPS = 1.0
# Entries of the large probe's gradient are up to three times this.
_LARGE = 10.0
_FIRST_RATE = 0.1
_MOST_TRIES = 8
# Largest change of a logprob by a probe, and how far above the noise of a forward pass it must be. The larger ones are
# for logprobs of low precision.
_TARGETS, _ABOVE_NOISE = (0.01, 0.1, 0.3), 100.0
# Above these relative differences of equal steps, and of steps of two sizes, nothing else can be measured.
_MOST_NOISE, _LEAST_PRECISION = 0.02, 0.05
# What curvature may do to one-sided responses, and precision to those of large gradients.
_MOST_CURVED, _MOST_TURNED = 0.2, 0.1
# Some services divide by the sum of the weights if it is above 1.
_SUM_ABOVE_ONE = 3.0
_LEAST_BOUND, _BOUND_OF_NOISE = 1e-3, 5.0
# Rounding of logprobs in float32.
_ROUNDING = 2e-6
FIXED = "not measurable: optimizer settings are fixed"


@dataclass
class Measured:
    """What the checks of one surrogate share.

    Attributes:
        probes: makes the probes.
        batch: the datums of most probes.
        size: the entries of gradients.
        step: the optimizer step; None until the response was found.
        whole: the one-sided response to `gradient`.
        odd: the odd response to it.
        noise: relative difference of equal steps.
        error: noise, rounding and curvature together, relative.
        is_fixed: whether the service ignores settings of the optimizer.
        halves: odd responses to `gradient` on every second datum, and on the others.
        large: size of the odd response to large weights, relative to the expected one.
    """

    probes: Probes
    batch: Batch = field(default_factory=small_batch)
    size: float = _SIZES_AND_EPS[0][0]
    step: Step = field(default_factory=lambda: Step(_FIRST_RATE, _SIZES_AND_EPS[0][1]))
    whole: ProbeResponse | None = None
    odd: ProbeResponse | None = None
    noise: float | None = None
    error: float = 0.0
    is_fixed: bool = False
    halves: tuple[ProbeResponse, ProbeResponse] | None = None
    large: float | None = None

    @property
    def gradient(self) -> Array:
        """The gradient of most probes."""
        return self.size * pattern(sum(LENGTHS))

    @property
    def bound(self) -> float:
        """The largest relative error that passes."""
        return max(_LEAST_BOUND, _BOUND_OF_NOISE * self.error)

    async def response(self, gradient: Array, step: Step | None = None) -> ProbeResponse:
        """Returns the odd response of the batch to a gradient."""
        return await self.probes.odd([Call(self.batch.data, gradient)], self.batch, step or self.step)

    def of_datums(self, *indices: int) -> Array:
        """Returns the gradient on some datums, and 0 on the others."""
        owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
        return np.where(np.isin(owner, indices), self.gradient, 0.0)

    def compared(self, name: str, found: ProbeResponse, expected: ProbeResponse, factor: float = 1.0) -> GradientCheck:
        """Compares responses, or the reported norms where the optimizer is fixed, in which `factor` is expected."""
        if not self.is_fixed:
            return self.judged(name, apart(found.change, expected.change))
        if found.norm is None or not expected.norm:
            return GradientCheck(name=name, state="not measurable", detail=FIXED)
        ratio = found.norm / expected.norm
        check = self.judged(name, abs(ratio / abs(factor) - 1.0))
        return check.model_copy(update={"detail": "in the gradient norm that the service reports"})

    def judged(self, name: str, error: float, detail: str = "") -> GradientCheck:
        """Returns the result of a check with a relative error."""
        state: State = "pass" if error <= self.bound else "fail"
        return GradientCheck(name=name, state=state, error=error, bound=self.bound, detail=detail)


Check = Callable[[Measured], Awaitable[GradientCheck]]


async def response(measured: Measured) -> GradientCheck:
    """Finds a step that moves the logprobs far above their noise and precision, and little enough to be linear."""
    name, models = "response", measured.probes.models
    again = await models.before(Batch("again", measured.batch.data))
    noise = float(np.abs(again - await models.before(measured.batch)).max())
    error = 1.0
    for measured.size, eps in _SIZES_AND_EPS:
        measured.step = Step(_FIRST_RATE, eps)
        try:
            for target in _TARGETS:
                if target < _ABOVE_NOISE * noise:
                    continue
                if not await _step_found(measured, target):
                    detail = "no step of the model changes its logprobs measurably"
                    return GradientCheck(name=name, state="fail", detail=detail)
                error = await _error_of_half(measured)
                if error <= _MOST_TURNED:
                    detail = f"logprobs change by {_known(measured.whole).size:.2g}"
                    return GradientCheck(name=name, state="pass", detail=detail)
        except REFUSED:
            if eps == _LIMITED_EPS:
                raise
        else:
            break
    detail = f"not measurable at this precision: half the step moves the model by {error:.0%} more or less than half"
    if noise * _ABOVE_NOISE > _TARGETS[-1]:
        detail = f"not measurable at this precision: equal forward passes differ by {noise:.2g}"
    return GradientCheck(name=name, state="not measurable", detail=detail)


async def _step_found(measured: Measured, target: float) -> bool:
    call = [Call(measured.batch.data, measured.gradient)]
    for _ in range(_MOST_TRIES):
        found = await measured.probes.one_sided(call, measured.batch, measured.step)
        if target / 3 <= found.size <= 3 * target:
            measured.whole = found
            return True
        wanted = target / max(found.size, 1e-9) if np.isfinite(found.size) else 0.0
        measured.step = measured.step.times(rate=float(np.clip(wanted, 1e-3, 1e3)))
    return False


async def _error_of_half(measured: Measured) -> float:
    call, half = [Call(measured.batch.data, measured.gradient)], measured.step.times(rate=0.5)
    return apart(
        2 * (await measured.probes.one_sided(call, measured.batch, half)).change, _known(measured.whole).change
    )


async def noise(measured: Measured) -> GradientCheck:
    """Repeats a step from the same state: dropout and nondeterminism."""
    whole = _known(measured.whole)
    call = [Call(measured.batch.data, measured.gradient)]
    repeats = await together(*(measured.probes.one_sided(call, measured.batch, measured.step) for _ in range(2)))
    error = max(apart(repeat.change, whole.change) for repeat in repeats)
    measured.noise = measured.error = error
    state: State = "fail" if error > _MOST_NOISE else "note" if error > SYSTEMATIC_NOISE else "pass"
    detail = "" if state == "pass" else "equal steps from equal states differ: dropout or nondeterminism"
    return GradientCheck(name="noise", state=state, error=error, bound=_MOST_NOISE, detail=detail)


async def optimizer(measured: Measured) -> GradientCheck:
    """Measures the optimizer: 10 x learning rate and eps changes nothing, 10 x eps alone gives a tenth.

    Where the service limits eps, a tenth takes the place of 10 x.
    """
    whole, call = _known(measured.whole), [Call(measured.batch.data, measured.gradient)]
    factor = 10.0 if measured.step.eps > _LIMITED_EPS else 0.1
    smaller, larger = sorted([measured.step.eps, factor * measured.step.eps])
    # A step with the learning rate of the smaller eps, and the larger eps, moves the model a tenth as far.
    both, tenth = await together(
        measured.probes.one_sided(call, measured.batch, measured.step.times(eps=factor)),
        measured.probes.one_sided(call, measured.batch, Step(measured.step.rate * smaller / larger, larger)),
    )
    curved = apart(both.change, whole.change)
    error = max(curved, apart(10 * tenth.change, whole.change))
    measured.is_fixed = error > max(_LEAST_PRECISION, measured.bound)
    if not measured.is_fixed:  # a gradient that is not small against eps: 10 or 0.1 times as far from linear
        measured.error = max(measured.error, curved / (0.9 if factor > 1 else 9))
    detail = "optimizer settings are fixed: the service ignores eps, beta1 or beta2" if measured.is_fixed else ""
    state: State = "note" if measured.is_fixed else "pass"
    return GradientCheck(name="optimizer", state=state, error=error, bound=_LEAST_PRECISION, detail=detail)


async def scale_and_sign(measured: Measured) -> GradientCheck:
    """Compares k times the gradient at 1 / k of the step with the gradient, for k = -1, 2 and 0.5."""
    name, whole = "scale and sign", _known(measured.whole)
    call = [Call(measured.batch.data, measured.gradient)]
    back = await measured.probes.one_sided(call, measured.batch, measured.step, sign=-1.0)
    even = apart(back.change, -whole.change)
    if even > _MOST_CURVED:
        detail = "a gradient times -1 does not move the model in the opposite direction"
        return GradientCheck(name=name, state="fail", error=even, bound=_MOST_CURVED, detail=detail)
    odd = ProbeResponse((whole.change - back.change) / 2, whole.norm)
    half = await measured.response(measured.gradient, measured.step.times(rate=0.5))
    measured.odd = odd
    measured.error = max(measured.error, apart(2 * half.change, odd.change))
    if measured.error > _LEAST_PRECISION:
        detail = f"not measurable at this precision: steps of two sizes differ by {measured.error:.2g}"
        return GradientCheck(name=name, state="not measurable", error=measured.error, detail=detail)
    factors = (2.0, 0.5)
    found = await together(
        *(measured.response(k * measured.gradient, measured.step.times(rate=1 / k)) for k in factors)
    )
    checks = [measured.compared(name, one, odd, k) for one, k in zip(found, factors, strict=True)]
    return max(checks, key=lambda check: check.error or 0.0)


async def descending(measured: Measured) -> GradientCheck:
    """Requires that a step against the gradient lowers the loss."""
    change = _known(measured.odd).change
    cosine = float(measured.gradient @ change) / float(np.linalg.norm(measured.gradient) * np.linalg.norm(change))
    state: State = "pass" if cosine < 0 else "fail"
    detail = f"the cosine of the gradient and the change is {cosine:.2g}"
    return GradientCheck(name="descending", state=state, error=max(cosine, 0.0), bound=0.0, detail=detail)


async def weights_are_weights(measured: Measured) -> GradientCheck:
    """Compares weights 2, 3, 4 with 1, 2, 3 and 1, 1, 1, none of which is 0, and large ones with small ones."""
    name = "weights are weights"
    if measured.is_fixed:
        return GradientCheck(name=name, state="not measurable", detail=FIXED)
    ramp = -measured.size * np.resize([1.0, 2.0, 3.0], measured.gradient.size)
    ones = np.full_like(ramp, -measured.size)
    small, flat, higher = await together(*(measured.response(one) for one in (ramp, ones, ramp + ones)))
    check = measured.judged(name, apart(small.change + flat.change, higher.change))
    if check.state == "fail":
        return check
    try:
        share, cosine = await _large_response(measured, ramp, small)
    except REFUSED:
        return await _above_one(measured, ramp, check)
    # A limit of the norm keeps the direction; a limit of single weights does not.
    turned = float(np.sqrt(max(0.0, 2 - 2 * cosine)))
    if turned > max(_MOST_TURNED, measured.bound):
        detail = f"large weights move the model in another direction (cosine {cosine:.3g}): single weights are limited"
        return measured.judged(name, turned, detail)
    measured.large = share
    if abs(share - 1) <= max(_MOST_TURNED, measured.bound):
        return check
    # A limit of the norm leaves the same norm of any other gradient; what depends on the weights does not.
    other = _known(measured.odd)
    second, _ = await _large_response(measured, measured.gradient, other)
    norms = float(np.sqrt(abs((ramp @ small.change) / (measured.gradient @ other.change))))
    if abs(second / (share * norms) - 1) <= _MOST_TURNED:
        return check
    detail = f"of large gradients, {share:.2g} and {second:.2g} arrive: the service divides by something of the weights"
    return GradientCheck(name=name, state="fail", error=abs(share - 1), bound=_MOST_TURNED, detail=detail)


async def _above_one(measured: Measured, ramp: Array, check: GradientCheck) -> GradientCheck:
    """Compares weights whose sum is above 1 with their negatives, which needs no other eps."""
    times = _SUM_ABOVE_ONE / float(np.abs(ramp).sum())
    call, step = [Call(measured.batch.data, times * ramp)], measured.step.times(rate=1 / times)
    plus, minus = await together(
        *(measured.probes.one_sided(call, measured.batch, step, sign=sign) for sign in (1.0, -1.0))
    )
    error = apart(plus.change, -minus.change)
    if error > _MOST_CURVED:
        detail = "weights whose sum is above 1 are scaled: the service divides by it"
        return GradientCheck(name=check.name, state="fail", error=error, bound=_MOST_CURVED, detail=detail)
    detail = f"weights above {float(np.abs(times * ramp).max()):.1g} were not measured: the service refused the eps"
    return check.model_copy(update={"detail": detail})


async def _large_response(measured: Measured, gradient: Array, small: ProbeResponse) -> tuple[float, float]:
    """Returns the response to a large gradient as a share of the expected one, and its cosine with that."""
    times = _LARGE / measured.size
    step, share = measured.step.times(rate=1 / times, eps=times), 1.0
    change = small.change
    for _ in range(3):
        change = (await measured.response(times * gradient, step)).change
        found = float(np.linalg.norm(change) / np.linalg.norm(small.change))
        if found > 0.3:
            share *= found
            break
        raised = min(1 / max(found, 1e-4), 1e4)
        step, share = step.times(rate=raised), share / raised
    norm = float(np.linalg.norm(change) * np.linalg.norm(small.change))
    return share, float(change @ small.change) / norm if norm else 0.0


async def clipping(measured: Measured) -> GradientCheck:
    """Reports a limit of the gradient's norm, which the optimizer of the service applies."""
    if measured.large is None:
        return GradientCheck(name="clipping", state="not measurable", detail="large weights were not measured")
    share = measured.large
    if abs(share - 1) <= max(_MOST_TURNED, measured.bound):
        return GradientCheck(
            name="clipping", state="pass", error=abs(share - 1), bound=max(_MOST_TURNED, measured.bound)
        )
    detail = f"the service clips the norm of gradients: of a large one, {share:.2g} arrive"
    return GradientCheck(name="clipping", state="note", error=abs(share - 1), detail=detail)


async def additive(measured: Measured) -> GradientCheck:
    """Compares the sum of responses to parts with the whole: parts of every datum, and datums of unequal lengths."""
    name = "additive"
    if measured.is_fixed:
        return GradientCheck(name=name, state="not measurable", detail=FIXED)
    is_even = np.arange(measured.gradient.size) % 2 == 0
    parts = [np.where(is_even, measured.gradient, 0.0), np.where(is_even, 0.0, measured.gradient)]
    parts += [measured.of_datums(0, 2), measured.of_datums(1, 3)]
    even, odd, first, second = await together(*(measured.response(part) for part in parts))
    measured.halves = first, second
    whole = _known(measured.odd).change
    over_tokens, over_datums = apart(even.change + odd.change, whole), apart(first.change + second.change, whole)
    detail = f"over tokens {over_tokens:.1e}, over datums {over_datums:.1e}"
    return measured.judged(name, max(over_tokens, over_datums), detail)


async def every_position_counts(measured: Measured) -> GradientCheck:
    """Requires that a step against one logprob lowers it: the first, the last and a random one of every datum."""
    random = np.random.default_rng(0)
    places: set[int] = set()
    for stop, length in zip(itertools.accumulate(LENGTHS), LENGTHS, strict=True):
        places |= {stop - length, stop - 1, stop - 1 - int(random.integers(length))}
    chosen = sorted(places)
    units = 3 * measured.size * np.eye(measured.gradient.size)
    calls = [[Call(measured.batch.data, units[position])] for position in chosen]
    found = await together(*(measured.probes.one_sided(call, measured.batch, measured.step) for call in calls))
    own = {position: float(one.change[position]) for position, one in zip(chosen, found, strict=True)}
    ignored = [position for position, change in own.items() if change >= -_BOUND_OF_NOISE * _ROUNDING]
    state: State = "fail" if ignored else "pass"
    named = ", ".join(_place(position) for position in ignored)
    detail = f"not lowered: {named}" if ignored else f"{len(chosen)} positions"
    return GradientCheck(name="every position counts", state=state, error=float(len(ignored)), bound=0.0, detail=detail)


def _place(position: int) -> str:
    stops = np.cumsum(LENGTHS)
    datum = int(np.searchsorted(stops, position, side="right"))
    return f"token {position - int(stops[datum]) + LENGTHS[datum]} of datum {datum} ({LENGTHS[datum]} tokens)"


async def symmetric(measured: Measured) -> GradientCheck:
    """Compares `<g1, R(g2)>` with `<g2, R(g1)>` for g1 and g2 on datums of unequal lengths."""
    name = "symmetric"
    if measured.halves is None:
        return GradientCheck(name=name, state="not measurable", detail=FIXED)
    gradients = measured.of_datums(0, 2), measured.of_datums(1, 3)
    products = np.array([[g @ one.change for one in measured.halves] for g in gradients])
    scale = float(np.sqrt(abs(products[0, 0] * products[1, 1])))
    if abs(products).min() < 4 * measured.bound * scale:
        detail = "the datums share too little for this comparison"
        return GradientCheck(name=name, state="not measurable", detail=detail)
    return measured.judged(name, abs(products[0, 1] - products[1, 0]) / scale)


async def alone_and_together(measured: Measured) -> GradientCheck:
    """Compares the response to a datum sent alone with its share in a larger call."""
    own = measured.gradient[: LENGTHS[0]]
    alone, together_ = await together(
        measured.probes.odd([Call(measured.batch.data[:1], own)], measured.batch, measured.step),
        measured.response(measured.of_datums(0)),
    )
    return measured.compared("alone and together", alone, together_)


async def accumulation(measured: Measured) -> GradientCheck:
    """Compares 16 datums in one call with 4 and 12, which are the requests of a call that is cut into chunks."""
    batch, first = many_batch(), 4
    tokens = [datum.model_input.length for datum in batch.data]
    gradient, cut = measured.size * pattern(sum(tokens)), sum(tokens[:first])
    calls = [Call(batch.data[:first], gradient[:cut]), Call(batch.data[first:], gradient[cut:])]
    step = measured.step.times(rate=len(LENGTHS) / len(tokens))  # as many more datums
    whole, parts = await together(
        measured.probes.odd([Call(batch.data, gradient)], batch, step), measured.probes.odd(calls, batch, step)
    )
    return measured.compared("accumulation", parts, whole)


async def targets_with_candidates(measured: Measured) -> GradientCheck:
    """Compares a datum with targets `[T, K]`, dense and sparse, with one datum per column."""
    name = "[T, K]"
    forms, columns = candidates()
    gradient = measured.size * pattern(CANDIDATES * LENGTHS[-1])
    by_column = gradient.reshape(-1, CANDIDATES).T.reshape(-1)
    separate = await measured.probes.odd([Call(columns.data, by_column)], columns, measured.step)
    checks: dict[str, GradientCheck] = {}
    for form, datum in forms.items():
        try:
            matrix = await measured.probes.odd([Call([datum], gradient)], columns, measured.step)
        except (*REFUSED, UnsupportedFeature):
            continue
        checks[form] = measured.compared(name, matrix, separate)
    if not checks:
        return GradientCheck(name=name, state="not measurable", detail="targets of [T, K] are not supported")
    detail = ", ".join(
        f"{form} {checks[form].error or 0.0:.1e}" if form in checks else f"{form} not supported" for form in forms
    )
    worst = max(checks.values(), key=lambda check: check.error or 0.0)
    return worst.model_copy(update={"detail": detail})


CHECKS: Sequence[Check] = (
    response,
    noise,
    optimizer,
    scale_and_sign,
    descending,
    weights_are_weights,
    clipping,
    additive,
    every_position_counts,
    symmetric,
    alone_and_together,
    accumulation,
    targets_with_candidates,
)
"""In an order in which each fault is found by the check that names it best."""

# Without a result of these, the others cannot be measured.
_FOUNDATIONS = (response, noise, optimizer, scale_and_sign)


async def checked(measured: Measured) -> list[GradientCheck]:
    """Runs the checks up to the first that fails."""
    done: list[GradientCheck] = []
    for check in CHECKS:
        done.append(await check(measured))
        state = done[-1].state
        if state == "fail" or (state == "not measurable" and check in _FOUNDATIONS and not measured.is_fixed):
            break
    return done


def _known(response: ProbeResponse | None) -> ProbeResponse:
    assert response is not None, "the check before it measures this"
    return response
