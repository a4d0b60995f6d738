"""Results of training requests, with packed tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, cast

import numpy as np
from pydantic import Field, field_validator, model_serializer, model_validator

from tinkex_py.arguments import check_choice
from tinkex_py.errors import InvalidResponse
from tinkex_py.types.response_model import ResponseModel
from tinkex_py.types.tensors import Array, TensorData, read_tensor

Metrics = Mapping[str, float]
Ability = Literal["train", "sample"]

_CAPABILITIES: Mapping[Ability, str] = {"train": "training", "sample": "sampling"}


class PackedTensor:
    """One output field of many datums, concatenated in datum order.

    Args:
        values: flat buffer, `[sum of all elements]`, or its parts in order.
        offsets: element offsets, `[datums + 1]`; datum `i` is `values[offsets[i]:offsets[i + 1]]`.
        trailing_shapes: the shape of each datum after its first dimension: `()` for `[T]`, `(K,)` for `[T, K]`.
    """

    def __init__(
        self, values: Array | Sequence[Array], offsets: Array, trailing_shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self.parts: Sequence[Array] = (values,) if isinstance(values, np.ndarray) else tuple(values)
        self.offsets = offsets
        self.trailing_shapes = tuple(trailing_shapes)

    def __len__(self) -> int:
        return len(self.trailing_shapes)

    @property
    def values(self) -> Array:
        """The flat buffer. Parts are concatenated at the first use, because most results are never read."""
        if len(self.parts) > 1:
            self.parts = (np.concatenate(self.parts),)
        return self.parts[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values."""
        return np.result_type(*self.parts)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of every datum's slice."""
        sizes = cast("list[int]", np.diff(self.offsets).tolist())
        row_sizes = {trailing: max(math.prod(trailing), 1) for trailing in set(self.trailing_shapes)}
        return [
            (size // row_sizes[trailing], *trailing) for size, trailing in zip(sizes, self.trailing_shapes, strict=True)
        ]

    def shape(self, index: int) -> tuple[int, ...]:
        """Returns the shape of one datum's slice."""
        return self.shapes[index]

    def datum(self, index: int) -> Array:
        """Returns one datum's slice in its shape; a view of the packed buffer."""
        return self.values[self.offsets[index] : self.offsets[index + 1]].reshape(self.shape(index))

    @classmethod
    def join(cls, parts: "Sequence[PackedTensor]") -> "PackedTensor":
        """Concatenates the same field of several chunks, in chunk order."""
        if len(parts) == 1:
            return parts[0]
        offsets = [np.zeros(1, np.int64)]
        base = 0
        for part in parts:
            offsets.append(part.offsets[1:] + base)
            base += int(part.offsets[-1])
        return cls(
            [values for part in parts for values in part.parts],
            np.concatenate(offsets),
            [shape for part in parts for shape in part.trailing_shapes],
        )

    @classmethod
    def empty(cls, num_datums: int) -> "PackedTensor":
        """Returns a field that none of the datums has."""
        return cls(np.zeros(0, np.float32), np.zeros(num_datums + 1, np.int64), [()] * num_datums)

    @classmethod
    def from_arrays(cls, arrays: Sequence[Array]) -> "PackedTensor":
        """Packs one array per datum."""
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([array.size for array in arrays], out=offsets[1:])
        values = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.zeros(0, np.float32)
        return cls(values, offsets, [array.shape[1:] for array in arrays])


class ForwardBackwardOutput(ResponseModel):
    """Result of forward or forward_backward.

    `packed` contains every output field of all datums; `loss_fn_outputs` returns the same numbers datum by datum.

    Attributes:
        loss_fn_output_type: the service's name of the output type.
        metrics: metrics of the service, such as `loss:sum`.
        num_datums: number of datums.
        packed: output fields by name.
    """

    loss_fn_output_type: str = "ArrayRecord"
    metrics: dict[str, float] = Field(default_factory=dict)
    num_datums: int = 0
    packed: dict[str, PackedTensor] = Field(default_factory=dict)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        """Parses the JSON form, which has no packed fields; raises like `ResponseModel.read`."""
        if not isinstance(fields, Mapping) or "loss_fn_outputs" not in fields:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidResponse(f"the service returned an invalid {cls.__name__}; missing: loss_fn_outputs")
        return super().read({name: value for name, value in fields.items() if name not in ("packed", "num_datums")})

    @cached_property
    def loss_fn_outputs(self) -> list[dict[str, TensorData]]:
        """One dict of tensors per datum, as in the official SDK; built at the first use."""
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
        rows = [_row(row) for row in _listed(given.pop("loss_fn_outputs"))]
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
        """Whether type, metrics and outputs are equal."""
        return (
            isinstance(other, ForwardBackwardOutput)
            and self.loss_fn_output_type == other.loss_fn_output_type
            and self.metrics == other.metrics
            and self.loss_fn_outputs == other.loss_fn_outputs
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        """Shows names and counts, but no numbers of the user's data."""
        return (
            f"ForwardBackwardOutput(num_datums={self.num_datums}, fields={list(self.packed)}, metrics={self.metrics})"
        )

    __str__ = __repr__


def _listed(value: object) -> list[object]:
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError("loss_fn_outputs must be a list")
    return list(cast("list[object]", value if value is not None else []))


def _row(row: object) -> dict[str, TensorData]:
    if not isinstance(row, Mapping):
        raise ValueError("loss_fn_outputs must contain objects")
    return {name: read_tensor(value, name=name) for name, value in cast("Mapping[str, object]", row).items()}


class OptimStepResponse(ResponseModel):
    """Result of optim_step; the service chooses the names of the metrics."""

    metrics: dict[str, float] | None = None

    @property
    def grad_norm(self) -> float | None:
        """L2 norm of the accumulated gradient in the space of the weights, before clipping; None if it is unreported.

        Services that compute it for clipping only report it with `optim_step(..., grad_norm=True)`.
        """
        reported = self.metrics or {}
        # Such as "grad_norm", "skyrl.ai/grad_norm" and "grad_norm:mean".
        names = (name for name in reported if name.rpartition("/")[2].partition(":")[0] == "grad_norm")
        return next((reported[name] for name in names), None)


class SaveWeightsResponse(ResponseModel):
    """Path of a saved checkpoint, as `tinker://run/kind/name`."""

    path: str


class SaveWeightsForSamplerResponse(ResponseModel):
    """Result of a save for sampling: `path` if the save has a name, else a sampling session."""

    path: str | None = None
    sampling_session_id: str | None = None


class SupportedModel(ResponseModel):
    """One model of a service.

    TuFT reports in `capabilities` what other services report in `trainable` and `sampleable`; `can` reads both.
    """

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None
    capabilities: tuple[str, ...] | None = None

    def can(self, ability: Ability) -> bool | None:
        """Whether the service can train this model, or sample from it; None if it does not report this."""
        check_choice("ability", ability, _CAPABILITIES)
        reported = self.trainable if ability == "train" else self.sampleable
        if reported is not None or self.capabilities is None:
            return reported
        return _CAPABILITIES[ability] in self.capabilities

    @field_validator("capabilities", mode="before")
    @classmethod
    def _leave_out_other_forms(cls, value: object) -> object:
        words = cast("list[object]", value) if isinstance(value, list | tuple) else [None]
        return words if all(isinstance(word, str) for word in words) else None


class ServerCapabilities(ResponseModel):
    """The models of a service, and its version if it reports one."""

    supported_models: tuple[SupportedModel, ...] = ()
    version: str | None = None

    @field_validator("version", mode="before")
    @classmethod
    def _leave_out_no_text(cls, value: object) -> object:
        return value if isinstance(value, str) else None


@dataclass(frozen=True)
class ServiceFeatures:
    """Features of a service, as a client detected them.

    Attributes:
        wire: "protobuf" or "json", the encoding that it accepts for passes over data.
        uploaded_losses: whether it accepts custom losses that run on the service.
    """

    wire: Literal["protobuf", "json"]
    uploaded_losses: bool


class ModelData(ResponseModel):
    """Description of a training client's model."""

    model_name: str | None = None
    arch: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(ResponseModel):
    """The model of a training client."""

    model_id: str
    model_data: ModelData
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


class WeightsInfo(ResponseModel):
    """The base model and the adapters of a checkpoint."""

    base_model: str
    is_lora: bool = True
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
