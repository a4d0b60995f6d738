"""Prompts and their answers as datums, in batches."""

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ValidationError

from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.types import Datum, ForwardBackwardOutput, ModelInput

CHAT_START = "<|im_start|>"


class Pair(BaseModel):
    """One prompt and its answer."""

    prompt: str
    answer: str


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def encode(self, text: str, /) -> list[int]:
        """Token ids of a text."""
        ...


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from a JSON Lines file.

    Raises:
        ConfigError: the file cannot be read.
        InvalidData: a line is no pair, naming it.
    """
    # Errors that hold what the file says are left behind: it is prompts.
    lines: list[str] | None = None
    try:
        with contextlib.suppress(UnicodeDecodeError):
            lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if lines is None:
        raise ConfigError(f"{path} is not UTF-8 text")
    pairs: list[Pair] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        with contextlib.suppress(ValidationError):
            pairs.append(Pair.model_validate_json(line))
            continue
        raise InvalidData(f'{path}:{number} is not {{"prompt": ..., "answer": ...}}')
    if not pairs:
        raise InvalidData(f"{path} holds no pairs")
    return pairs


def prompt_tokens(tokenizer: Encoder, prompt: str) -> list[int]:
    """A question up to where the answer begins; in chat form if the tokenizer knows chat marks."""
    if len(tokenizer.encode(CHAT_START)) == 1:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    else:
        text = f"Q: {prompt}\nA: "
    return list(tokenizer.encode(text))


def answer_tokens(tokenizer: Encoder, answer: str) -> list[int]:
    """An answer with the mark that ends it."""
    end = "<|im_end|>" if len(tokenizer.encode(CHAT_START)) == 1 else "\n"
    return list(tokenizer.encode(answer + end))


def make_datum(tokenizer: Encoder, pair: Pair) -> Datum:
    """A pair as a datum; only the answer's tokens have weight."""
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
    """The datums with the frozen model's logprobs in `reference_logprobs`."""
    return [
        Datum(
            model_input=datum.model_input,
            loss_fn_inputs={**datum.loss_fn_inputs, "reference_logprobs": outputs["logprobs"]},
        )
        for datum, outputs in zip(data, reference.loss_fn_outputs, strict=True)
    ]


def shuffled_batches(data: Sequence[Datum], size: int, seed: int, start: int = 0) -> Iterator[list[Datum]]:
    """Shuffled batches, epoch after epoch, without end.

    Args:
        data: the datums; what does not fill a batch is left out of its epoch.
        size: datums per batch.
        seed: of the order.
        start: batches to leave out at the beginning.
    """
    return itertools.islice(_epochs(data, size, seed), start, None)


def _epochs(data: Sequence[Datum], size: int, seed: int) -> Iterator[list[Datum]]:
    order = list(data)
    generator = random.Random(seed)  # noqa: S311  # shuffling, not cryptography
    while True:
        generator.shuffle(order)
        for start in range(0, len(order) - size + 1, size) or [0]:
            yield order[start : start + size]
