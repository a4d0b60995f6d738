"""Training examples, and the model input: a sequence of chunks of text, images or audio."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
from pydantic import field_validator

from tinkex_py.arguments import check_flag
from tinkex_py.errors import InvalidData
from tinkex_py.text import encode_answer, encode_prompt, require_text
from tinkex_py.types.base import WireModel
from tinkex_py.types.chunks import Chunk, EncodedTextChunk, known_length, own_chunk
from tinkex_py.types.parts import Encoder, ImageTokens, chunks_of_parts
from tinkex_py.types.provenance import Span, check_tiling, own_spans
from tinkex_py.types.tensors import Array, TensorData, TensorInput


class InputSize(NamedTuple):
    """What the chunks of a model input measure.

    Attributes:
        length: number of tokens; None if that of an image or of audio is unknown.
        stored_bytes: estimated bytes in a request (protocol: 5.3).
        is_text: whether all chunks are text.
    """

    length: int | None
    stored_bytes: int
    is_text: bool


class ModelInput(WireModel):
    """The chunks that the model reads, in order."""

    chunks: tuple[Chunk, ...] = ()

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

    @classmethod
    def from_parts(
        cls, *parts: object, tokenizer: Encoder | None = None, image_tokens: ImageTokens | None = None
    ) -> "ModelInput":
        """Returns an input of texts and images in order.

        The tokens that the tokenizer itself puts before a text come first, once. What the model wants around an image,
        such as `<|vision_start|>`, is text.

        Args:
            parts: a text; token ids; an image as the bytes of a PNG or JPEG file, as a PIL image or as
                `{"bytes": ...}`; or a chunk.
            tokenizer: encodes the texts; needed if there are any.
            image_tokens: number of tokens that the model makes of an image, or a function that returns it for the bytes
                of a file, such as `data.image_tokens(processor)`. None: unknown, which the protocol allows in prompts.

        Raises:
            InvalidData: a part is none of these, there is no tokenizer, or it cannot encode a text.
        """
        return cls(chunks=chunks_of_parts(parts, tokenizer, image_tokens))

    def append(self, chunk: Chunk) -> "ModelInput":
        """Returns a new input with one more chunk at the end."""
        return ModelInput(chunks=(*self.chunks, chunk))

    def append_int(self, token: int) -> "ModelInput":
        """Returns a new input with one more token at the end."""
        return self.append(EncodedTextChunk(tokens=[token]))

    @cached_property
    def size(self) -> InputSize:
        """What the chunks measure; unlike `length`, it never raises."""
        length: int | None = 0
        stored_bytes, is_text = 0, True
        for chunk in self.chunks:
            if isinstance(chunk, EncodedTextChunk):
                length = None if length is None else length + chunk.tokens.size
                stored_bytes += chunk.tokens.nbytes
            else:
                own = known_length(chunk)
                length = None if length is None or own is None else length + own
                stored_bytes += chunk.stored_bytes
                is_text = False
        return InputSize(length, stored_bytes, is_text)

    @property
    def length(self) -> int:
        """Number of tokens in all chunks.

        Raises:
            InvalidData: that of an image is unknown; see `ImageChunk`.
        """
        length = self.size.length
        return sum(chunk.length for chunk in self.chunks) if length is None else length

    @property
    def is_text(self) -> bool:
        """Whether all chunks are text."""
        return self.size.is_text

    def text_mask(self) -> Array:
        """Returns whether each position is text, bool `[N]`.

        Raises:
            InvalidData: the length of an image is unknown.
        """
        parts = [np.full(chunk.length, isinstance(chunk, EncodedTextChunk)) for chunk in self.chunks]
        return np.concatenate([np.zeros(0, np.bool_), *parts])

    def to_ints(self, *, other: int | None = None) -> list[int]:
        """Returns all token ids in order.

        Args:
            other: id for the positions of images and audio, which have none.

        Raises:
            InvalidData: a chunk is no text, and there is no `other`, or its length is unknown.
        """
        ids: list[int] = []
        for chunk in self.chunks:
            if isinstance(chunk, EncodedTextChunk):
                ids += cast("list[int]", chunk.tokens.tolist())
            elif other is None:
                raise InvalidData(
                    f"the model input contains a chunk {chunk.type!r}, which has no token ids: pass other="
                )
            else:
                ids += [other] * chunk.length
        return ids

    def with_tokens(self, tokens: Sequence[int] | Array) -> "ModelInput":
        """Returns a new input with tokens at the end, in the last chunk if it is text."""
        added = EncodedTextChunk(tokens=tokens)
        last = self.chunks[-1] if self.chunks else None
        if not isinstance(last, EncodedTextChunk):
            return self.append(added) if added.length else self
        joined = EncodedTextChunk(tokens=np.concatenate([last.tokens, added.tokens]))
        return ModelInput(chunks=(*self.chunks[:-1], joined))


class Datum(WireModel):
    """One training example: the input of the model and the inputs of the loss.

    Position `i` of every loss input belongs to the prediction at input position `i`: for a token sequence `s`,
    `model_input` contains `s[:-1]` and `target_tokens` contains `s[1:]`.

    Args:
        model_input: `N` tokens.
        loss_fn_inputs: name -> values, as lists, numpy arrays, torch tensors or TensorData, with one entry
            per position: `[N]`, or `[N, K]` for `K` candidate targets.
        model_input_spans: where the tokens of the input come from; see `with_provenance`.
        loss_fn_input_spans: the same of the targets; both or neither.

    Raises:
        InvalidData: a field is invalid, or spans do not cover their field exactly.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, TensorData]
    model_input_spans: tuple[Span, ...] | None = None
    loss_fn_input_spans: tuple[Span, ...] | None = None

    def __init__(
        self,
        *,
        model_input: ModelInput,
        loss_fn_inputs: Mapping[str, TensorInput],
        model_input_spans: Sequence[Span] | None = None,
        loss_fn_input_spans: Sequence[Span] | None = None,
    ) -> None:
        spans: dict[str, Any] = {}
        if model_input_spans is not None or loss_fn_input_spans is not None:
            spans = {"model_input_spans": model_input_spans, "loss_fn_input_spans": loss_fn_input_spans}
        super().__init__(model_input=model_input, loss_fn_inputs=loss_fn_inputs, **spans)
        if spans:
            self._check_spans()

    def _check_spans(self) -> None:
        if self.model_input_spans is None or self.loss_fn_input_spans is None:
            raise InvalidData("pass both model_input_spans and loss_fn_input_spans, or neither: see with_provenance")
        length = self.model_input.size.length
        if length is not None:
            check_tiling("model_input", self.model_input_spans, length)
        targets = self.loss_fn_inputs.get("target_tokens")
        if targets is not None and len(targets.shape) == 1:
            check_tiling("loss_fn_inputs['target_tokens']", self.loss_fn_input_spans, targets.shape[0])

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
    def from_tokens(cls, prompt: ModelInput | Sequence[int] | Array, completion: Sequence[int] | Array) -> "Datum":
        """Returns a datum that learns a completion: `weights` is 1 for the tokens of the completion, 0 for others.

        The tokens are shifted: of `N + 1` tokens, the first `N` are the input and the last `N` the targets. Where the
        target is part of an image, it is 0.

        Args:
            prompt: what is not learned, as token ids or as a model input, which may have images; may be empty.
            completion: token ids that follow.

        Raises:
            InvalidData: no token is to be learned; the first token of all has no prediction. Or the length of an image
                is unknown.
        """
        before = prompt if isinstance(prompt, ModelInput) else ModelInput.from_ints(_tokens("prompt", prompt))
        learned = _tokens("completion", completion)
        if before.length + learned.size < 2 or not learned.size:
            raise InvalidData(
                f"there is nothing to learn in {before.length} tokens of the prompt and {learned.size} of the "
                "completion: pass a completion, and a token before it"
            )
        whole = before.with_tokens(learned)
        return shifted(whole, np.arange(whole.length) >= before.length)

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

        Raises:
            InvalidData: it is not a datum, or has a chunk of a type that the protocol does not have.
        """
        if isinstance(datum, cls):
            return datum
        if not is_official(datum):
            raise InvalidData(f"datum must be a Datum, got a {type(datum).__name__}")
        given: Any = datum
        return cls(
            model_input=ModelInput(chunks=tuple(map(own_chunk, given.model_input.chunks))),
            loss_fn_inputs={name: own_tensor(value) for name, value in given.loss_fn_inputs.items()},
            **_spans_of(given),
        )

    def with_inputs(self, **fields: TensorInput) -> "Datum":
        """Returns a datum with further `loss_fn_inputs`, or with other values of those that it has.

        Raises:
            InvalidData: a value is not a tensor.
        """
        return Datum(
            model_input=self.model_input,
            loss_fn_inputs={**self.loss_fn_inputs, **fields},
            model_input_spans=self.model_input_spans,
            loss_fn_input_spans=self.loss_fn_input_spans,
        )

    def with_provenance(self, model_input: Sequence[Span], loss_fn_inputs: Sequence[Span]) -> "Datum":
        """Returns the datum with the places that its tokens come from, as `stable_reinforce` needs them.

        Args:
            model_input: consecutive runs that cover the input.
            loss_fn_inputs: consecutive runs that cover `target_tokens`.

        Raises:
            InvalidData: the runs do not cover their field exactly.
        """
        return Datum(
            model_input=self.model_input,
            loss_fn_inputs=self.loss_fn_inputs,
            model_input_spans=own_spans("model_input", model_input),
            loss_fn_input_spans=own_spans("loss_fn_inputs", loss_fn_inputs),
        )

    @property
    def positions(self) -> int:
        """Number of positions: of the targets, or of the input if there are none."""
        targets = self.loss_fn_inputs.get("target_tokens")
        return targets.shape[0] if targets is not None and targets.shape else self.model_input.length


def shifted(whole: ModelInput, learned: Array) -> Datum:
    """Returns the datum in which position `i` predicts token `i + 1`.

    Args:
        whole: `N + 1` tokens, the last of which are text; an image counts with its length.
        learned: whether each token is learned, `[N + 1]`; those of images are not.
    """
    *before, last = whole.chunks
    assert isinstance(last, EncodedTextChunk), "the input ends with text"
    rest = [EncodedTextChunk(tokens=last.tokens[:-1])] if last.length > 1 else []
    weights = learned & whole.text_mask()
    return Datum(
        model_input=ModelInput(chunks=(*before, *rest)),
        loss_fn_inputs={
            "target_tokens": np.array(whole.to_ints(other=0)[1:], np.int64),
            "weights": weights[1:].astype(np.float32),
        },
    )


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


def _spans_of(datum: Any) -> dict[str, tuple[Span, ...]]:
    names = ("model_input_spans", "loss_fn_input_spans")
    return {name: own_spans(name, spans) for name in names if (spans := getattr(datum, name, None)) is not None}


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
