"""Samples for reinforcement learning: groups of answers, their rewards, and datums of them."""

import asyncio
import hashlib
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from tinkex_py.arguments import as_number, check_count, check_function, check_items, check_kind, check_list, shown
from tinkex_py.errors import InvalidData
from tinkex_py.limits import RetryPolicy, with_retries
from tinkex_py.text import decode
from tinkex_py.types import (
    Datum,
    EncodedTextChunk,
    ModelInput,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    Tokenizer,
)
from tinkex_py.types.datum import field_of, target_shape
from tinkex_py.types.tensors import Array

Item = TypeVar("Item")
Result = TypeVar("Result")
Tokens = ModelInput | Sequence[int] | Array
Part = SampledSequence | Sequence[int] | Array

_NO_PARAMS = SamplingParams()


class PromptSampler(Protocol):
    """A model that continues prompts, such as a sampling client."""

    async def sample(
        self, prompt: ModelInput, *, num_samples: int = 1, sampling_params: SamplingParams | None = None
    ) -> SampleResponse:
        """Samples sequences that continue a prompt."""
        ...


async def sample_groups(
    sampler: PromptSampler, prompts: Sequence[Tokens], n: int, *, sampling_params: SamplingParams | None = None
) -> list[list[SampledSequence]]:
    """Samples `n` answers to each prompt, all at once. Returns one list of answers per prompt, in order.

    Args:
        sampler: a sampling client.
        prompts: inputs or lists of token ids.
        n: answers to each prompt.
        sampling_params: as for `sample`. With a `seed`, each prompt gets its own seed, which depends on that seed and
            on the position of the prompt.

    Raises:
        InvalidData: an argument is not valid.
        TinkexError: a request failed; the others are cancelled.
    """
    if not callable(getattr(sampler, "sample", None)):
        raise InvalidData(f"sampler must be a sampling client, got {shown(sampler)}")
    given = check_items("prompts", prompts)
    inputs = [ModelInput.from_ints(_tokens(prompt, f"prompts[{index}]")) for index, prompt in enumerate(given)]
    count = check_count("n", n, least=1)
    params = _NO_PARAMS if sampling_params is None else check_kind("sampling_params", sampling_params, SamplingParams)

    async def group(index: int) -> list[SampledSequence]:
        seed = None if params.seed is None else derived_seed(params.seed, index)
        own = params.model_copy(update={"seed": seed})
        return (await sampler.sample(inputs[index], num_samples=count, sampling_params=own)).sequences

    return await each(group, range(len(inputs)))


def datum_from_sample(prompt: Tokens, sequence: SampledSequence | Sequence[Part], advantage: float) -> Datum:
    """Returns a sampled answer as a datum of `N` tokens for a policy loss.

    Of `N + 1` tokens of prompt and answer, the first `N` are the input and the last `N` the `target_tokens`. At sampled
    tokens, `weights` is 1, `logprobs` are those of the sampler, and `advantages` the advantage; at others all three
    are 0.

    Args:
        prompt: at least one token.
        sequence: the sampled answer; or the parts of a conversation in order, of which sampled sequences are learned,
            and lists of token ids, such as the responses of tools, are not.
        advantage: of the answer.

    Raises:
        InvalidData: the prompt is empty, nothing was sampled, the service returned no logprobs, or the advantage is not
            finite.
    """
    number = as_number(advantage)
    if number is None or not math.isfinite(number):
        raise InvalidData(f"advantage must be a finite number, got {shown(advantage)}")
    before = _tokens(prompt, "prompt")
    if not before.size:
        raise InvalidData("prompt is empty: the first token of an answer needs a token before it")
    given = [sequence] if isinstance(sequence, SampledSequence) else check_items("sequence", sequence)
    parts = [_unlearned(before), *(_part(part, index) for index, part in enumerate(given))]
    tokens, weights, logprobs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not weights.any():
        raise InvalidData("sequence contains no sampled token: leave the answer out")
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:].astype(np.int64),
            "weights": weights[1:],
            "logprobs": logprobs[1:],
            "advantages": np.float32(number) * weights[1:],
        },
    )


