"""Training examples, and the model input: a sequence of chunks of text tokens."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol, cast

import numpy as np
from pydantic import field_serializer, field_validator

from tinkex_py.arguments import check_flag
from tinkex_py.errors import InvalidData
from tinkex_py.text import encode_answer, encode_prompt, require_text
from tinkex_py.types.base import WireModel
from tinkex_py.types.tensors import Array, TensorData, TensorInput, without_torch


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


class EncodedTextChunk(WireModel):
    """Text as token ids.

    Args:
        tokens: ids, each in `[0, 2**31)`; stored as one read-only int32 buffer.
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
            raise InvalidData(f"tokens must be a flat sequence, got shape {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise InvalidData(f"tokens must be integers, got dtype {array.dtype}")
        wrong = array[(array < 0) | (array >= 2**31)] if array.size else array
        if wrong.size:
            raise InvalidData(f"token ids must be in [0, 2**31), got {wrong[0]}")
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
        """Whether the tokens are equal."""
        return isinstance(other, EncodedTextChunk) and np.array_equal(self.tokens, other.tokens)

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(self.tokens.tobytes())

    def __repr__(self) -> str:
        """Shows the length only, because the tokens are a user's text."""
        return f"EncodedTextChunk(length={self.length})"

    __str__ = __repr__


class ModelInput(WireModel):
    """The chunks that the model reads, in order."""

    chunks: tuple[EncodedTextChunk, ...] = ()

    @classmethod
    def empty(cls) -> "ModelInput":
        """Returns an input without chunks; see `append`."""
        return cls()

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | Array) -> "ModelInput":
        """Returns an input of one text chunk, from token ids."""
        return cls(chunks=(EncodedTextChunk(tokens=tokens),))

    @classmethod
    def from_text(cls, text: str, tokenizer: Encoder) -> "ModelInput":
        """Returns an input of one text chunk, from text.

        The tokens that the tokenizer itself puts before a text (such as a BOS token) come first, exactly once; tokens
        that it adds at the end are left out, because the model continues the text.

        Args:
            text: the text.
            tokenizer: any object with `encode`, for example `await training.get_tokenizer()`.

        Raises:
            InvalidData: the tokenizer cannot encode, or the text contains half a character.
        """
        return cls.from_ints(encode_prompt(tokenizer, text))

    def append(self, chunk: EncodedTextChunk) -> "ModelInput":
        """Returns a new input with one more chunk at the end."""
        return ModelInput(chunks=(*self.chunks, chunk))

    def append_int(self, token: int) -> "ModelInput":
        """Returns a new input with one more token at the end."""
        return self.append(EncodedTextChunk(tokens=[token]))

    @cached_property
    def length(self) -> int:
        """Number of tokens in all chunks."""
        return sum(chunk.length for chunk in self.chunks)

    def to_ints(self) -> list[int]:
        """Returns all token ids in order."""
        return [token for chunk in self.chunks for token in cast("list[int]", chunk.tokens.tolist())]


class Datum(WireModel):
    """One training example: the input of the model and the inputs of the loss.

    Position `i` of every loss input belongs to the prediction at input position `i`: for a token sequence `s`,
    `model_input` contains `s[:-1]` and `target_tokens` contains `s[1:]`.

    Args:
        model_input: `N` tokens.
        loss_fn_inputs: name -> values, as lists, numpy arrays, torch tensors or TensorData, with one entry
            per position: `[N]`, or `[N, K]` for `K` candidate targets.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, TensorData]

    def __init__(self, *, model_input: ModelInput, loss_fn_inputs: Mapping[str, TensorInput]) -> None:
        super().__init__(model_input=model_input, loss_fn_inputs=loss_fn_inputs)

    @field_validator("loss_fn_inputs", mode="before")
    @classmethod
    def _pack(cls, inputs: Any) -> dict[str, TensorData]:
        if not isinstance(inputs, Mapping):
            raise InvalidData(f"loss_fn_inputs must map names to tensors, got a {type(inputs).__name__}")
        packed: dict[str, TensorData] = {}
        for name, value in cast("Mapping[object, Any]", inputs).items():
            if not isinstance(name, str) or not name.isprintable():
                raise InvalidData(f"the names of loss_fn_inputs must be printable strings, got {name!r}")
            try:
                packed[name] = TensorData.of(value, name=name)
            except InvalidData as error:
                raise InvalidData(f"loss_fn_inputs[{name!r}]: {error}") from None
        return packed

    @classmethod
    def from_tokens(cls, prompt: Sequence[int] | Array, completion: Sequence[int] | Array) -> "Datum":
        """Returns a datum that learns a completion: `weights` is 1 for the tokens of the completion, 0 for others.

        The tokens are shifted: of `N + 1` tokens, the first `N` are the input and the last `N` the targets.

        Args:
            prompt: token ids that are not learned; may be empty.
            completion: token ids that follow.

        Raises:
            InvalidData: no token is to be learned; the first token of all has no prediction.
        """
        before, learned = _tokens("prompt", prompt), _tokens("completion", completion)
        if before.size + learned.size < 2 or not learned.size:
            raise InvalidData(
                f"there is nothing to learn in {before.size} tokens of the prompt and {learned.size} of the "
                "completion: pass a completion, and a token before it"
            )
        tokens = np.concatenate([before, learned])
        weights = (np.arange(1, tokens.size) >= before.size).astype(np.float32)
        return cls(
            model_input=ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:].astype(np.int64), "weights": weights},
        )

    @classmethod
    def from_text(cls, tokenizer: Encoder, prompt: str, completion: str, *, append_end: bool = True) -> "Datum":
        """Returns a datum that learns a text behind another, without a template.

        Args:
            tokenizer: any object with `encode`, for example `await training.get_tokenizer()`.
            prompt: text that is not learned, encoded as in `ModelInput.from_text`; may be empty.
            completion: text that continues it.
            append_end: also learn the EOS token.

        Raises:
            InvalidData: nothing is to be learned, the tokenizer has no EOS token, or cannot encode the two apart.
        """
        require_text("prompt", prompt)
        require_text("completion", completion)
        check_flag("append_end", append_end)
        return cls.from_tokens(*encode_answer(tokenizer, prompt, completion, append_end=append_end))

    @classmethod
    def of(cls, datum: object) -> "Datum":
        """Returns a datum of this package: the same one, or the copy of a datum of the official SDK.

        The provenance of an official datum is not copied: the losses do not read it.

        Raises:
            InvalidData: it is not a datum, or its input contains something other than text, such as an image.
        """
        if isinstance(datum, cls):
            return datum
        if not is_official(datum):
            raise InvalidData(f"datum must be a Datum, got a {type(datum).__name__}")
        given: Any = datum
        return cls(
            model_input=ModelInput(chunks=tuple(map(_text_chunk, given.model_input.chunks))),
            loss_fn_inputs={name: own_tensor(value) for name, value in given.loss_fn_inputs.items()},
        )

    def with_inputs(self, **fields: TensorInput) -> "Datum":
        """Returns a datum with further `loss_fn_inputs`, or with other values of those that it has.

        Raises:
            InvalidData: a value is not a tensor.
        """
        return Datum(model_input=self.model_input, loss_fn_inputs={**self.loss_fn_inputs, **fields})


def is_official(datum: object) -> bool:
    """Returns whether a value is a datum of another SDK with the protocol's fields, such as the official one."""
    chunks = getattr(getattr(datum, "model_input", None), "chunks", None)
    has_fields = isinstance(chunks, Sequence) and isinstance(getattr(datum, "loss_fn_inputs", None), Mapping)
    return has_fields and not isinstance(datum, Datum)


