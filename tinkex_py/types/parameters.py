"""Settings that travel with a request."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from tinkex_py.errors import InvalidData
from tinkex_py.types.base import WireModel

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


_NEWER_FIELDS = frozenset({"weight_decay", "grad_clip_norm"})


class LoraConfig(WireModel):
    """Which low-rank adapters a training client gets.

    Args:
        rank: inner dimension, >= 1.
        seed: seed of the initial weights; None lets the service choose.
        train_unembed: adapt the output layer.
        train_mlp: adapt the feed-forward layers.
        train_attn: adapt the attention layers.
    """

    rank: int = Field(default=32, ge=1)
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise InvalidData("at least one of train_unembed, train_mlp, train_attn must be true")
        return self


class AdamParams(WireModel):
    """One AdamW step (decoupled weight decay: Loshchilov and Hutter, arXiv:1711.05101).

    Args:
        learning_rate: step size.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        grad_clip_norm: largest global gradient norm; 0 switches clipping off.
    """

    learning_rate: NonNegative = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: NonNegative = 1e-12
    weight_decay: NonNegative = 0.0
    grad_clip_norm: NonNegative = 0.0

    def on_the_wire(self) -> dict[str, Any]:
        """As it is sent: what is switched off is left out, since strict older services do not know it."""
        fields = self.model_dump()
        return {name: value for name, value in fields.items() if value or name not in _NEWER_FIELDS}


class OptimizerParams(WireModel):
    """One step of an optimizer other than AdamW, for a model that was made with it.

    Every family has fields of its own, which are sent as they are: `OptimizerParams(type="dimuon",
    learning_rate=1e-3, beta1=0.9)`.

    Args:
        type: name of the family, as in the `optimizer_config` of the model.
        learning_rate: step size.
        grad_clip_norm: largest global gradient norm; 0 switches clipping off.
    """

    model_config = ConfigDict(extra="allow")

    type: str = Field(min_length=1)
    learning_rate: NonNegative
    grad_clip_norm: NonNegative = 0.0

    def on_the_wire(self) -> dict[str, Any]:
        """As it is sent."""
        return self.model_dump()


class SamplingParams(WireModel):
    """How to draw tokens.

    Args:
        max_tokens: most tokens to draw; None is the service's limit.
        seed: makes the draw repeatable.
        stop: None stops at the model's end token, `[]` never stops early; else a text, texts or token ids.
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; -1 switches it off.
        top_p: only the likeliest tokens that hold this much probability.
    """

    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: NonNegative = 1.0
    top_k: int = Field(default=-1, ge=-1)
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
