"""The parts of a model input as people have them: texts, token ids and images, as chunks."""

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np

from tinkex_py.arguments import check_count
from tinkex_py.errors import InvalidData
from tinkex_py.text import encode_pieces, encode_prompt, start_tokens
from tinkex_py.types.chunks import Chunk, DmelChunk, EncodedTextChunk, ImageAssetPointerChunk, ImageChunk
from tinkex_py.types.tensors import Array

ImageTokens = int | Callable[[bytes], int]
"""The number of tokens that a model makes of an image: of every one, or of that with these bytes."""


class Encoder(Protocol):
    """An object that encodes text as token ids, such as a Hugging Face tokenizer."""

    def encode(self, text: str, /) -> Sequence[int]:
        """Returns the token ids of a text."""
        ...


class Tokenizer(Protocol):
    """A tokenizer, as returned by `get_tokenizer`: encodes text as token ids and decodes them."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        ...

    def encode(self, text: str, /) -> list[int]:
        """Returns the token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], /) -> str:
        """Returns the text of token ids."""
        ...


def chunks_of_parts(
    parts: Sequence[object], tokenizer: Encoder | None, image_tokens: ImageTokens | None
) -> tuple[Chunk, ...]:
    """Returns the chunks of `ModelInput.from_parts`; raises like it."""
    count = check_count("image_tokens", image_tokens, least=1) if _is_number(image_tokens) else image_tokens
    if count is not None and not isinstance(count, int) and not callable(count):
        raise InvalidData(f"image_tokens must be a number or a function, got a {type(count).__name__}")
    chunks: list[Chunk] = []
    for index, part in enumerate(parts):
        try:
            chunks += _chunks_of(part, tokenizer, count, is_first=not chunks)
        except InvalidData as error:
            raise InvalidData(f"parts[{index}]: {error}") from None
    return tuple(chunks)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number)


def _chunks_of(part: object, tokenizer: Encoder | None, count: ImageTokens | None, *, is_first: bool) -> list[Chunk]:
    if isinstance(part, EncodedTextChunk | ImageChunk | ImageAssetPointerChunk | DmelChunk):
        return [part]
    if isinstance(part, str):
        if tokenizer is None:
            raise InvalidData("a text needs tokenizer=, for example await training.get_tokenizer()")
        tokens = encode_prompt(tokenizer, part) if is_first else encode_pieces(tokenizer, [part])[0]
        return [EncodedTextChunk(tokens=tokens)] if tokens else []
    if isinstance(part, np.ndarray) or (isinstance(part, Sequence) and not isinstance(part, bytes | bytearray)):
        return [EncodedTextChunk(tokens=cast("Array", part))]
    image = ImageChunk.of(part)
    if count is not None:
        image = ImageChunk.of(part, expected_tokens=count if isinstance(count, int) else count(image.data))
    start = start_tokens(tokenizer) if is_first and tokenizer is not None else []
    return [EncodedTextChunk(tokens=start), image] if start else [image]