def answer_texts(data: Sequence[Datum], tokenizer: Tokenizer) -> list[str]:
    """Returns the text of each datum's answer: its target tokens whose weight is not 0; all without `weights`.

    Raises:
        InvalidData: a datum has other targets than one per position.
    """
    if isinstance(tokenizer, bytes) or not callable(getattr(tokenizer, "decode", None)):
        raise InvalidData(f"tokenizer must be an object with decode(tokens), got {shown(tokenizer)}")
    texts: list[str] = []
    for index, datum in enumerate(check_list("data", data, Datum)):
        shape = target_shape(datum, index)
        weights = datum.loss_fn_inputs.get("weights")
        if len(shape) != 1 or (weights is not None and weights.shape != shape):
            raise InvalidData(f"datum {index} has target_tokens of shape {shape}: answers have one target per position")
        targets = field_of(datum, index, "target_tokens").to_numpy()
        texts.append(decode(tokenizer, (targets if weights is None else targets[weights.to_numpy() != 0]).tolist()))
    return texts


async def rewards_of(
    reward: Callable[[Item], Awaitable[float]], answers: Sequence[Item], *, at_once: int = 32, retry: int = 1
) -> list[float]:
    """Returns the reward of each answer, in order, from an async function such as a call of a judge.

    Args:
        reward: called as `await reward(answer)`; returns a finite number.
        answers: what is rewarded, such as texts.
        at_once: maximum number of calls at the same time.
        retry: maximum number of calls for an answer; between two of them it waits up to 0.1 s, doubled with each.

    Raises:
        InvalidData: an argument or a reward is not valid.
        Exception: the last call for an answer failed; other calls are cancelled.
    """
    check_function("reward", reward)
    items, slots = check_items("answers", answers), asyncio.Semaphore(check_count("at_once", at_once, least=1))
    policy = RetryPolicy(
        deadline=math.inf, max_attempts=check_count("retry", retry, least=1), initial_wait=0.1, max_wait=5.0
    )

    async def call(index: int) -> float:
        called: object = reward(items[index])
        if not inspect.isawaitable(called):
            raise InvalidData(f"reward must be an async function, but its result cannot be awaited: {shown(called)}")
        return await called

    async def one(index: int) -> float:
        async with slots:
            given = await with_retries(policy, lambda _: call(index), lambda error: not isinstance(error, InvalidData))
        number = as_number(given)
        if number is None or not math.isfinite(number):
            raise InvalidData(f"the reward of answers[{index}] must be a finite number, got {shown(given)}")
        return number

    return await each(one, range(len(items)))


def derived_seed(*place: int | str) -> int:
    """Returns a seed of 31 bits for a place, such as `(run seed, step, prompt)`; other places have other seeds."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:4], "little") >> 1


async def each(work: Callable[[Item], Awaitable[Result]], items: Sequence[Item]) -> list[Result]:
    """Calls a function with all items at once, and returns the results in order; the first failure ends the others."""

    async def one(item: Item) -> Result:
        return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item), name="tinkex.each") for item in items]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _tokens(tokens: Tokens, name: str) -> Array:
    if isinstance(tokens, ModelInput):
        return np.array(tokens.to_ints(), np.int32)
    try:
        return EncodedTextChunk(tokens=tokens).tokens
    except InvalidData as error:
        raise InvalidData(f"{name}: {error}") from None


def _unlearned(tokens: Array) -> tuple[Array, Array, Array]:
    return tokens, np.zeros(tokens.size, np.float32), np.zeros(tokens.size, np.float32)


def _part(part: Part, index: int) -> tuple[Array, Array, Array]:
    """Returns the tokens of a part, with the weight and the logprob of each."""
    if not isinstance(part, SampledSequence):
        return _unlearned(_tokens(part, f"part {index} of sequence"))
    tokens = _tokens(part.tokens, f"part {index} of sequence")
    logprobs = np.array(part.logprobs or [], np.float32)
    if logprobs.size != tokens.size or not np.isfinite(logprobs).all():
        raise InvalidData(
            f"part {index} of sequence has {tokens.size} tokens and {np.isfinite(logprobs).sum()} finite logprobs: "
            "sample from a service that returns the logprob of each token"
        )
    return tokens, np.ones(tokens.size, np.float32), logprobs
