"""Datums from texts, conversations and pairs of answers."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from tinkex_py.errors import InvalidData
from tinkex_py.integrations.huggingface.chat import ChatRenderer, Message, Turns, checked_messages
from tinkex_py.types import Datum, ModelInput

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
) -> Datum:
    """A conversation as a datum of `N` tokens, in the form of the tokenizer's chat template.

    `weights`, `[N]`, is 1 where the target is a token that the assistant says, the mark that ends its turn included,
    and 0 elsewhere. Where the template marks what the assistant says (`{% generation %}`), exactly that counts.

    Args:
        tokenizer: a Hugging Face tokenizer, or what `await training.get_tokenizer()` gives where that has templates.
        messages: `{"role": ..., "content": ...}` in order, as the template wants them; fields that are None are left
            out.
        turns: "all" learns every turn of the assistant, "last" only the last one.
        max_length: most tokens that the model reads; what is over is cut off at the end. None cuts nothing.
        tools: schemas or functions that the template describes to the model.
        chat_template: used instead of the tokenizer's own.
        template_options: variables of the template, such as `{"enable_thinking": False}`.

    Raises:
        InvalidData: no conversation, no turn of the assistant, a template that fails or whose turns cannot be told
            apart, or no token left to learn within `max_length`.
        MissingExtra: jinja2 is not installed.
    """
    if turns not in ("all", "last"):
        raise InvalidData(f"turns must be 'all' or 'last', got {turns!r}")
    checked = checked_messages(messages)
    renderer = ChatRenderer(tokenizer, chat_template=chat_template, tools=tools, options=template_options)
    rendered = renderer.render(checked, turns)
    return _datum(rendered.tokens, rendered.learnt, max_length)


def text_datum(
    tokenizer: Any, text: str, *, prompt: str = "", append_end: bool = True, max_length: int | None = None
) -> Datum:
    """A text as a datum of `N` tokens, without any template.

    `weights`, `[N]`, is 1 for the tokens of the text and 0 for those of the prompt. Prompt and text are encoded apart,
    so that the text begins where a model would go on. The token that begins every text stands in front where the
    tokenizer puts it there by itself.

    Args:
        tokenizer: anything with `encode`.
        text: what to learn.
        prompt: what stands before it and is not to be learnt.
        append_end: whether the token that ends a text is learnt too.
        max_length: most tokens that the model reads; what is over is cut off at the end. None cuts nothing.

    Raises:
        InvalidData: there is nothing to learn, or no token that ends a text.
    """
    for name, value in (("text", text), ("prompt", prompt)):
        if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"{name} must be a text, got a {type(value).__name__}")
    before = [*_start_tokens(tokenizer), *_encoded(tokenizer, prompt)]
    learnt = _encoded(tokenizer, text)
    if append_end:
        end = getattr(tokenizer, "eos_token_id", None)
        if end is None:
            raise InvalidData("the tokenizer has no token that ends a text: pass append_end=False")
        learnt.append(end)
    return _datum([*before, *learnt], [False] * len(before) + [True] * len(learnt), max_length)


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
    """A pair of answers as `(chosen, rejected)`, the order in which `base_losses.DPO` takes datums.

    As rows have them: three texts, which become texts as in `text_datum`; or messages, where the answers go on after
    the prompt, or hold the whole conversation if there is none, and only their last turn counts. Where the prompt
    holds messages, an answer may be a text: the assistant's.

    Args:
        tokenizer: as `chat_datum` and `text_datum` take it.
        chosen: the better answer.
        rejected: the worse answer.
        prompt: what both answer.
        max_length: most tokens that the model reads, in each of the two. None cuts nothing.
        tools: schemas or functions that the template describes to the model.
        chat_template: used instead of the tokenizer's own.
        template_options: variables of the template.

    Raises:
        InvalidData: as in `chat_datum` and `text_datum`, naming the answer.
    """

    def datum_of(name: str, answer: Answer) -> Datum:
        try:
            if isinstance(prompt, str) and isinstance(answer, str):
                return text_datum(tokenizer, answer, prompt=prompt, max_length=max_length)
            return chat_datum(
                tokenizer,
                _conversation(prompt, answer),
                turns="last",
                max_length=max_length,
                tools=tools,
                chat_template=chat_template,
                template_options=template_options,
            )
        except InvalidData as error:
            raise InvalidData(f"{name}: {error}") from error

    return datum_of("chosen", chosen), datum_of("rejected", rejected)


def datums_from(rows: Iterable[Row], render: Callable[[Row], Datum | Sequence[Datum]]) -> Iterator[Datum]:
    """The datums of rows, one row after another as they are asked for.

    Args:
        rows: a `datasets.Dataset`, streamed or not, or any rows.
        render: makes one datum or several of a row: `lambda row: chat_datum(tokenizer, row["messages"])`.

    Raises:
        InvalidData: a row has no such column or cannot be rendered; the message has its number, from 0.
    """
    for number, row in enumerate(rows):
        try:
            made = render(row)
        except InvalidData as error:
            raise InvalidData(f"row {number}: {error}") from error
        except KeyError as error:
            raise InvalidData(f"row {number} has no {error}{_columns(row)}") from error
        datums: Sequence[object] = made if isinstance(made, list | tuple) else [made]
        for datum in datums:
            if not isinstance(datum, Datum):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InvalidData(f"row {number}: render must give a Datum or several, got a {type(datum).__name__}")
            yield datum


def _datum(tokens: Sequence[int], learnt: Sequence[bool], max_length: int | None) -> Datum:
    """The pre-shifted form: position `i` predicts token `i + 1`."""
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"max_length must be an int >= 1, got {max_length!r}")
    if not any(learnt[1:]):
        raise InvalidData("there is nothing to learn: no token that something stands before")
    # The last token is a target only: the model does not read it.
    inputs, targets, weights = tokens[:-1][:max_length], tokens[1:][:max_length], learnt[1:][:max_length]
    if not any(weights):
        raise InvalidData(
            f"max_length={max_length} cuts off all that is to be learnt: it begins at token {learnt.index(True)} "
            f"of {len(tokens)}"
        )
    return Datum(
        model_input=ModelInput.from_ints(inputs),
        loss_fn_inputs={"target_tokens": targets, "weights": [float(is_learnt) for is_learnt in weights]},
    )


def _conversation(prompt: Answer, answer: Answer) -> list[Message]:
    return [*_as_messages("user", prompt), *_as_messages("assistant", answer)]


def _as_messages(role: str, said: Answer) -> Sequence[Message]:
    if not isinstance(said, str):
        return said
    return [{"role": role, "content": said}] if said else []


def _start_tokens(tokenizer: Any) -> list[int]:
    """The token that begins every text, where the tokenizer puts it there by itself."""
    start = getattr(tokenizer, "bos_token_id", None)
    return [start] if start is not None and list(tokenizer.encode(""))[:1] == [start] else []


def _encoded(tokenizer: Any, text: str) -> list[int]:
    encode = tokenizer.encode
    if "add_special_tokens" in inspect.signature(encode).parameters:
        return list(encode(text, add_special_tokens=False))
    return list(encode(text))


def _columns(row: object) -> str:
    return f" (it has {sorted(map(str, cast('Mapping[object, object]', row)))})" if isinstance(row, Mapping) else ""
