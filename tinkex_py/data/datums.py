"""Datums from texts, conversations and pairs of answers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args

import numpy as np

from tinkex_py.arguments import check_choice, check_count, check_flag
from tinkex_py.data.chat import ChatRenderer, Turns
from tinkex_py.data.images import images_of, is_processor, with_images
from tinkex_py.data.messages import Message, checked_messages
from tinkex_py.data.rows import conversation, plain_messages, plain_rows
from tinkex_py.errors import InvalidData
from tinkex_py.text import encode_answer, require_text
from tinkex_py.types import Datum, EncodedTextChunk, ModelInput
from tinkex_py.types.chunks import Chunk
from tinkex_py.types.datum import is_official, shifted

Row = TypeVar("Row")
Answer = str | Sequence[Message]


def chat_datum(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    turns: Turns = "all",
    max_length: int | None = None,
    tools: Sequence[Any] | None = None,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    images: Sequence[object] | None = None,
) -> Datum:
    """Converts a conversation to a datum of `N` tokens, with the chat template of the tokenizer.

    `weights`, `[N]`, is 1 for targets in the turns of the assistant, including their end marks, and 0 elsewhere. If the
    template marks the text of the assistant (`{% generation %}`), its marks decide. Thoughts of turns that are not
    learned may be missing in the template, which warns; any other part of a message must count.

    Args:
        tokenizer: a Hugging Face tokenizer, or that of `await training.get_tokenizer()` if it has templates. With
            images: the processor of the model, `AutoProcessor.from_pretrained(model)`.
        messages: `{"role": ..., "content": ...}` in order, as the template expects them; fields that are None are
            removed, at any depth.
        turns: "all" learns every turn of the assistant, "last" only the last one.
        max_length: maximum number of input tokens; the end is cut off. None cuts nothing.
        tools: schemas or functions that the template describes to the model.
        chat_template: replaces that of the tokenizer.
        template_options: variables of the template, such as `{"enable_thinking": False}`.
        images: the images of the items `{"type": "image"}` in contents, in order, such as `row["images"]`; items that
            have their own under "image" take none. Each is a PIL image, the bytes of a file, or `{"bytes": ...}`.

    Raises:
        InvalidData: the conversation has no turn of the assistant, the template fails or drops a part of a message, the
            tokens of a turn cannot be determined, or no token within `max_length` is left to learn. Or an image is
            missing or cannot be read.
        MissingExtra: jinja2 is not installed.
    """
    check_choice("turns", turns, get_args(Turns))
    settings: dict[str, Any] = {"tools": tools, "template_options": template_options}
    if not is_processor(tokenizer):
        if images is not None:
            raise InvalidData("images need the processor of the model: pass AutoProcessor.from_pretrained(model)")
        rendered = ChatRenderer(tokenizer, chat_template=chat_template, **settings).render(messages, turns)
        return _datum(ModelInput.from_ints(rendered.tokens), rendered.learned, max_length)
    template = chat_template or getattr(tokenizer, "chat_template", None)
    rendered = ChatRenderer(tokenizer.tokenizer, chat_template=template, **settings).render(messages, turns)
    shown = images_of(checked_messages(messages), images)
    return _datum(*with_images(tokenizer, rendered.tokens, rendered.learned, shown), max_length)


def text_datum(
    tokenizer: Any, text: str, *, prompt: str = "", append_end: bool = True, max_length: int | None = None
) -> Datum:
    """Converts a text to a datum of `N` tokens, without a template.

    `weights`, `[N]`, is 1 for the tokens of the text and 0 for those of the prompt. The prompt has the tokens that
    `ModelInput.from_text` gives, with the BOS token if the tokenizer adds it by itself; those of the text continue it.

    Args:
        tokenizer: any object with `encode`.
        text: the text to learn.
        prompt: text before it that is not learned.
        append_end: also learn the EOS token.
        max_length: maximum number of input tokens; the end is cut off. None cuts nothing.

    Raises:
        InvalidData: there is nothing to learn, the tokenizer has no EOS token, or cannot encode prompt and text apart.
    """
    require_text("text", text)
    require_text("prompt", prompt)
    check_flag("append_end", append_end)
    before, learned = encode_answer(tokenizer, prompt, text, append_end=append_end)
    whole = ModelInput.from_ints([*before, *learned])
    return _datum(whole, [False] * len(before) + [True] * len(learned), max_length)


def preference_datums(
    tokenizer: Any,
    chosen: Answer,
    rejected: Answer,
    *,
    prompt: Answer = "",
    max_length: int | None = None,
    tools: Sequence[Any] | None = None,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[Datum, Datum]:
    """Converts a pair of answers to `(chosen, rejected)`, the order in which `base_losses.DPO` expects datums.

    If all three are texts, they are converted as in `text_datum`. Otherwise the answers continue the messages of the
    prompt, or contain the whole conversation if there is no prompt, and only their last turn is learned. An answer to
    messages may be a text of the assistant.

    Args:
        tokenizer: as in `chat_datum` and `text_datum`.
        chosen: the better answer.
        rejected: the worse answer.
        prompt: text or messages before both answers.
        max_length: maximum number of input tokens of each datum. None cuts nothing.
        tools: as in `chat_datum`.
        chat_template: as in `chat_datum`.
        template_options: as in `chat_datum`.

    Raises:
        InvalidData: as in `chat_datum` and `text_datum`; the message names the answer.
    """
    before = _as_messages("prompt", "user", prompt)

    def datum_of(name: str, answer: Answer) -> Datum:
        try:
            if isinstance(prompt, str) and isinstance(answer, str):
                return text_datum(tokenizer, answer, prompt=prompt, max_length=max_length)
            return chat_datum(
                tokenizer,
                conversation(before, _as_messages(name, "assistant", answer)),
                turns="last",
                max_length=max_length,
                tools=tools,
                chat_template=chat_template,
                template_options=template_options,
            )
        except InvalidData as error:
            raise InvalidData(f"{name}: {error}") from error

    pair = datum_of("chosen", chosen), datum_of("rejected", rejected)
    if pair[0] == pair[1]:
        cut = "" if max_length is None else f" after both were cut to max_length={max_length}"
        raise InvalidData(
            f"chosen and rejected are equal{cut}, so nothing can be learned from them: leave the pair out"
        )
    return pair


def datums_from(rows: Iterable[Row], render: Callable[[Row], Datum | Sequence[Datum]]) -> Iterator[Datum]:
    """Converts rows to datums, lazily.

    Args:
        rows: a `datasets.Dataset`, streamed or not, or any rows. Fields that a table of `datasets` fills with None,
            because other rows have them, are removed at every depth.
        render: converts a row to one datum or several: `lambda row: chat_datum(tokenizer, row["messages"])`.

    Raises:
        InvalidData: a row lacks a column or cannot be rendered; the message contains its number, from 0. Or `rows` is
            no sequence of rows, such as a DatasetDict. Other exceptions of `render` pass through, with a note that has
            the number.
    """
    for number, row in enumerate(plain_rows(rows)):
        try:
            made = render(row)
        except InvalidData as error:
            raise InvalidData(f"row {number}: {error}") from error
        except KeyError as error:
            raise InvalidData(f"row {number} has no {error}{_columns(row)}") from error
        except Exception as error:
            error.add_note(f"render failed on row {number}")
            raise
        datums: Sequence[object] = made if isinstance(made, list | tuple) else [made]
        for datum in datums:
            if not isinstance(datum, Datum) and not is_official(datum):
                raise InvalidData(f"row {number}: render must return one or more Datum, got a {type(datum).__name__}")
            yield Datum.of(datum)


def _datum(whole: ModelInput, learned: Sequence[bool], max_length: int | None) -> Datum:
    """Shifts the tokens: position `i` predicts token `i + 1`. What does not fit is cut off, of images the whole."""
    if max_length is not None:
        max_length = check_count("max_length", max_length, least=1)
    if not any(learned[1:]):
        raise InvalidData("there is nothing to learn: the first token has no prediction, and no other is to be learned")
    kept = _head(whole, whole.length if max_length is None else max_length + 1)
    if not any(learned[1 : kept.length]):
        raise InvalidData(
            f"max_length={max_length} cuts off everything that is to be learned, which begins at token "
            f"{learned.index(True)} of {whole.length}: raise max_length, or shorten what precedes"
        )
    return shifted(kept, np.array(learned[: kept.length]))


def _head(whole: ModelInput, count: int) -> ModelInput:
    """Returns the first `count` tokens, up to the last that are text; images are not divided."""
    chunks: list[Chunk] = []
    for chunk in whole.chunks:
        if count == 0 or (chunk.length > count and not isinstance(chunk, EncodedTextChunk)):
            break
        chunks.append(EncodedTextChunk(tokens=chunk.tokens[:count]) if isinstance(chunk, EncodedTextChunk) else chunk)
        count -= chunks[-1].length
    while chunks and not isinstance(chunks[-1], EncodedTextChunk):
        chunks.pop()
    return ModelInput(chunks=tuple(chunks))


def _as_messages(name: str, role: str, given: object) -> list[Message]:
    """Returns a text as one message, and messages checked; an empty text or list is no message."""
    if isinstance(given, str):
        return [{"role": role, "content": given}] if given else []
    plain = plain_messages(given)
    if not isinstance(plain, list):
        raise InvalidData(f"{name} must be a text or a sequence of messages, got a {type(given).__name__}")
    return checked_messages(cast("list[object]", plain)) if plain else []


def _columns(row: object) -> str:
    return f" (it has {sorted(map(str, cast('Mapping[object, object]', row)))})" if isinstance(row, Mapping) else ""
