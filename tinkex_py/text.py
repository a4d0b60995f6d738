"""Text as tokens: the one place where prompts and answers are encoded.

A prompt begins with the tokens that the tokenizer itself puts before a text (such as a BOS token), exactly once: not
again where the text already begins with them, as a rendered chat may. Nothing else adds special tokens. An answer
continues its prompt: its tokens are those that follow the prompt's tokens in the whole text.
"""

import inspect
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

from tinkex_py.errors import InvalidData
from tinkex_py.unicode import half_at

# Texts whose tokens are expected to stay the same whatever follows them, so that an answer can be encoded as the
# middle of a text: some tokenizers put a space before every text.
_ANCHORS = ("\n", ".", "a", "0")


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text that a model continues.

    Args:
        tokenizer: an object with `encode(text)`, such as a Hugging Face tokenizer.
        text: the text; the start tokens of the tokenizer come before it, unless it begins with them.

    Raises:
        InvalidData: `tokenizer` cannot encode, or `text` is not a text that can be encoded.
    """
    require_encoder(tokenizer)
    require_text("text", text)
    tokens, start = _plain(tokenizer, text), start_tokens(tokenizer)
    return tokens if tokens[: len(start)] == start else [*start, *tokens]


def encode_answer(tokenizer: Any, prompt: str, answer: str, *, append_end: bool = False) -> tuple[list[int], list[int]]:
    """Returns the tokens of a prompt, as `encode_prompt` gives them, and those of the answer that continues it.

    The answer's tokens are the rest of the whole text's tokens where these begin with the prompt's. Where a token
    spans the boundary, the answer is encoded on its own, without start tokens and without the space that some
    tokenizers put before a text.

    Args:
        tokenizer: as in `encode_prompt`; with `decode(tokens)`, the result is compared with the whole text.
        prompt: text before the answer; may be empty.
        answer: text that follows, without a separator.
        append_end: add the EOS token to the answer.

    Raises:
        InvalidData: the tokenizer cannot encode the two apart: the decoded tokens are not the text. Or it has no EOS
            token.
    """
    before, whole = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, prompt + answer)
    learned = _continued(tokenizer, before, whole, answer)
    if append_end:
        end = getattr(tokenizer, "eos_token_id", None)
        if end is None:
            raise InvalidData("the tokenizer has no EOS token: pass append_end=False")
        learned = [*learned, int(end)]
    return before, learned


def encode_pieces(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of the consecutive pieces of a rendered text, which has all its special tokens already.

    They are those of the whole text. Where a token spans a boundary, the piece behind it is encoded as in
    `encode_answer`.

    Raises:
        InvalidData: as in `encode_answer`.
    """
    apart = [_plain(tokenizer, piece) for piece in pieces]
    if list(chain.from_iterable(apart)) == _plain(tokenizer, "".join(pieces)):
        return apart
    encoded: list[list[int]] = []
    for count, piece in enumerate(pieces, start=1):
        whole = _plain(tokenizer, "".join(pieces[:count]))
        encoded.append(_continued(tokenizer, list(chain.from_iterable(encoded)), whole, piece))
    return encoded


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Returns the text of tokens, special tokens and all spaces included."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(tokens), **_accepted(tokenizer.decode, options)))


def start_tokens(tokenizer: Any) -> list[int]:
    """Returns the tokens that a tokenizer puts before every text: a BOS token for Llama, none for GPT-2."""
    if _accepted(tokenizer.encode, {"add_special_tokens": True}):
        full, plain = _ids(tokenizer.encode("a")), _plain(tokenizer, "a")
        before = next((n for n in range(len(full) - len(plain) + 1) if full[n : n + len(plain)] == plain), 0)
        return full[:before]
    start = getattr(tokenizer, "bos_token_id", None)
    return [start] if start is not None and _ids(tokenizer.encode(""))[:1] == [start] else []


def require_encoder(tokenizer: object) -> None:
    """Checks that an object can encode text.

    Raises:
        InvalidData: it has no `encode`, or is the name of a model.
    """
    # A str has an `encode` too, and a model's name is easily passed instead of its tokenizer.
    if isinstance(tokenizer, str | bytes) or not callable(getattr(tokenizer, "encode", None)):
        raise InvalidData(
            f"tokenizer must be an object with encode(text), got a {type(tokenizer).__name__}: pass a tokenizer, for "
            "example await training.get_tokenizer()"
        )


def require_text(name: str, text: object) -> None:
    """Checks that a value is a text of whole characters.

    Raises:
        InvalidData: it is not a str, or contains half of a surrogate pair, which no encoding has.
    """
    if not isinstance(text, str):
        raise InvalidData(f"{name} must be a str, got a {type(text).__name__}")
    position = half_at(text)
    if position is not None:
        raise InvalidData(
            f"{name} contains half a character ({text[position]!r}, a lone surrogate) at position {position}, "
            "which cannot be encoded: repair it, for example with text.encode('utf-16', 'surrogatepass')"
            ".decode('utf-16', 'replace')"
        )


def _continued(tokenizer: Any, before: list[int], whole: list[int], answer: str) -> list[int]:
    if whole[: len(before)] == before:
        return whole[len(before) :]
    if not callable(getattr(tokenizer, "decode", None)):
        return _plain(tokenizer, answer)
    wanted = decode(tokenizer, whole)
    for continued in _continuations(tokenizer, answer):
        if decode(tokenizer, [*before, *continued]) == wanted:
            return continued
    raise InvalidData(
        "the tokenizer cannot encode the prompt and the answer apart: their tokens, decoded, are not the whole text. "
        "Move the boundary to a space or a line break"
    )


def _continuations(tokenizer: Any, answer: str) -> list[list[int]]:
    anchored = [(_plain(tokenizer, anchor), _plain(tokenizer, anchor + answer)) for anchor in _ANCHORS]
    inside = [whole[len(anchor) :] for anchor, whole in anchored if whole[: len(anchor)] == anchor]
    return [*inside, _plain(tokenizer, answer)]


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Tokens without those that the tokenizer adds around a text."""
    options = _accepted(tokenizer.encode, {"add_special_tokens": False})
    tokens = _ids(tokenizer.encode(text, **options))
    if options:
        return tokens
    start, end = start_tokens(tokenizer), getattr(tokenizer, "eos_token_id", None)
    tokens = tokens[len(start) :] if tokens[: len(start)] == start else tokens
    ends_texts = end is not None and _ids(tokenizer.encode(""))[-1:] == [end]
    return tokens[:-1] if ends_texts and tokens[-1:] == [end] else tokens


def _ids(encoded: Any) -> list[int]:
    # The `tokenizers` library returns an object that has them.
    return [int(token) for token in getattr(encoded, "ids", encoded)]


def _accepted(function: Any, options: dict[str, bool]) -> dict[str, bool]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in options.items() if name in cast("Any", parameters)}
