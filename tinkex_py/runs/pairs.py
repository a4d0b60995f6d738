"""Pairs of a prompt and an answer: reading them, datums of them, and answers of a model."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.data.chat import ChatRenderer, has_chat_template
from tinkex_py.data.datums import chat_datum, text_datum
from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.text import decode, encode_prompt
from tinkex_py.types import Datum, Encoder, ModelInput, SamplingParams, Tokenizer


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
    """Returns a prompt up to the beginning of the answer: in the chat template of the tokenizer, if it has one.

    Raises:
        InvalidData: the prompt cannot be encoded, or the template drops it.
    """
    if has_chat_template(tokenizer):
        return ChatRenderer(tokenizer).prompt([{"role": "user", "content": prompt}])
    return encode_prompt(tokenizer, _in_words(prompt))


def make_datum(tokenizer: Encoder, pair: Pair) -> Datum:
    """Returns a pair as a datum; only the answer and its end have weight.

    With a chat template it is that of `chat_datum`. Else the answer ends with the EOS token of the tokenizer, or with
    its line if there is none.

    Raises:
        InvalidData: as in `chat_datum` and `text_datum`.
    """
    if has_chat_template(tokenizer):
        messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]
        return chat_datum(tokenizer, messages)
    if getattr(tokenizer, "eos_token_id", None) is None:
        return text_datum(tokenizer, f"{pair.answer}\n", prompt=_in_words(pair.prompt), append_end=False)
    return text_datum(tokenizer, pair.answer, prompt=_in_words(pair.prompt))


async def sample_answers(
    training: AsyncTrainingClient, tokenizer: Tokenizer, prompts: Sequence[str], *, max_tokens: int = 40
) -> dict[str, str]:
    """Returns the most likely answers of the model with its current weights, by prompt."""
    ends = _end_tokens(tokenizer)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=ends)
    async with await training.save_weights_and_get_sampling_client() as sampler:

        async def answer(prompt: str) -> str:
            tokens = ModelInput.from_ints(prompt_tokens(tokenizer, prompt))
            response = await sampler.sample(tokens, sampling_params=params)
            answered = list(response.sequences[0].tokens)
            return decode(tokenizer, answered[:-1] if answered and answered[-1] in ends else answered).strip()

        return dict(zip(prompts, await asyncio.gather(*map(answer, prompts)), strict=True))


def _in_words(prompt: str) -> str:
    return f"Q: {prompt}\nA: "


def _end_tokens(tokenizer: Tokenizer) -> list[int]:
    """Returns the last token that the model learns of an answer, and the EOS token."""
    learned = make_datum(tokenizer, Pair(prompt="a", answer="a")).loss_fn_inputs
    weights, targets = learned["weights"].tolist(), learned["target_tokens"].tolist()
    end = int([target for target, weight in zip(targets, weights, strict=True) if weight][-1])
    return [end] if tokenizer.eos_token_id in (None, end) else [end, tokenizer.eos_token_id]
