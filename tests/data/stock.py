"""What a datum teaches with every stock chat template: the table in `docs/reference/chat_templates.md`.

`python -m tests.data.stock` writes the table, `test_stock_templates.py` checks it.
"""

import html
import re
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.data.chat_tokenizers import byte_tokenizer, learned_text, said
from tinkex_py.data import chat_datum
from tinkex_py.errors import InvalidData

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "chat_templates.md"
ARCHIVE = Path(__file__).parent / "stock_templates" / "templates.tar.xz"
ANSWER, THOUGHT = "It scatters.", "Rayleigh?"
FUNCTION = {"name": "get_color", "arguments": {"of": "sky"}}
HEADINGS = ("template", "content", "before the answer", "after the answer", "several turns", "thoughts", "tool calls")

_MARK = re.compile(r"<\|?[\w/▁｜]+\|?>|\[/?[A-Z_]+\]")  # noqa: RUF001  (DeepSeek's)


class Row(NamedTuple):
    """What a template does. `before` and `after` are learned around the answer; errors begin with "error"."""

    name: str
    content: str
    before: str
    after: str
    turns: str
    thoughts: str
    calls: str

    def line(self) -> str:
        """The row in Markdown."""
        code = [_code(cell) if cell else "" for cell in (self.before, self.after)]
        return f"| {' | '.join([f'`{self.name}`', self.content, *code, self.turns, self.thoughts, self.calls])} |"


def _code(text: str) -> str:
    shown = html.escape(text.replace("\n", "\\n"), quote=False).replace("|", "&#124;")
    return f"<code>{shown}</code>"


@cache
def templates() -> Mapping[str, str]:
    """The templates by name."""
    with tarfile.open(ARCHIVE) as archive:
        files = {Path(member.name).stem: archive.extractfile(member) for member in archive.getmembers()}
        return {name: file.read().decode() for name, file in files.items() if file is not None}


@cache
def tokenizer_of(name: str) -> Any:
    """A byte tokenizer with the template, and everything in it that looks like a special token."""
    template = templates()[name]
    return byte_tokenizer(template, special=tuple(sorted(set(_MARK.findall(template)))))


def exchange(form: str, **fields: Any) -> list[dict[str, Any]]:
    """A question and an answer, in the form that a template expects."""

    def written(text: str) -> Any:
        return text if form == "text" else [{"type": "text", "text": text}]

    return [said("user", written("Why is the sky blue?")), said("assistant", written(ANSWER)) | fields]


def form_of(name: str) -> str:
    """Returns "text", or "parts" if the template drops contents that are texts, or fails with them."""
    try:
        chat_datum(tokenizer_of(name), exchange("text"))
    except InvalidData as error:
        if "list of parts" in str(error):
            return "parts"
        raise
    return "text"


def row_of(name: str) -> Row:
    """Converts conversations with a template, and returns what it does."""
    tokenizer, content = tokenizer_of(name), form_of(name)
    one = exchange(content)
    (learned,) = learned_text(tokenizer, chat_datum(tokenizer, one))
    before, after = learned.split(ANSWER)

    def outcome(messages: list[dict[str, Any]], shown: str) -> str:
        try:
            texts = learned_text(tokenizer, chat_datum(tokenizer, messages))
        except InvalidData as error:
            return "refused" if "drops" in str(error) else "one datum per turn" if "last" in str(error) else "error"
        assert all(shown in text for text in texts)
        return "yes"

    call = {"content": "" if content == "text" else [], "tool_calls": [{"type": "function", "function": FUNCTION}]}
    return Row(
        name,
        content,
        before,
        after,
        outcome([*one, *one], ANSWER),
        outcome(exchange(content, reasoning_content=THOUGHT), THOUGHT),
        outcome(exchange(content, **call), str(FUNCTION["name"])),
    )


def table() -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{' --- |' * len(HEADINGS)}"]
    return "\n".join([*lines, *(row_of(name).line() for name in templates())])


def table_of_page() -> str:
    """The table that the page has."""
    return "\n".join(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|"))


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(table_of_page(), table()), encoding="utf-8")
