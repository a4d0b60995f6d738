"""Rules about the batch: what changes if it is cut into calls, grows, or has long answers?"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from tinkex_py.lint.findings import LossFinding
from tinkex_py.lint.subject import Evaluated, Subject
from tinkex_py.losses.gradients import norm

_EQUAL = 1e-3
_HALF = (0.4, 0.55)  # the repeated answer may begin with tokens that do not count


async def accumulation_rule(subject: Subject) -> LossFinding | None:
    """The gradients of the calls of an optimizer step add up to that of one call."""
    if subject.shards > 1:
        return await _shard_finding(subject)
    calls = subject.accumulate or 2
    if calls == 1 or not subject.at.norm:
        return None
    severity = "warning" if subject.accumulate is None else "error"
    coupling = subject.coupling
    if coupling is not None:
        if subject.accumulate is None:
            return None
        return LossFinding(
            subject.name,
            "accumulation",
            severity,
            f"the step is sent in {calls} calls, but the term couples the datums of a call: {coupling}",
            "Use accumulate=1 with larger batches, or a term without coupling",
        )
    shares = await _shares(subject, calls)
    if shares is None or _add_up(shares):
        return None
    cut = f"if the datums are sent in {len(shares)} calls before one optimizer step"
    if None in shares:
        return LossFinding(
            subject.name,
            "accumulation",
            severity,
            f"the gradient of a datum depends on the other datums of its call, so that it changes {cut}",
            "Compute what belongs to the whole batch, such as a baseline, before the data are made. If the datums "
            "belong together on purpose, give the term the attribute coupling = 'why', and use accumulate=1",
        )
    factors = ", ".join(f"{share:.3g}" for share in shares)
    return LossFinding(
        subject.name,
        "accumulation",
        severity,
        f"the loss is a mean over its call: {cut}, their gradients add up to a sum of means, {factors} times those of "
        "one mean",
        "Divide by a number that is known for the whole step, such as total= of the ready-made terms, or pass "
        "accumulate=1 if every step is one call",
    )


async def _shard_finding(subject: Subject) -> LossFinding | None:
    """The gradients of the shards of a step add up to that of the whole."""
    shares = await _shares(subject, subject.shards)
    if shares is None or _add_up(shares):
        return None
    return LossFinding(
        subject.name,
        "accumulation",
        "error",
        f"the datums are sharded over {subject.shards} replicas, and the gradients of the shards do not add up to that "
        "of the whole, because the term is no sum over datums",
        "Sum over the datums and divide by a number that is known for the whole step, or leave shard out",
    )


async def scale_rule(subject: Subject, base: Subject) -> LossFinding | None:
    """Under accumulation, a regularizer and the base loss grow alike with the number of datums."""
    if (subject.accumulate or 1) == 1 or subject.is_base:
        return None
    own, of_base = await _growth(subject), await _growth(base)
    if own is None or of_base is None or abs(own - of_base) < 0.1:
        return None
    grows = own > of_base
    first, second = ("sum", "mean") if grows else ("mean", "sum")
    return LossFinding(
        subject.name,
        "scale",
        "warning",
        f"the term is a {first} over the datums and the base loss a {second}: with twice the datums in a step, the "
        f"term weighs {'twice' if grows else 'half'} as much against it",
        "Give both the same reduction, such as reduction='token-mean'",
    )


async def length_rule(subject: Subject) -> LossFinding | None:
    """A token counts the same in a long and in a short answer."""
    # A term that has a reduction says itself how it weighs answers.
    if subject.ready_made is not None or hasattr(subject.term, "reduction") or subject.preference is not None:
        return None
    active = [index for index, part in enumerate(subject.at.gradient) if norm(part) > 0]
    if len(active) < 2:
        return None
    pair = subject.case.picked(active[:2])
    before, after = await subject.measured(pair), await subject.measured(pair.with_longer(1))
    if before is None or after is None or not (before.finite and after.finite):
        return None
    length = len(pair.logprobs[1])
    short = _share(after.gradient[0], before.gradient[0])
    long = _share(after.gradient[1][:length], before.gradient[1])
    # Another gradient of the short answer means that the two are coupled.
    if short is None or long is None or abs(short - 1.0) > _EQUAL or not _HALF[0] < long < _HALF[1]:
        return None
    return LossFinding(
        subject.name,
        "length",
        "warning",
        "a token of an answer that is twice as long has half the gradient: the loss is a mean over each answer, which "
        "favors short good answers and long bad ones",
        "Sum over tokens, or divide by all tokens of the batch: reduction='token-mean'. If it is intended, give the "
        "term the attribute reduction = 'seq-mean-token-mean'",
    )


def _add_up(shares: Sequence[float | None]) -> bool:
    """Returns whether the gradients of the parts are those of the whole."""
    return all(share is not None and abs(share - 1.0) < _EQUAL for share in shares)


async def _shares(subject: Subject, calls: int) -> list[float | None] | None:
    """Returns each call's gradient as a share of that of the whole; None where it is no multiple."""
    term, count = subject.ready_made, len(subject.case.data)
    alone = subject.alone
    if term is not None and getattr(term, "total", None) is None and (total := term.total_of(subject.case.data)):
        alone = alone.with_option("total", total)
    whole = await subject.measured(subject.case, alone=alone)
    pairs = count // 2
    calls = min(calls, pairs if pairs > 1 else count)
    if whole is None or calls < 2 or (pairs < 2 and subject.preference is not None):
        return None
    # Cut between pairs, whose answers belong together.
    unit = 2 if pairs > 1 else 1
    ends = [round(call * (count / unit) / calls) * unit for call in range(calls)] + [count]
    shares: list[float | None] = []
    for start, end in itertools.pairwise(ends):
        part = await subject.measured(subject.case.picked(range(start, end)), alone=alone)
        if part is None or not part.finite:
            return None
        of_whole = Evaluated(0.0, whole.gradient[start:end], differentiable=True)
        if part.norm == 0 and of_whole.norm == 0:
            continue
        shares.append(_share(part.flat, of_whole.flat))
    return shares or None


async def _growth(subject: Subject) -> float | None:
    """Returns the gradient of a datum in a batch that is there twice, as a share of that in the batch."""
    twice = subject.case.picked([*range(len(subject.case.data))] * 2)
    found = await subject.measured(twice)
    if found is None or not found.finite or not subject.at.norm:
        return None
    return _share(replace(found, gradient=found.gradient[: len(subject.case.data)]).flat, subject.at.flat)


def _share(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    """Returns the number by which one gradient is a multiple of the other; None if it is no multiple."""
    part, whole = part.reshape(-1), whole.reshape(-1)
    square = float(whole @ whole)
    share = float(part @ whole) / square if square else 0.0
    residual = norm(part - share * whole)
    return share if residual <= _EQUAL * max(norm(part), 1e-30) and share > 0 else None
