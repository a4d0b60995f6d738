"""A conversation as tokens, and which of them the model has to learn.

Where a chat template marks what the assistant says (`{% generation %}`), its marks decide. Elsewhere a turn is what
rendering the conversation up to it and up to its end differ in; that is exact only if both are beginnings of the whole
conversation's tokens, so anything else is an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

from tinkex_py.errors import InvalidData, MissingExtra

Turns = Literal["all", "last"]
Message = Mapping[str, Any]

# What the library itself looks for.
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """Tokens of a conversation, and whether each belongs to what is to be learnt."""

    tokens: list[int]
    learnt: list[bool]


def checked_messages(messages: object) -> list[Message]:
    """The messages of a conversation, without fields that are None.

    Tables have every field in every row, and templates take None for a content.

    Raises:
        InvalidData: there are none, or one is no message, or nobody is the assistant.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidData(f"messages must be a sequence of messages, got a {type(messages).__name__}")
    if not messages:
        raise InvalidData("the conversation is empty: it needs at least one message of the assistant")
    checked: list[Message] = []
    for index, message in enumerate(cast("Sequence[object]", messages)):
        if not isinstance(message, Mapping):
            raise InvalidData(f"message {index} must map 'role' and 'content' to texts, got a {type(message).__name__}")
        fields = {name: value for name, value in cast("Message", message).items() if value is not None}
        if not isinstance(fields.get("role"), str):
            raise InvalidData(f"message {index} has no role (it has {sorted(fields)})")
        checked.append(fields)
    if not any(map(_is_assistants, checked)):
        roles = ", ".join(message["role"] for message in checked)
        raise InvalidData(f"no message has the role 'assistant', so there is nothing to learn; the roles are: {roles}")
    return checked


class ChatRenderer:
    """Renders conversations with one chat template.

    Args:
        tokenizer: a Hugging Face tokenizer, or one that has its `apply_chat_template`.
        chat_template: used instead of the tokenizer's own.
        tools: schemas or functions that the template may describe.
        options: variables of the template, such as `enable_thinking`.

    Raises:
        InvalidData: there is no chat template.
        MissingExtra: jinja2, which renders templates, is not installed.
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
        except ImportError:
            raise MissingExtra("jinja2", "huggingface") from None

        if not callable(getattr(tokenizer, "apply_chat_template", None)):
            raise InvalidData(
                f"a {type(tokenizer).__name__} knows no chat templates: give a Hugging Face one, or use text_datum"
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
        """The whole conversation, and what the assistant says in all its turns or in the last one.

        Args:
            messages: as `checked_messages` gives them.
            turns: which turns of the assistant are to be learnt.

        Raises:
            InvalidData: the template cannot render it, or a turn's tokens cannot be told from the others.
        """
        spoken = [index for index, message in enumerate(messages) if _is_assistants(message)]
        wanted = spoken if turns == "all" else spoken[-1:]
        # Only the fast tokenizers know which letters a token stands for.
        if _MARKER.search(self._settings["chat_template"]) and getattr(self._tokenizer, "is_fast", False):
            return self._by_markers(messages, spoken, wanted)
        return self._by_prefixes(messages, wanted)

    def _by_markers(self, messages: Sequence[Message], spoken: Sequence[int], wanted: Sequence[int]) -> Rendered:
        given = self._apply(
            messages, return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True}
        )
        tokens, learnt = list(given["input_ids"]), [bool(marked) for marked in given["assistant_masks"]]
        spans = [tuple(span) for span in given["offset_mapping"]]
        for place in range(1, len(learnt)):
            # A letter may be several tokens; the library marks only the first of them where it is a turn's last letter.
            if learnt[place - 1] and spans[place] == spans[place - 1]:
                learnt[place] = True
        runs = sum(marked for marked, _ in groupby(learnt))
        # A tokenizer that drops white space makes the library lose a mark, or take all that follows.
        if runs < len(spoken) or (learnt[-1] and not _is_assistants(messages[-1])):
            raise InvalidData(
                f"the conversation has {len(spoken)} turns of the assistant, but the marks of the chat template find "
                f"{runs}: an empty turn, or a template that does not mark every one; pass another with chat_template="
            )
        if len(wanted) < len(spoken):
            # Without the header that opens the turn: some templates put a part of the answer into it.
            before = self._prefix(tokens, messages, wanted[0], until="up to it", add_generation_prompt=False)
            learnt = [False] * before + learnt[before:]
        return Rendered(tokens, learnt)

    def _by_prefixes(self, messages: Sequence[Message], wanted: Sequence[int]) -> Rendered:
        tokens = self._tokens(messages)
        learnt = [False] * len(tokens)
        for index in wanted:
            start = self._prefix(tokens, messages, index, until="up to it", add_generation_prompt=True)
            is_last = index + 1 == len(messages)
            end = len(tokens) if is_last else self._prefix(tokens, messages, index + 1, until="with it", turn=index)
            end = self._without_space_behind_the_end(tokens, start, end)
            learnt[start:end] = [True] * (end - start)
        return Rendered(tokens, learnt)

    def _prefix(
        self,
        tokens: Sequence[int],
        messages: Sequence[Message],
        count: int,
        *,
        until: str,
        turn: int | None = None,
        add_generation_prompt: bool = False,
    ) -> int:
        """Number of tokens of the first messages, which must be those that the whole conversation begins with."""
        turn = count if turn is None else turn
        if count == 0:
            raise InvalidData(
                "the conversation begins with a turn of the assistant (message 0), which cannot be told from what the "
                "template puts before it: begin with a system or user message, or pass a template with generation marks"
            )
        part = self._tokens(messages[:count], add_generation_prompt=add_generation_prompt)
        if len(part) > len(tokens) or list(tokens[: len(part)]) != part:
            raise InvalidData(
                f"message {turn}, a turn of the assistant, cannot be told from the rest: the conversation {until}, "
                "rendered alone, is not how the whole conversation begins. Pass a template with generation marks "
                "({% generation %}) as chat_template=, or make one datum for each turn with turns='last'"
            )
        return len(part)

    def _without_space_behind_the_end(self, tokens: Sequence[int], start: int, end: int) -> int:
        """Where a turn ends; white space that the template puts behind its end mark is not the model's to say."""
        special = set(self._tokenizer.all_special_ids)
        last = next((place for place in range(end - 1, start - 1, -1) if tokens[place] in special), None)
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


def _is_assistants(message: Message) -> bool:
    return message["role"] == "assistant"
