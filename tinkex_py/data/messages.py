"""Messages of a conversation, and their parts: texts, thoughts and tool calls, each of which a template can drop."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from tinkex_py.data.rows import plain_messages, require_texts
from tinkex_py.errors import InvalidData

Message = Mapping[str, Any]

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "tool_plan")
_THOUGHT_START, _THOUGHT_END = "<think>", "</think>"

_Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Part:
    """A part of a message.

    Attributes:
        message: index of the message.
        name: for errors.
        kind: "item" is an item of the content that is no text, such as an image.
        text: the text, or that of the arguments of a tool call.
        paths: where the message has it; fields with the same thought are one part.
        edited: returns the value at a path with another text in place of the part.
    """

    message: int
    name: str
    kind: Literal["text", "thought", "item"]
    text: str
    paths: tuple[_Path, ...]
    edited: Callable[[Any, str], Any]


def checked_messages(messages: object) -> list[Message]:
    """Returns the messages of a conversation as plain values, without the nulls of tables: see `plain_messages`.

    Templates would render None as text.

    Raises:
        InvalidData: there are no messages, or one is invalid.
    """
    messages = plain_messages(messages)
    if not isinstance(messages, list):
        raise InvalidData(f"messages must be a sequence of messages, got a {type(messages).__name__}")
    if not messages:
        raise InvalidData("the conversation is empty: it needs at least one message of the assistant")
    return [_checked(index, message) for index, message in enumerate(cast("Sequence[object]", messages))]


def is_assistant(message: Message) -> bool:
    """Whether a message is a turn of the assistant."""
    return message["role"] == "assistant"


def parts_of(index: int, message: Message) -> list[Part]:
    """Returns the parts of a message that are not empty, or its empty content if there are none."""
    content = message.get("content", "")
    parts = [*_thoughts(index, message), *_tool_calls(index, message)]
    if isinstance(content, str):
        parts += _texts(index, "content", ("content",), content, has_thoughts=is_assistant(message))
    else:
        for position, item in enumerate(content):
            parts += _items(index, position, item)
    return parts or [Part(index, "content", "text", "", (("content",),), _replaced)]


def edited(message: Message, part: Part, text: str) -> Message:
    """Returns a message with another text in place of one of its parts."""
    for path in part.paths:
        message = _with(message, path, lambda value: part.edited(value, text))
    return message


def _checked(index: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidData(f"message {index} must map 'role' and 'content' to texts, got a {type(message).__name__}")
    fields = cast("Message", message)
    if not isinstance(fields.get("role"), str):
        raise InvalidData(f"message {index} has no 'role' (it has {sorted(map(str, fields))})")
    content = fields.get("content", "")
    if not isinstance(content, str) and not (_is_list(content) and all(map(_is_item, content))):
        raise InvalidData(
            f"the content of message {index} must be a str, or a list of parts such as "
            f"{{'type': 'text', 'text': ...}}, got {_described(content)}"
        )
    calls = fields.get("tool_calls", [])
    if not (_is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
        raise InvalidData(f"tool_calls of message {index} must be a list of mappings, got {_described(calls)}")
    require_texts(fields, f"message {index}: ")
    return fields


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _is_item(item: object) -> bool:
    if isinstance(item, Mapping):
        fields = cast("Mapping[str, object]", item)
        return isinstance(fields.get("text"), str) or fields.get("type") not in (None, "text")
    return isinstance(item, str)


def _described(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({type(item).__name__ for item in cast('list[object]', value)}))}"
    return f"a {type(value).__name__}"


def _texts(index: int, name: str, path: _Path, text: str, *, has_thoughts: bool) -> list[Part]:
    end = text.rfind(_THOUGHT_END) if has_thoughts else -1
    if end < 0:
        return [Part(index, name, "text", text, (path,), _replaced)] if text.strip() else []
    thought, answer = text[_thought_start(text) : end], text[end + len(_THOUGHT_END) :]
    parts = [
        Part(index, f"the thoughts ({_THOUGHT_START}) in {name}", "thought", thought, (path,), _replaced_thought),
        Part(index, f"{name} after the thoughts", "text", answer, (path,), _replaced_answer),
    ]
    return [part for part in parts if part.text.strip()]


def _items(index: int, position: int, item: Any) -> list[Part]:
    name = f"content[{position}]"
    if isinstance(item, str):
        return _texts(index, name, ("content", position), item, has_thoughts=False)
    if isinstance(item.get("text"), str):
        return _texts(index, name, ("content", position, "text"), item["text"], has_thoughts=False)

    def removed(items: Sequence[Any], _: str) -> list[Any]:
        return [*items[:position], *items[position + 1 :]]

    return [Part(index, f"{name} ({item['type']})", "item", "", (("content",),), removed)]


def _thoughts(index: int, message: Message) -> list[Part]:
    by_text: dict[str, list[str]] = {}
    for field in THOUGHT_FIELDS:
        thought = str(message.get(field) or "")
        if thought.strip():
            by_text.setdefault(thought, []).append(field)
    return [
        Part(index, " and ".join(fields), "thought", thought, tuple((field,) for field in fields), _replaced)
        for thought, fields in by_text.items()
    ]


def _tool_calls(index: int, message: Message) -> list[Part]:
    parts: list[Part] = []
    for position, call in enumerate(message.get("tool_calls", [])):
        is_nested = isinstance(call.get("function"), Mapping)
        function = call["function"] if is_nested else call
        path: _Path = ("tool_calls", position, "function") if is_nested else ("tool_calls", position)
        for field, edit in (("name", _replaced), ("arguments", _with_argument)):
            if function.get(field):
                name = f"tool_calls[{position}] ({field})"
                parts.append(Part(index, name, "text", str(function[field]), ((*path, field),), edit))
    return parts


def _replaced(_: Any, text: str) -> str:
    return text


def _thought_start(text: str) -> int:
    start = text.find(_THOUGHT_START)
    return start + len(_THOUGHT_START) if 0 <= start < text.rfind(_THOUGHT_END) else 0


def _replaced_thought(content: str, text: str) -> str:
    return content[: _thought_start(content)] + text + content[content.rfind(_THOUGHT_END) :]


def _replaced_answer(content: str, text: str) -> str:
    end = content.rfind(_THOUGHT_END) + len(_THOUGHT_END)
    answer = content[end:]
    return content[:end] + answer[: len(answer) - len(answer.lstrip())] + text


def _with_argument(arguments: Any, text: str) -> Any:
    if isinstance(arguments, Mapping):
        return {**cast("Message", arguments), text: text}
    try:
        given = json.loads(arguments)
    except (TypeError, ValueError):
        return text
    return json.dumps({**cast("Message", given), text: text}) if isinstance(given, dict) else text


def _with(value: Any, path: _Path, edit: Callable[[Any], Any]) -> Any:
    """Returns a value of mappings and lists with an edited value at a path."""
    if not path:
        return edit(value)
    first, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        fields = cast("Mapping[str | int, Any]", value)
        return {**fields, first: _with(fields.get(first, ""), rest, edit)}
    return [_with(item, rest, edit) if position == first else item for position, item in enumerate(value)]
