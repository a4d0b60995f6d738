"""What the service answers, still packed."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from tinkex_py.errors import InvalidResponse
from tinkex_py.types.tensors import Array, TensorData

Metrics = Mapping[str, float]


class Answer(BaseModel):
    """A parsed answer: frozen, and deaf to fields it does not know."""

    model_config = ConfigDict(
        frozen=True, arbitrary_types_allowed=True, extra="ignore", protected_namespaces=(), ser_json_inf_nan="strings"
    )

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        """Reads what a service answered.

        Raises:
            InvalidResponse: naming the fields that do not fit.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            places = {".".join(str(part) for part in item["loc"]) for item in error.errors(include_url=False)}
            raise InvalidResponse(
                f"the service's answer is no {cls.__name__}: see {', '.join(sorted(places))}"
            ) from None


class PackedTensor:
    """One output field of many datums, laid end to end in datum order.

    Args:
        values: flat buffer, `[sum of all elements]`.
        offsets: element offsets, `[datums + 1]`; datum `i` owns `values[offsets[i]:offsets[i + 1]]`.
        trailing_shapes: for each datum the shape behind its leading dimension: `()` for `[T]`, `(K,)` for `[T, K]`.
    """

    __slots__ = ("offsets", "trailing_shapes", "values")

    def __init__(self, values: Array, offsets: Array, trailing_shapes: Sequence[tuple[int, ...]]) -> None:
        self.values = values
        self.offsets = offsets
        self.trailing_shapes = tuple(trailing_shapes)

    def __len__(self) -> int:
        return len(self.trailing_shapes)

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of one datum's slice."""
        trailing = self.trailing_shapes[index]
        count = int(self.offsets[index + 1] - self.offsets[index])
        return (count // max(math.prod(trailing), 1), *trailing)

    def datum(self, index: int) -> Array:
        """One datum's slice in its shape; a view of the packed buffer."""
        return self.values[self.offsets[index] : self.offsets[index + 1]].reshape(self.shape(index))

    @classmethod
    def join(cls, parts: "Sequence[PackedTensor]") -> "PackedTensor":
        """The same field of several chunks, in chunk order."""
        if len(parts) == 1:
            return parts[0]
        offsets = [np.zeros(1, np.int64)]
        base = 0
        for part in parts:
            offsets.append(part.offsets[1:] + base)
            base += int(part.offsets[-1])
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate(offsets),
            [shape for part in parts for shape in part.trailing_shapes],
        )

    @classmethod
    def empty(cls, num_datums: int) -> "PackedTensor":
        """A field that none of the datums has."""
        return cls(np.zeros(0, np.float32), np.zeros(num_datums + 1, np.int64), [()] * num_datums)

    @classmethod
    def from_arrays(cls, arrays: Sequence[Array]) -> "PackedTensor":
        """Packs one array per datum."""
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([array.size for array in arrays], out=offsets[1:])
        values = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.zeros(0, np.float32)
        return cls(values, offsets, [array.shape[1:] for array in arrays])


class ForwardBackwardOutput(Answer):
    """Result of forward or forward_backward.

    `packed` holds every output field over all datums; `loss_fn_outputs` gives the same numbers datum by datum.
    """

    loss_fn_output_type: str = "ArrayRecord"
    metrics: dict[str, float] = Field(default_factory=dict)
    num_datums: int = 0
    packed: dict[str, PackedTensor] = Field(default_factory=dict)

    @cached_property
    def loss_fn_outputs(self) -> list[dict[str, TensorData]]:
        """One dict of tensors per datum, as the official SDK has it; built at the first use."""
        return [
            {name: TensorData.from_numpy(field.datum(index)) for name, field in self.packed.items()}
            for index in range(self.num_datums)
        ]

    @model_validator(mode="before")
    @classmethod
    def _pack(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping) or "packed" in fields or "loss_fn_outputs" not in fields:
            return cast("object", fields)
        given = dict(cast("Mapping[str, Any]", fields))
        given_rows = cast("Sequence[object]", given.pop("loss_fn_outputs") or [])
        if not isinstance(given_rows, Sequence) or not all(isinstance(row, Mapping) for row in given_rows):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidResponse("loss_fn_outputs must be a list of objects")
        rows = [
            {name: TensorData.of(value, name=name) for name, value in row.items()}
            for row in cast("Sequence[Mapping[str, Any]]", given_rows)
        ]
        names = list(dict.fromkeys(name for row in rows for name in row))
        given["packed"] = {
            name: PackedTensor.from_arrays(
                [row[name].to_numpy() if name in row else np.zeros(0, np.float32) for row in rows]
            )
            for name in names
        }
        given["num_datums"] = len(rows)
        given["metrics"] = given.get("metrics") or {}
        return given

    @model_serializer
    def _unpack(self) -> dict[str, Any]:
        return {
            "loss_fn_output_type": self.loss_fn_output_type,
            "loss_fn_outputs": [
                {name: tensor.model_dump(exclude_none=True) for name, tensor in row.items()}
                for row in self.loss_fn_outputs
            ],
            "metrics": self.metrics,
        }

    def __eq__(self, other: object) -> bool:
        """Equal type, metrics and outputs."""
        return (
            isinstance(other, ForwardBackwardOutput)
            and self.loss_fn_output_type == other.loss_fn_output_type
            and self.metrics == other.metrics
            and self.loss_fn_outputs == other.loss_fn_outputs
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        """Names and counts, no numbers of the user's data."""
        return (
            f"ForwardBackwardOutput(num_datums={self.num_datums}, fields={list(self.packed)}, metrics={self.metrics})"
        )

    __str__ = __repr__


class OptimStepResponse(Answer):
    """Result of optim_step; names of the metrics are the service's own."""

    metrics: dict[str, float] | None = None


class SaveWeightsResponse(Answer):
    """Where a checkpoint was saved, as `tinker://run/kind/name`."""

    path: str


class SaveWeightsForSamplerResponse(Answer):
    """A named save answers `path`, an unnamed one a ready sampling session."""

    path: str | None = None
    sampling_session_id: str | None = None


class SupportedModel(Answer):
    """One model of a service."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


class ServerCapabilities(Answer):
    """What a service offers."""

    supported_models: tuple[SupportedModel, ...] = ()


class ModelData(Answer):
    """Description of a training client's model."""

    model_name: str | None = None
    arch: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(Answer):
    """What a training client trains."""

    model_id: str
    model_data: ModelData
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


class WeightsInfo(Answer):
    """What a checkpoint holds."""

    base_model: str
    is_lora: bool = True
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class SampledSequence(Answer):
    """One drawn sequence.

    Attributes:
        tokens: drawn token ids.
        logprobs: log-probability of each drawn token, if the service tells them.
        stop_reason: "stop" at a stop token or text, "length" at max_tokens.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    stop_reason: Literal["stop", "length"]


class SampleResponse(Answer):
    """Result of `sample`: `num_samples` sequences, and the prompt's logprobs where asked for (position 0 is None)."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    prompt_cache_hit_tokens: int = 0