def _tokens(name: str, tokens: Sequence[int] | Array) -> Array:
    try:
        return EncodedTextChunk(tokens=tokens).tokens
    except InvalidData as error:
        raise InvalidData(f"{name}: {error}") from None


def _text_chunk(chunk: Any) -> EncodedTextChunk:
    kind = getattr(chunk, "type", type(chunk).__name__)
    if kind != "encoded_text":
        raise InvalidData(f"the input of the datum contains a chunk {kind!r}: this package has chunks of text only")
    return EncodedTextChunk(tokens=chunk.tokens)


def own_tensor(tensor: Any) -> TensorData:
    """Returns a tensor of the official SDK, or anything that `TensorData.of` accepts, as one of this package."""
    if isinstance(tensor, TensorData) or not hasattr(tensor, "sparse_crow_indices"):
        return TensorData.of(tensor)
    if tensor.sparse_crow_indices is None:
        return TensorData(data=tensor.to_numpy(), dtype=tensor.dtype)
    return TensorData(
        data=tensor.data,
        dtype=tensor.dtype,
        shape=tensor.shape,
        sparse_crow_indices=tensor.sparse_crow_indices,
        sparse_col_indices=tensor.sparse_col_indices,
    )


def own_datums(data: Sequence[object]) -> list[Datum]:
    """Returns the datums of a list, those of the official SDK converted.

    Raises:
        InvalidData: an element is not a datum; the message has its index.
    """
    datums: list[Datum] = []
    for index, datum in enumerate(data):
        if not isinstance(datum, Datum) and not is_official(datum):
            raise InvalidData(f"data[{index}] must be a Datum, got a {type(datum).__name__}")
        try:
            datums.append(Datum.of(datum))
        except InvalidData as error:
            raise InvalidData(f"data[{index}]: {error}") from None
    return datums


def field_of(datum: Datum, index: int, name: str) -> TensorData:
    """Returns a `loss_fn_inputs` field of the datum with an index.

    Raises:
        InvalidData: it is not a datum, or it lacks the field.
    """
    if not isinstance(datum, Datum):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"data[{index}] must be a Datum, got a {type(datum).__name__}")
    if name not in datum.loss_fn_inputs:
        raise InvalidData(
            f"datum {index} has no {name!r} in loss_fn_inputs (it has {sorted(datum.loss_fn_inputs)}): add the field "
            "to every datum"
        )
    return datum.loss_fn_inputs[name]


def target_shape(datum: Datum, index: int) -> tuple[int, ...]:
    """Returns the shape of a datum's `target_tokens`.

    Args:
        datum: the datum.
        index: its index in the call, for messages.

    Raises:
        InvalidData: there are no targets, or they are neither `[T]` nor `[T, K]`.
    """
    targets = field_of(datum, index, "target_tokens")
    if len(targets.shape) not in (1, 2):
        raise InvalidData(f"target_tokens of datum {index} must be [T] or [T, K], got shape {targets.shape}")
    return targets.shape


def number_of(datum: Datum, index: int, name: str) -> float:
    """Returns the one number in a `loss_fn_inputs` field of the datum with an index.

    Raises:
        InvalidData: the field is missing, or contains more or less than one number.
    """
    field = field_of(datum, index, name)
    values = field.to_numpy()
    if values.size != 1:
        raise InvalidData(f"{name!r} of datum {index} has shape {field.shape}: pass one number per datum")
    return float(values.reshape(-1)[0])
