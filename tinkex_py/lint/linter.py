"""Checks every term of a pipeline with every rule."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import torch

from tinkex_py.arguments import check_count, check_kind, check_list, shown
from tinkex_py.errors import InvalidSpec, NonFiniteLoss, RegularizerError, did_you_mean
from tinkex_py.lint import batch_rules, edge_rules, gradient_rules
from tinkex_py.lint.cases import Case, case_of
from tinkex_py.lint.findings import LossFinding
from tinkex_py.lint.subject import Alone, Evaluated, Subject, alone_in, influences_of, measure, preference_of, term_of
from tinkex_py.losses.output import BASE_LOSS_NAME
from tinkex_py.losses.pipeline import Pipeline
from tinkex_py.losses.spec import RegularizerSpec
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.types import Datum

Rule = Callable[[Subject], Awaitable[LossFinding | None]]

RULES = (
    "accumulation",
    "detached",
    "estimator",
    "finite",
    "gradient",
    "length",
    "mask",
    "off-policy",
    "overflow",
    "pairs",
    "random",
    "scale",
    "sign",
)
"""Names of the rules."""

_RULES: tuple[Rule, ...] = (
    gradient_rules.gradient_rule,
    gradient_rules.advantages_rule,
    gradient_rules.pairs_rule,
    gradient_rules.estimator_rule,
    gradient_rules.falling_rule,
    edge_rules.mask_rule,
    edge_rules.finite_rule,
    edge_rules.overflow_rule,
    edge_rules.off_policy_rule,
    batch_rules.accumulation_rule,
    batch_rules.length_rule,
)
# Later rules would report the same mistake in other words.
_FIRST: tuple[Rule, ...] = (gradient_rules.random_rule, gradient_rules.detached_rule)


async def lint(
    pipeline: Pipeline,
    data: Sequence[Datum],
    logprobs: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    accumulate: int | None = None,
    ignore: Sequence[str] = (),
) -> list[LossFinding]:
    """Looks for mistakes in the terms of a pipeline, offline: it calls each term some fifty times on changed data.

    Every rule observes what a term computes, so it applies to custom terms too. Terms that are disabled or have the
    weight 0 are not checked.

    Args:
        pipeline: the pipeline.
        data: a few datums of the training data, with all their fields; answers of several lengths, and whole pairs.
        logprobs: of a model on these datums, as for `Pipeline.compute`. None: plausible ones, near the sampler's or the
            reference's.
        accumulate: number of calls that the datums of an optimizer step are sent in. 1: always in one call. None: not
            known; then a custom term that cannot be cut is a warning, and a ready-made one is no finding.
        ignore: names of rules to leave out.

    Returns:
        The findings, in the order of the terms; none is the aim.

    Raises:
        InvalidData: there are no datums, or they have no targets.
        InvalidSpec: `ignore` has an unknown rule.
        PipelineError: the logprobs are invalid.
        RegularizerError: a term fails on the data.
    """
    check_kind("pipeline", pipeline, Pipeline, error=InvalidSpec)
    case = case_of(check_list("data", data, Datum), logprobs)
    if accumulate is not None:
        check_count("accumulate", accumulate, least=1)
    for name in check_list("ignore", ignore, str, error=InvalidSpec):
        if name not in RULES:
            raise InvalidSpec(
                f"ignore: no rule is named {shown(name)}{did_you_mean(name, RULES)}; use {', '.join(RULES)}"
            )
    specs = [spec for spec in pipeline.regularizers if spec.enabled and spec.weight != 0]
    workers = WorkerPool(pipeline.max_threads)
    try:
        findings: list[LossFinding] = []
        base: Subject | None = None
        for spec in (None, *specs):
            subject = await _subject(pipeline, spec, case, workers, accumulate=accumulate, given=logprobs is not None)
            if isinstance(subject, LossFinding):
                findings.append(subject)
                continue
            findings += await _findings(subject)
            if base is None and spec is None:
                base = subject
            elif base is not None and (found := await batch_rules.scale_rule(subject, base)):
                findings.append(found)
    finally:
        workers.close()
    return [finding for finding in findings if finding.rule not in ignore]


async def assert_no_findings(
    pipeline: Pipeline,
    data: Sequence[Datum],
    logprobs: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    accumulate: int | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Fails a test with the findings of `lint`, one a line; the arguments are the same.

    Raises:
        AssertionError: there are findings, warnings included.
    """
    findings = await lint(pipeline, data, logprobs, accumulate=accumulate, ignore=ignore)
    if findings:
        raise AssertionError("\n".join(["the loss linter has findings:", *map(str, findings)]))


async def _subject(
    pipeline: Pipeline,
    spec: RegularizerSpec | None,
    case: Case,
    workers: WorkerPool,
    *,
    accumulate: int | None,
    given: bool,
) -> Subject | LossFinding:
    """Returns a term with what it reads; a finding if its loss is not finite on the data themselves."""
    name = BASE_LOSS_NAME if spec is None else spec.name
    alone = alone_in(pipeline, spec, workers)
    try:
        own, at = await _first_measure(alone, case)
    except NonFiniteLoss as error:
        return LossFinding(name, "finite", "error", str(error), "Leave the position out of the mask, or the datum out")
    subject = Subject(name, term_of(pipeline, spec), alone, own, at, given, accumulate)
    subject = replace(subject, influences=await influences_of(subject))
    return replace(subject, preference=await preference_of(subject))


async def _first_measure(alone: Alone, case: Case) -> tuple[Case, Evaluated]:
    """Evaluates a term in float64, which makes differences exact; in float32 if it does not accept that."""
    try:
        return case, await measure(alone, case)
    except NonFiniteLoss:
        raise
    except RegularizerError:
        single = case.with_logprobs(lambda part, _: part.float())
        return single, await measure(alone, single)


async def _findings(subject: Subject) -> list[LossFinding]:
    for rule in _FIRST:
        found = await rule(subject)
        if found is not None:
            return [found]
    results = [await rule(subject) for rule in _RULES]
    return [found for found in results if found is not None]
