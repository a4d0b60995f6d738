"""Parameters of requests: adapters, optimizers, sampling."""

from collections.abc import Sequence
from typing import Annotated, Any, Self, cast

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from tinkex_py.arguments import as_integer, plain
from tinkex_py.errors import InvalidData
from tinkex_py.types.base import WireModel
from tinkex_py.values import Integer, Number

# Services store integers in 64 bits.
Whole = Annotated[Integer, Field(ge=-(2**63), lt=2**63)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]


def _stop(value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    given = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(given, Sequence):
        items = list(cast("Sequence[object]", given))
        tokens = [as_integer(item) for item in items]
        if all(isinstance(item, str) for item in items):
            return cast("Sequence[object]", given)
        if None not in tokens:
            return tuple(tokens) if isinstance(given, tuple) else tokens
        given = " and ".join(sorted({type(item).__name__ for item in items}))
        raise ValueError(f"must be a text, a list of texts or a list of token ids, got a list of {given}")
    raise ValueError(
        f"must be a text, a list of texts or a list of token ids, got a {type(cast('object', value)).__name__}"
    )


Stop = Annotated[str | Sequence[str] | Sequence[int] | None, BeforeValidator(_stop)]

_NEWER_FIELDS = frozenset({"weight_decay", "grad_clip_norm"})


class LoraConfig(WireModel):
    """The low-rank adapters of a training client.

    Args:
        rank: inner dimension, >= 1.
        seed: seed of the initial weights; None lets the service choose.
        train_unembed: adapt the output layer.
        train_mlp: adapt the feed-forward layers.
        train_attn: adapt the attention layers.

    Raises:
        InvalidData: a value is out of range, or no layer is adapted.
    """

    shows_texts = True

    rank: Annotated[Whole, Field(ge=1)] = 32
    seed: Whole | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise InvalidData("at least one of train_unembed, train_mlp, train_attn must be True")
        return self


class AdamParams(WireModel):
    """One AdamW step (decoupled weight decay: Loshchilov and Hutter, arXiv:1711.05101).

    Args:
        learning_rate: step size, >= 0.
        beta1: decay of the first moment, in `[0, 1)`.
        beta2: decay of the second moment, in `[0, 1)`.
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        grad_clip_norm: largest global gradient norm, >= 0; 0 disables clipping.

    Raises:
        InvalidData: a value is out of range.
    """

    shows_texts = True

    learning_rate: NonNegative = 1e-4
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    eps: NonNegative = 1e-12
    weight_decay: NonNegative = 0.0
    grad_clip_norm: NonNegative = 0.0

    def on_the_wire(self) -> dict[str, Any]:
        """Returns the fields to send; disabled ones are omitted, because strict older services reject them."""
        fields = self.model_dump()
        return {name: value for name, value in fields.items() if value or name not in _NEWER_FIELDS}


class OptimizerParams(WireModel):
    """One step of an optimizer other than AdamW, for a model that was created with it.

    Each family has its own fields, which are sent unchanged: `OptimizerParams(type="dimuon", learning_rate=1e-3,
    beta1=0.9)`.

    Args:
        type: name of the family, as in the `optimizer_config` of the model.
        learning_rate: step size, >= 0.
        grad_clip_norm: largest global gradient norm, >= 0; 0 disables clipping.

    Raises:
        InvalidData: a value is out of range.
    """

    shows_texts = True
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[Any, BeforeValidator(plain)]]  # type: ignore[assignment]

    type: str = Field(min_length=1)
    learning_rate: NonNegative
    grad_clip_norm: NonNegative = 0.0

    def on_the_wire(self) -> dict[str, Any]:
        """Returns the fields to send."""
        return self.model_dump()


class SamplingParams(WireModel):
    """How to sample tokens.

    Args:
        max_tokens: maximum number of tokens, >= 1; None is the service's limit.
        seed: makes the samples reproducible.
        stop: stop string, stop strings or token ids; None stops at the model's end token, `[]` never stops early.
        temperature: >= 0; 0 is greedy.
        top_k: sample from the k most likely tokens only; -1 disables it.
        top_p: sample from the most likely tokens with this total probability only, in `(0, 1]`.

    Raises:
        InvalidData: a value is out of range.
    """

    shows_texts = True

    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    seed: Whole | None = None
    stop: Stop = None
    temperature: NonNegative = 1.0
    top_k: Annotated[Whole, Field(ge=-1)] = -1
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
