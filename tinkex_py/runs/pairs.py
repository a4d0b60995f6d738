"""Pairs of a prompt and an answer: reading them, datums of them, and batches."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.types import Datum, Encoder, ForwardBackwardOutput, ModelInput, SamplingParams, Tokenizer

CHAT_START = "<|im_start|>"


class Pair(BaseModel):
    """One prompt and its answer."""

    prompt: str
    answer: str


def read_pairs(path: Path) -> list[Pair]:
    """Reads pairs from a JSON Lines file.

    Raises:
        ConfigError: the file cannot be read.
        InvalidData: a line is not a pair; names the line.
    """
    # The errors of the parsers contain prompts, so they must not become the cause of ours.
    lines: list[str] | None = None
    try:
        with contextlib.suppress(UnicodeDecodeError):
            # Not splitlines(): JSON strings may contain other line separators, such as U+2028.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if lines is None:
        raise ConfigError(f"{path} is not UTF-8 text: save it as UTF-8")
    pairs: list[Pair] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        with contextlib.suppress(ValidationError):
            pairs.append(Pair.model_validate_json(line))
            continue
        raise InvalidData(f'{path}:{number} must be {{"prompt": TEXT, "answer": TEXT}}')
    if not pairs:
        raise InvalidData(f'{path} is empty: add lines of {{"prompt": TEXT, "answer": TEXT}}')
    return pairs


def prompt_tokens(tokenizer: Encoder, prompt: str) -> list[int]:
    """Returns a prompt up to the beginning of the answer; in ChatML if the tokenizer has its tokens."""
    if len(tokenizer.encode(CHAT_START)) == 1:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    else:
        text = f"Q: {prompt}\nA: "
    return list(tokenizer.encode(text))


def answer_tokens(tokenizer: Encoder, answer: str) -> list[int]:
    """Returns an answer with its end token."""
    end = "<|im_end|>" if len(tokenizer.encode(CHAT_START)) == 1 else "\n"
    return list(tokenizer.encode(answer + end))


def make_datum(tokenizer: Encoder, pair: Pair) -> Datum:
    """Returns a pair as a datum; only the answer's tokens have weight."""
    question, answer = prompt_tokens(tokenizer, pair.prompt), answer_tokens(tokenizer, pair.answer)
    tokens = question + answer
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "weights": [0.0] * (len(question) - 1) + [1.0] * len(answer),
        },
    )


def with_reference(data: Sequence[Datum], reference: ForwardBackwardOutput) -> list[Datum]:
    """Returns the datums with the frozen model's logprobs in `reference_logprobs`."""
    return [
        Datum(
            model_input=datum.model_input,
            loss_fn_inputs={**datum.loss_fn_inputs, "reference_logprobs": outputs["logprobs"]},
        )
        for datum, outputs in zip(data, reference.loss_fn_outputs, strict=True)
    ]


async def sample_answers(
    training: AsyncTrainingClient, tokenizer: Tokenizer, prompts: Sequence[str], *, max_tokens: int = 40
) -> dict[str, str]:
    """Returns the most likely answers of the model with its current weights, by prompt."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    async with await training.save_weights_and_get_sampling_client() as sampler:

        async def answer(prompt: str) -> str:
            tokens = ModelInput.from_ints(prompt_tokens(tokenizer, prompt))
            response = await sampler.sample(tokens, sampling_params=params)
            return str(tokenizer.decode(response.sequences[0].tokens)).replace("<|im_end|>", "").strip()

        return dict(zip(prompts, await asyncio.gather(*map(answer, prompts)), strict=True))


def shuffled_batches(data: Sequence[Datum], size: int, seed: int, start: int = 0) -> Iterator[list[Datum]]:
    """Returns shuffled batches, epoch after epoch, without end.

    Args:
        data: the datums; an incomplete batch at the end of an epoch is dropped.
        size: datums per batch.
        seed: of the order.
        start: number of batches to skip.
    """
    return itertools.islice(_epochs(data, size, seed), start, None)


def _epochs(data: Sequence[Datum], size: int, seed: int) -> Iterator[list[Datum]]:
    order = list(data)
    generator = random.Random(seed)  # noqa: S311  # shuffling, not cryptography
    while True:
        generator.shuffle(order)
        for start in range(0, len(order) - size + 1, size) or [0]:
            yield order[start : start + size]
