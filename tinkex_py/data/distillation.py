"""What another model says about given tokens, as data: its logprobs, its likeliest tokens, and advantages from them."""

import itertools
from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from tinkex_py.arguments import as_number, check_count, check_list, check_text, shown
from tinkex_py.data.samples import each
from tinkex_py.errors import InvalidData, InvalidResponse
from tinkex_py.types import Datum, ForwardBackwardOutput, ModelInput, SampleResponse, SamplingParams, TensorData
from tinkex_py.types.datum import field_of, target_shape
from tinkex_py.types.tensors import Array

TEACHER_LOGPROBS = "teacher_logprobs"
REFERENCE_LOGPROBS = "reference_logprobs"

_ONE_TOKEN = SamplingParams(max_tokens=1)
_Row = list[tuple[int, float]]
Score = TypeVar("Score")


class Teacher(Protocol):
    """A model that scores prompts, such as a sampling client."""

    async def sample(
        self,
        prompt: ModelInput,
        *,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> SampleResponse:
        """Samples, and returns the scores of the prompt."""
        ...


@runtime_checkable
class Reference(Protocol):
    """A model with a forward pass, such as a training client."""

    async def forward(self, data: Sequence[Datum], /) -> ForwardBackwardOutput:
        """Returns the logprobs of the target tokens."""
        ...


async def teacher_datums(teacher: Teacher, data: Sequence[Datum], *, k: int = 20) -> list[Datum]:
    """Returns datums with the teacher's likeliest tokens as candidates, for `base_losses.Distillation`.

    The new datums have the same input, and at each of the `N` positions the `K` tokens that the teacher finds
    likeliest there: `target_tokens`, `[N, K]`; `teacher_logprobs`, `[N, K]`; and `weights`, `[N, K]`, the old weight
    times the teacher's probabilities, with which the services' `cross_entropy` distills too. Other fields are left out.
    If the teacher names fewer tokens at a position, others with the logprob -inf fill the row.

    Args:
        teacher: a sampling client of a model with the same tokenizer.
        data: the datums, with targets of `[N]`: texts to imitate, or answers that the student sampled.
        k: number of tokens per position.

    Raises:
        InvalidData: a datum has other targets.
        InvalidResponse: the teacher did not score a position.
        UnsupportedFeature: the service of the teacher has no logprobs of likeliest tokens.
    """
    count = check_count("k", k, least=1)
    prompts = _prompts(teacher, data)

    async def scored(index: int) -> Datum:
        response = await teacher.sample(prompts[index], sampling_params=_ONE_TOKEN, topk_prompt_logprobs=count)
        return _with_candidates(data[index], _scored_rows(response.topk_prompt_logprobs, prompts[index], index), count)

    return await each(scored, range(len(prompts)))


async def with_teacher_logprobs(teacher: Teacher, data: Sequence[Datum]) -> list[Datum]:
    """Returns the datums with the teacher's logprobs of their target tokens in `teacher_logprobs`, `[N]`.

    Args:
        teacher: a sampling client of a model with the same tokenizer.
        data: the datums, with targets of `[N]`, usually answers that the student sampled.

    Raises:
        InvalidData: a datum has other targets.
        InvalidResponse: the teacher did not score a position.
        UnsupportedFeature: the service of the teacher has no logprobs of prompts.
    """
    return await _with_own_scores(teacher, data, TEACHER_LOGPROBS)


async def with_reference(
    model: Teacher | Reference, data: Sequence[Datum], field: str = REFERENCE_LOGPROBS
) -> list[Datum]:
    """Returns the datums with the logprobs of a model, usually the one before the training, in a field.

    Args:
        model: a training client, whose forward pass scores targets of `[N]` or `[N, K]`; a new adapter changes no
            logprob, so it scores as the base model does. Or a sampling client, which scores targets of `[N]`.
        data: the datums.
        field: name of the new field, of the shape of the targets.

    Raises:
        InvalidData: the model is neither, or the datums are invalid.
        InvalidResponse: a sampling client did not score a position.
    """
    if not check_text("field", field).isprintable():
        raise InvalidData(f"field must be a printable name, got {shown(field)}")
    if not isinstance(model, Reference):
        if not callable(getattr(model, "sample", None)):
            raise InvalidData(f"model must be a training or sampling client, got {shown(model)}")
        return await _with_own_scores(model, data, field)
    datums = check_list("data", data, Datum)
    scored = [datum.model_copy(update={"loss_fn_inputs": _scored_fields(datum, i)}) for i, datum in enumerate(datums)]
    outputs = (await model.forward(scored)).loss_fn_outputs
    return [datum.with_inputs(**{field: own["logprobs"]}) for datum, own in zip(datums, outputs, strict=True)]


def with_teacher_advantages(data: Sequence[Datum], *, coefficient: float = 1.0, discount: float = 0.0) -> list[Datum]:
    """Returns sampled datums with advantages that pull the student to the teacher: on-policy distillation.

    Adds `coefficient * (teacher_logprobs - logprobs)` to the `advantages` of each datum: minus the estimated reverse KL
    divergence of each token. With a discount g, a token also gets g times the advantage of the next one, and so on.
    Positions of weight 0 get nothing. Use them with a policy loss, such as `base_losses.ImportanceSampling`. Without
    other advantages, `regularizers.SampledKL(reference_field="teacher_logprobs")` alone has the same gradient on
    samples of the current model.

    Source: the Tinker cookbook, "On-policy distillation".

    Args:
        data: datums with the fields `logprobs` of the sampler and `teacher_logprobs`, `[N]`; those without `advantages`
            have 0.
        coefficient: strength of the pull, > 0.
        discount: from 0 to 1; 0 counts each token alone.

    Raises:
        InvalidData: a datum lacks a field, a shape differs, or a number is out of range.
    """
    datums = check_list("data", data, Datum)
    strength, share = as_number(coefficient), as_number(discount)
    if strength is None or not 0 < strength < np.inf:
        raise InvalidData(f"coefficient must be a finite number > 0, got {shown(coefficient)}")
    if share is None or not 0 <= share <= 1:
        raise InvalidData(f"discount must be a number from 0 to 1, got {shown(discount)}")
    return [_with_advantages(datum, index, strength, share) for index, datum in enumerate(datums)]


def _with_advantages(datum: Datum, index: int, coefficient: float, discount: float) -> Datum:
    sampler, teacher = (_numbers(datum, index, name) for name in ("logprobs", TEACHER_LOGPROBS))
    weights = _numbers(datum, index, "weights") if "weights" in datum.loss_fn_inputs else np.ones_like(sampler)
    own = _numbers(datum, index, "advantages") if "advantages" in datum.loss_fn_inputs else np.zeros_like(sampler)
    counted = weights != 0
    pulls = np.zeros_like(sampler)
    np.subtract(teacher, sampler, out=pulls, where=counted)
    if not np.isfinite(pulls).all():
        raise InvalidData(
            f"a logprob of datum {index} is not finite at a position that counts: set its weight to 0, or leave the "
            "datum out"
        )
    later = 0.0
    for position in reversed(range(len(pulls))) if discount else ():
        if counted[position]:
            later = pulls[position] = pulls[position] + discount * later
    return datum.with_inputs(advantages=(own + coefficient * pulls).astype(np.float32))


def _numbers(datum: Datum, index: int, name: str) -> Array:
    values = field_of(datum, index, name).to_numpy().astype(np.float64)
    shape = target_shape(datum, index)
    if values.shape != shape or len(shape) != 1:
        raise InvalidData(
            f"{name!r} of datum {index} has shape {values.shape} and its target_tokens {shape}: both must be [N]"
        )
    return values


def _scored_fields(datum: Datum, index: int) -> dict[str, TensorData]:
    """Returns what a forward pass reads: other fields may be unknown to the service."""
    weights = datum.loss_fn_inputs.get("weights")
    own = {} if weights is None else {"weights": weights}
    return {"target_tokens": field_of(datum, index, "target_tokens"), **own}


async def _with_own_scores(teacher: Teacher, data: Sequence[Datum], field: str) -> list[Datum]:
    prompts = _prompts(teacher, data)

    async def scored(index: int) -> Datum:
        response = await teacher.sample(prompts[index], sampling_params=_ONE_TOKEN, include_prompt_logprobs=True)
        logprobs = _scored_rows(response.prompt_logprobs, prompts[index], index)
        return data[index].with_inputs(**{field: np.array(logprobs, np.float32)})

    return await each(scored, range(len(prompts)))


def _prompts(teacher: Teacher, data: Sequence[Datum]) -> list[ModelInput]:
    """Returns the tokens of each datum, of which all but the first are its targets."""
    if not callable(getattr(teacher, "sample", None)):
        raise InvalidData(f"teacher must be a sampling client, got {shown(teacher)}")
    prompts: list[ModelInput] = []
    for index, datum in enumerate(check_list("data", data, Datum)):
        shape = target_shape(datum, index)
        if shape != (datum.model_input.length,) or not shape[0]:
            raise InvalidData(
                f"target_tokens of datum {index} have shape {shape}, but its model_input has "
                f"{datum.model_input.length} tokens: a teacher scores data with one target per position"
            )
        tokens = np.array(datum.model_input.to_ints(other=0))
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        if (tokens[1:] != targets[:-1])[datum.model_input.text_mask()[1:]].any():
            raise InvalidData(f"target_tokens of datum {index} are not the tokens that follow in its model_input")
        prompts.append(datum.model_input.append_int(int(targets[-1])))
    return prompts


def _scored_rows(rows: Sequence[Score | None] | None, prompt: ModelInput, index: int) -> list[Score]:
    """Returns the scores of all tokens but the first."""
    given = [] if rows is None else list(rows)
    found = [row for row in given[1:] if row is not None]
    if len(given) != prompt.length or len(found) != prompt.length - 1:
        raise InvalidResponse(
            f"the teacher scored {len(found)} of the {prompt.length - 1} positions of datum {index}: use a service "
            "that scores whole prompts"
        )
    return found


def _with_candidates(datum: Datum, rows: Sequence[_Row], k: int) -> Datum:
    filled = [_filled(row[:k], k) for row in rows]
    logprobs = np.array([[logprob for _, logprob in row] for row in filled], np.float32)
    given = datum.loss_fn_inputs.get("weights")
    weights = np.ones(len(rows), np.float32) if given is None else given.to_numpy()
    return Datum(
        model_input=datum.model_input,
        loss_fn_inputs={
            "target_tokens": TensorData.from_numpy(np.array([[token for token, _ in row] for row in filled], np.int64)),
            TEACHER_LOGPROBS: TensorData.from_numpy(logprobs),
            "weights": TensorData.from_numpy(weights[:, None] * np.exp(logprobs)),
        },
    )


def _filled(row: _Row, k: int) -> _Row:
    """Adds tokens that the teacher did not name, with probability 0, up to k."""
    named = {token for token, _ in row}
    others = (token for token in itertools.count() if token not in named)
    return [*row, *((next(others), -np.inf) for _ in range(k - len(row)))]
