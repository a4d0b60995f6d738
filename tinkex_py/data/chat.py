"""Renders conversations to tokens, and marks the tokens that the model learns.

If a chat template marks the text of the assistant (`{% generation %}`), its marks decide. Otherwise a turn is the
difference between the conversation up to it and the conversation up to its end. That is exact only if the tokens of
both are prefixes of those of the whole conversation; anything else is an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

from tinkex_py.data.rows import plain_messages, require_texts
from tinkex_py.errors import InvalidData, MissingExtra

Turns = Literal["all", "last"]
Message = Mapping[str, Any]

# The pattern of transformers.
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """Tokens of a conversation, and whether the model learns each."""

    tokens: list[int]
    learned: list[bool]


def checked_messages(messages: object) -> list[Message]:
    """Returns the messages of a conversation without fields that are None.

    Tables have every field in every row, and templates would render None as text.

    Raises:
        InvalidData: there are no messages, one is invalid, or none has the role "assistant".
    """
    messages = plain_messages(messages)
    if not isinstance(messages, list):
        raise InvalidData(f"messages must be a sequence of messages, got a {type(messages).__name__}")
    if not messages:
        raise InvalidData("the conversation is empty: it needs at least one message of the assistant")
    checked: list[Message] = []
    for index, message in enumerate(cast("Sequence[object]", messages)):
        if not isinstance(message, Mapping):
            raise InvalidData(f"message {index} must map 'role' and 'content' to texts, got a {type(message).__name__}")
        fields = cast("Message", message)
        require_texts(fields, f"message {index}: ")
        if not isinstance(fields.get("role"), str):
            raise InvalidData(f"message {index} has no 'role' (it has {sorted(fields)})")
        checked.append(fields)
    if not any(map(_is_assistant, checked)):
        roles = ", ".join(message["role"] for message in checked)
        raise InvalidData(
            f"no message has the role 'assistant', so there is nothing to learn: add an answer; the roles are: {roles}"
        )
    return checked


class ChatRenderer:
    """Renders conversations with one chat template.

    Args:
        tokenizer: a Hugging Face tokenizer, or one with its `apply_chat_template`.
        chat_template: replaces that of the tokenizer.
        tools: schemas or functions that the template may describe.
        options: variables of the template, such as `enable_thinking`.

    Raises:
        InvalidData: there is no chat template.
        MissingExtra: jinja2 is not installed.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from jinja2 import TemplateError
        except ModuleNotFoundError as error:
            raise MissingExtra("jinja2", "huggingface") from error
        if not callable(getattr(tokenizer, "apply_chat_template", None)):
            raise InvalidData(
                f"a {type(tokenizer).__name__} does not support chat templates: pass a Hugging Face tokenizer, or use "
                "text_datum"
            )
        if chat_template is None and not tokenizer.chat_template:
            raise InvalidData("the tokenizer has no chat template: pass chat_template=, or use text_datum")
        self._tokenizer = tokenizer
        self._settings: dict[str, Any] = {
            **(options or {}),
            "tools": None if tools is None else list(tools),
            "chat_template": tokenizer.get_chat_template(chat_template, tools),
        }
        self._template_errors = (TemplateError, TypeError, ValueError, LookupError, AttributeError)

    def render(self, messages: Sequence[Message], turns: Turns) -> Rendered:
        """Renders the whole conversation; the model learns all turns of the assistant, or the last one.

        Args:
            messages: as `checked_messages` returns them.
            turns: "all" or "last".

        Raises:
            InvalidData: the template fails, or the tokens of a turn cannot be determined.
        """
        of_assistant = [index for index, message in enumerate(messages) if _is_assistant(message)]
        wanted = of_assistant if turns == "all" else of_assistant[-1:]
        # Only fast tokenizers map characters to tokens.
        if _MARKER.search(self._settings["chat_template"]) and getattr(self._tokenizer, "is_fast", False):
            return self._by_markers(messages, of_assistant, wanted)
        return self._by_prefixes(messages, wanted)

    def _by_markers(self, messages: Sequence[Message], of_assistant: Sequence[int], wanted: Sequence[int]) -> Rendered:
        given = self._apply(
            messages, return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True}
        )
        tokens, learned = list(given["input_ids"]), [bool(marked) for marked in given["assistant_masks"]]
        spans = [tuple(span) for span in given["offset_mapping"]]
        for index in range(1, len(learned)):
            # If the last character of a turn is several tokens, transformers marks only the first of them.
            if learned[index - 1] and spans[index] == spans[index - 1]:
                learned[index] = True
        runs = sum(marked for marked, _ in groupby(learned))
        # With a tokenizer that drops white space, transformers loses a mark or extends it to the end.
        if runs < len(of_assistant) or (learned[-1] and not _is_assistant(messages[-1])):
            raise InvalidData(
                f"the conversation has {len(of_assistant)} turns of the assistant, but the marks of the chat template "
                f"find {runs}: remove empty turns, or pass a template that marks every turn as chat_template="
            )
        if len(wanted) < len(of_assistant):
            # Without the generation prompt, because some templates put a part of the answer into it.
            before = self._prefix_length(tokens, messages, wanted[0], turn=wanted[0])
            learned = [False] * before + learned[before:]
        return Rendered(tokens, learned)

    def _by_prefixes(self, messages: Sequence[Message], wanted: Sequence[int]) -> Rendered:
        tokens = self._tokens(messages)
        learned = [False] * len(tokens)
        for index in wanted:
            start = self._prefix_length(tokens, messages, index, turn=index, add_generation_prompt=True)
            is_last = index + 1 == len(messages)
            end = len(tokens) if is_last else self._prefix_length(tokens, messages, index + 1, turn=index)
            end = self._without_trailing_space(tokens, start, end)
            learned[start:end] = [True] * (end - start)
        return Rendered(tokens, learned)

    def _prefix_length(
        self,
        tokens: Sequence[int],
        messages: Sequence[Message],
        count: int,
        *,
        turn: int,
        add_generation_prompt: bool = False,
    ) -> int:
        """Returns the number of tokens of the first messages, which must be a prefix of all tokens."""
        if count == 0:
            raise InvalidData(
                "the conversation begins with a turn of the assistant (message 0), whose tokens cannot be determined: "
                "begin with a system or user message, or pass a template with generation marks as chat_template="
            )
        part = self._tokens(messages[:count], add_generation_prompt=add_generation_prompt)
        if len(part) > len(tokens) or list(tokens[: len(part)]) != part:
            raise InvalidData(
                f"the tokens of message {turn}, a turn of the assistant, cannot be determined: the first {count} "
                "messages, rendered alone, are not a prefix of the whole conversation. Pass a template with generation "
                "marks ({% generation %}) as chat_template=, or create one datum per turn with turns='last'"
            )
        return len(part)

    def _without_trailing_space(self, tokens: Sequence[int], start: int, end: int) -> int:
        """Returns the end of a turn without the white space that the template adds after its last special token."""
        special = set(self._tokenizer.all_special_ids)
        last = next((index for index in range(end - 1, start - 1, -1) if tokens[index] in special), None)
        if last is None or self._tokenizer.decode(list(tokens[last + 1 : end])).strip():
            return end
        return last + 1

    def _tokens(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
        return list(self._apply(messages, add_generation_prompt=add_generation_prompt)["input_ids"])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=True, return_dict=True, **options, **self._settings
            )
        except self._template_errors as error:
            raise InvalidData(
                f"the chat template cannot render the first {len(messages)} messages ({type(error).__name__}: {error})"
            ) from error


def _is_assistant(message: Message) -> bool:
    return message["role"] == "assistant"
