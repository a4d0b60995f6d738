"""Renders conversations to tokens with the model's chat template, and marks the tokens that the model learns.

A turn begins where the prompt that sampling sends ends, and ends with its end-of-turn tokens. If the template marks the
text of the assistant (`{% generation %}`), its marks decide, without what the prompt has; otherwise both ends are found
by rendering parts of the conversation. Every part of a message must count in the rendered text, and a turn that cannot
be determined exactly is an error.
"""

import re
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

from tinkex_py.arguments import check_choice, check_list, check_options, check_text
from tinkex_py.data.messages import Message, Part, checked_messages, edited, is_assistant, parts_of
from tinkex_py.errors import InvalidData, MissingExtra
from tinkex_py.text import decode, encode_pieces

Turns = Literal["all", "last"]

# The pattern of transformers.
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """Tokens of a conversation, and whether the model learns each."""

    tokens: list[int]
    learned: list[bool]


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return callable(getattr(tokenizer, "apply_chat_template", None)) and bool(getattr(tokenizer, "chat_template", None))


class ChatRenderer:
    """Renders conversations with one chat template.

    Args:
        tokenizer: a Hugging Face tokenizer, or one with its `apply_chat_template`.
        chat_template: replaces that of the tokenizer.
        tools: schemas or functions that the template may describe.
        template_options: variables of the template, such as `{"enable_thinking": False}`.

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
        template_options: Mapping[str, Any] | None = None,
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
        if tools is not None:
            check_list("tools", tools, object)
        options = {} if template_options is None else check_options("template_options", template_options)
        if chat_template is not None:
            check_text("chat_template", chat_template)
        if chat_template is None and not has_chat_template(tokenizer):
            raise InvalidData("the tokenizer has no chat template: pass chat_template=, or use text_datum")
        try:
            template = tokenizer.get_chat_template(chat_template, tools)
        except ValueError as error:  # several templates, and none is the default
            raise InvalidData(f"{error}: pass the name or the text of a template as chat_template=") from error
        self._tokenizer = tokenizer
        self._settings: dict[str, Any] = {
            **options,
            "tools": None if tools is None else list(tools),
            "chat_template": template,
        }
        self._template_errors = (TemplateError, TypeError, ValueError, LookupError, AttributeError)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens after which the model answers: the messages and the generation prompt of the template.

        Raises:
            InvalidData: a message is invalid, the template fails, or drops a part of a message.
        """
        checked = checked_messages(messages)
        self._check_parts(checked, self._text(checked), [])
        return encode_pieces(self._tokenizer, [self._text(checked, add_generation_prompt=True)])[0]

    def render(self, messages: Sequence[Message], turns: Turns) -> Rendered:
        """Renders the whole conversation; the model learns all turns of the assistant, or the last one.

        Warns if the template drops thoughts of turns that are not learned.

        Args:
            messages: the conversation.
            turns: "all" or "last".

        Raises:
            InvalidData: a message is invalid, none has the role "assistant", the template fails or drops a part of a
                message, or the tokens of a turn cannot be determined.
        """
        check_choice("turns", turns, get_args(Turns))
        checked = checked_messages(messages)
        of_assistant = [index for index, message in enumerate(checked) if is_assistant(message)]
        if not of_assistant:
            roles = ", ".join(message["role"] for message in checked)
            raise InvalidData(
                f"no message has the role 'assistant', so there is nothing to learn: add an answer; the roles are: "
                f"{roles}"
            )
        wanted = of_assistant if turns == "all" else of_assistant[-1:]
        text = self._text(checked)
        self._check_parts(checked, text, wanted)
        # Only fast tokenizers map characters to tokens.
        if _MARKER.search(self._settings["chat_template"]) and getattr(self._tokenizer, "is_fast", False):
            return self._by_markers(checked, text, of_assistant, wanted)
        return self._by_prompts(checked, text, wanted)

    def _by_markers(
        self, messages: Sequence[Message], text: str, of_assistant: Sequence[int], wanted: Sequence[int]
    ) -> Rendered:
        given = self._apply(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        tokens, learned = list(given["input_ids"]), [bool(marked) for marked in given["assistant_masks"]]
        spans = [tuple(span) for span in given["offset_mapping"]]
        for index in range(1, len(learned)):
            # If the last character of a turn is several tokens, transformers marks only the first of them.
            if learned[index - 1] and spans[index] == spans[index - 1]:
                learned[index] = True
        runs = sum(marked for marked, _ in groupby(learned))
        # With a tokenizer that drops white space, transformers loses a mark or extends it to the end.
        if runs < len(of_assistant) or (learned[-1] and not is_assistant(messages[-1])):
            raise InvalidData(
                f"the conversation has {len(of_assistant)} turns of the assistant, but the marks of the chat template "
                f"find {runs}: remove empty turns, or pass a template that marks every turn as chat_template="
            )
        if len(wanted) < len(of_assistant):
            learned = _only_after(self._begin_of_parts(messages, text, wanted[0]), spans, learned)
        self._unmark_prompts(messages, text, wanted, spans, learned)
        return Rendered(tokens, learned)

    def _unmark_prompts(
        self,
        messages: Sequence[Message],
        text: str,
        wanted: Sequence[int],
        spans: Sequence[tuple[int, int]],
        learned: list[bool],
    ) -> None:
        """Removes marks from headers that the prompt of sampling has: some templates mark them too."""
        for turn in wanted:
            if turn == 0 or is_assistant(messages[turn - 1]):
                continue
            try:
                start = self._start(messages, text, turn, wanted)
            except InvalidData:
                continue  # the marks alone decide
            index = bisect_right(spans, start, key=lambda span: span[1]) - 1
            while index >= 0 and learned[index]:
                learned[index] = False
                index -= 1

    def _by_prompts(self, messages: Sequence[Message], text: str, wanted: Sequence[int]) -> Rendered:
        pieces, done = list[str](), 0
        for index in wanted:
            start = self._start(messages, text, index, wanted)
            end = self._end(messages, text, index, start, wanted)
            pieces += [text[done:start], text[start:end]]
            done = end
        encoded = encode_pieces(self._tokenizer, [*pieces, text[done:]])
        rendered = Rendered([], [])
        for number, tokens in enumerate(encoded):
            count = self._count_without_trailing_space(tokens) if number % 2 else 0
            rendered.tokens.extend(tokens)
            rendered.learned.extend([True] * count + [False] * (len(tokens) - count))
        return rendered

    def _start(self, messages: Sequence[Message], text: str, turn: int, wanted: Sequence[int]) -> int:
        """Returns where the answer of a turn begins: behind the prompt that sampling sends.

        A prompt may open what the conversation does not have, such as thoughts; then it is where the message begins.
        """
        if turn == 0:
            raise InvalidData(
                "the conversation begins with a turn of the assistant (message 0), whose tokens cannot be determined: "
                "begin with a system or user message, or pass a template with generation marks as chat_template="
            )
        prompt = self._text(messages[:turn], add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        before, begin = self._text(messages[:turn]), self._begin_of_parts(messages, text, turn)
        if begin < len(before) or not text.startswith(before):
            raise _undetermined(messages, turn, wanted)
        return begin

    def _end(self, messages: Sequence[Message], text: str, turn: int, start: int, wanted: Sequence[int]) -> int:
        """Returns where a turn ends: its end-of-turn tokens included, and white space behind them."""
        if turn + 1 == len(messages):
            return len(text)
        part = self._text(messages[: turn + 1])
        if start < len(part) and text.startswith(part):
            return len(part)
        # Some templates end the whole text with one more token.
        special = re.compile("|".join(map(re.escape, self._special_tokens())) or r"(?!)")
        ends = [match.end() for match in special.finditer(text, start, _common_length(text, part))]
        if not ends or special.sub("", part[ends[-1] :]).strip():
            raise _undetermined(messages, turn, wanted)
        return ends[-1]

    def _begin_of_parts(self, messages: Sequence[Message], text: str, turn: int) -> int:
        """Returns where the first part of a message begins, found by changing the first letters of all of them."""
        message, parts = messages[turn], parts_of(turn, messages[turn])
        if not any(part.paths[0][0] == "content" for part in parts):
            # The frame of a tool call belongs to it.
            message = {name: value for name, value in message.items() if name != "tool_calls"}
            parts = [part for part in parts if part.kind == "thought"] or parts_of(turn, message)
        for part in parts:
            message = edited(message, part, _other_text(part))
        return _common_length(text, self._text([*messages[:turn], message, *messages[turn + 1 :]]))

    def _check_parts(self, messages: Sequence[Message], text: str, wanted: Sequence[int]) -> None:
        """Raises InvalidData if the rendered text lacks a part of a message; warns of thoughts that are not learned."""
        for index, message in enumerate(messages):
            content: object = message.get("content")
            if not isinstance(content, str) and str(content) in text:
                raise InvalidData(
                    f"the chat template renders the parts of message {index} as a Python list: write its content as a "
                    "str"
                )
        dropped = self._dropped(messages, text)
        for part in dropped:
            if part.kind != "thought" or part.message in wanted:
                raise _is_dropped(messages[part.message], part, dropped, wanted)
        if dropped:
            warnings.warn(
                "the chat template drops thoughts of turns that are not learned: the datum does not contain them",
                UserWarning,
                stacklevel=4,
            )

    def _dropped(self, messages: Sequence[Message], text: str) -> list[Part]:
        """Returns the parts without which the rendered text is the same: changing them does not change it."""
        parts = [part for index, message in enumerate(messages) for part in parts_of(index, message)]
        marks = {part: f"part{number}of{len(parts)}" for number, part in enumerate(parts) if part.kind != "item"}
        # One render with all texts replaced shows nearly all of them; only the others are changed again.
        marked = self._text_or_none(_edited_all(messages, marks.items()))
        doubtful = [part for part in parts if marked is None or part not in marks or marks[part] not in marked]

        def is_unchanged(changed: Sequence[Part]) -> bool:
            other = self._text_or_none(_edited_all(messages, [(part, _other_text(part)) for part in changed]))
            return other is not None and other.strip() == text.strip()

        if not doubtful or is_unchanged(doubtful):
            return doubtful
        return [part for part in doubtful if is_unchanged([part])]

    def _count_without_trailing_space(self, tokens: Sequence[int]) -> int:
        """Returns the number of tokens without the white space that the template adds after its last special token."""
        special = self._special_tokens().values()
        last = next((index for index in range(len(tokens) - 1, -1, -1) if tokens[index] in special), None)
        if last is None or decode(self._tokenizer, tokens[last + 1 :]).strip():
            return len(tokens)
        return last + 1

    def _special_tokens(self) -> dict[str, int]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {
            **dict(zip(self._tokenizer.all_special_tokens, self._tokenizer.all_special_ids, strict=True)),
            **{str(token): number for number, token in added.items() if token.special},
        }

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _text_or_none(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._text(messages)
        except InvalidData:
            return None

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], **options, **self._settings
            )
        except self._template_errors as error:
            raise InvalidData(
                f"the chat template cannot render the first {len(messages)} messages ({type(error).__name__}: {error})"
                f"{_hint(str(error))}"
            ) from error


def _edited_all(messages: Sequence[Message], texts: Iterable[tuple[Part, str]]) -> list[Message]:
    changed = list(messages)
    for part, text in texts:
        changed[part.message] = edited(changed[part.message], part, text)
    return changed


def _common_length(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _other_text(part: Part) -> str:
    """Returns a text whose first letter differs."""
    return next(letter for letter in "xy" if not part.text.strip().lower().startswith(letter))


def _only_after(begin: int, spans: Sequence[tuple[int, int]], learned: Sequence[bool]) -> list[bool]:
    """Returns the marks without those that end before a position of the text."""
    kept: list[bool] = []
    for marked, run in groupby(zip(learned, spans, strict=True), key=lambda token: token[0]):
        ends = [end for _, (_, end) in run]
        kept += [marked and ends[-1] > begin] * len(ends)
    return kept


def _hint(error: str) -> str:
    hints = {
        "'str object' has no attribute": "write the content as a list of parts, [{'type': 'text', 'text': ...}]",
        "no attribute 'content'": "write the content '' where a message has only tool calls",
        '(not "list")': "write the content as a str",
        '(not "dict")': "write the arguments of tool calls as JSON text",
    }
    return next((f": {hint}" for part, hint in hints.items() if part in error), "")


def _is_dropped(message: Message, part: Part, dropped: Sequence[Part], wanted: Sequence[int]) -> InvalidData:
    of_message = [other for other in dropped if other.message == part.message]
    is_whole = len(of_message) == len(parts_of(part.message, message))
    names = ", ".join(other.name for other in of_message)
    if part.kind == "thought":
        way_out = "Remove the thoughts"
        if part.message != wanted[-1]:
            way_out = "Create one datum per turn with turns='last', or remove the thoughts"
    elif part.paths[0][0] == "tool_calls":
        way_out = "Write the call into the content as the model is trained to say it"
    else:
        form = "a list of parts" if isinstance(message.get("content"), str) else "a str"
        way_out = f"Write the content as {form} if the template expects that, or use a role that it knows"
    return InvalidData(
        f"the chat template drops {names if not is_whole else f'all ({names})'} of message {part.message} (role "
        f"{message['role']!r}): the rendered text does not change with it. {way_out}, or pass a template that renders "
        "it as chat_template="
    )


def _undetermined(messages: Sequence[Message], turn: int, wanted: Sequence[int]) -> InvalidData:
    if turn != wanted[-1]:
        way_out = "Create one datum per turn, with turns='last' and without the messages after the turn"
    elif turn + 1 < len(messages):
        way_out = "Remove the messages after it"
    else:
        way_out = "Pass template_options= with which the template renders the first messages alike"
    return InvalidData(
        f"the tokens of message {turn}, a turn of the assistant, cannot be determined: the template renders the first "
        "messages of the conversation differently without those that follow, as sampling sends them. "
        f"{way_out}, or pass a template with generation marks ({{% generation %}}) as chat_template="
    )
