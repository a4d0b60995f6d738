"""What the model reads: a sequence of chunks, today of text tokens."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Protocol, cast

import numpy as np
from pydantic import field_serializer, field_validator

from tinkex_py.errors import InvalidData
from tinkex_py.types.base import WireModel
from tinkex_py.types.tensors import Array, without_torch


class Encoder(Protocol):
    """Anything that turns text into token ids, such as a Hugging Face tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text."""
        ...


class Tokenizer(Protocol):
    """What `get_tokenizer` gives: text to token ids and back."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        ...

    def encode(self, text: str, /) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], /) -> str:
        """Text of token ids."""
        ...


class EncodedTextChunk(WireModel):
    """Text as token ids.

    Args:
        tokens: ids, each in `[0, 2**31)`; kept as one read-only int32 buffer.
    """

    type: Literal["encoded_text"] = "encoded_text"
    tokens: Array

    def __init__(self, *, tokens: Sequence[int] | Array, type: Literal["encoded_text"] = "encoded_text") -> None:  # noqa: A002
        super().__init__(tokens=tokens, type=type)

    @field_validator("tokens", mode="before")
    @classmethod
    def _pack(cls, tokens: Any) -> Array:
        array = np.asarray(without_torch(tokens))
        if array.ndim != 1:
            raise InvalidData(f"tokens must be one flat sequence, got shape {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise InvalidData(f"tokens must be integers, got dtype {array.dtype}")
        wrong = array[(array < 0) | (array >= 2**31)] if array.size else array
        if wrong.size:
            raise InvalidData(f"token ids must lie in [0, 2**31), got {wrong[0]}")
        packed = np.array(array, dtype="<i4", order="C", copy=True)
        packed.flags.writeable = False
        return packed

    @field_serializer("tokens")
    def _serialize_tokens(self, tokens: Array) -> list[int]:
        return cast("list[int]", tokens.tolist())

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.tokens.size)

    def __eq__(self, other: object) -> bool:
        """Equal tokens."""
        return isinstance(other, EncodedTextChunk) and np.array_equal(self.tokens, other.tokens)

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(self.tokens.tobytes())

    def __repr__(self) -> str:
        """The length only: the tokens are a user's text."""
        return f"EncodedTextChunk(length={self.length})"

    __str__ = __repr__


class ModelInput(WireModel):
    """The chunks the model reads, in order."""

    chunks: tuple[EncodedTextChunk, ...] = ()

    @classmethod
    def empty(cls) -> "ModelInput":
        """No chunks yet; see `append`."""
        return cls()

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | Array) -> "ModelInput":
        """One text chunk from token ids."""
        return cls(chunks=(EncodedTextChunk(tokens=tokens),))

    @classmethod
    def from_text(cls, text: str, tokenizer: Encoder) -> "ModelInput":
        """One text chunk; `tokenizer` is any object with `encode`, for one `await training.get_tokenizer()`."""
        # A str has an `encode` too, and a model's name is what is easily given instead of its tokenizer.
        if isinstance(tokenizer, str) or not callable(getattr(tokenizer, "encode", None)):
            raise InvalidData(f"tokenizer must have an encode method for texts, got a {type(tokenizer).__name__}")
        return cls.from_ints(list(tokenizer.encode(text)))

    def append(self, chunk: EncodedTextChunk) -> "ModelInput":
        """A new input with one more chunk at the end."""
        return ModelInput(chunks=(*self.chunks, chunk))

    def append_int(self, token: int) -> "ModelInput":
        """A new input with one more token at the end."""
        return self.append(EncodedTextChunk(tokens=[token]))

    @cached_property
    def length(self) -> int:
        """Number of tokens over all chunks."""
        return sum(chunk.length for chunk in self.chunks)

    def to_ints(self) -> list[int]:
        """All token ids in order."""
        return [token for chunk in self.chunks for token in cast("list[int]", chunk.tokens.tolist())]
