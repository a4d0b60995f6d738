"""Numbers that cross the wire: one packed buffer, its dtype and its shape."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, Union, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import field_serializer, model_validator

from tinkex_py.errors import InvalidData
from tinkex_py.types.base import WireModel

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["int64", "float32"]
Array = NDArray[Any]

# The dtype of a plain Python list under a name the protocol knows (protocol: "Tensors").
KNOWN_DTYPES: Mapping[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "reference_logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}


_MOST_ELEMENTS = 2**31


class TensorData(WireModel):
    """A tensor as the wire knows it: a flat row-major buffer, a dtype, a shape.

    Args:
        data: the values; a list, a numpy array or a torch tensor. Copied once, read-only afterwards.
            In a sparse tensor only the stored values.
        dtype: "int64" or "float32"; default by the values: every integer type int64, every float type float32.
        shape: the dense shape; default is the shape of `data`.
        sparse_crow_indices: CSR row pointers `[rows + 1]`, for a sparse 2-D tensor.
        sparse_col_indices: CSR column of every stored value.

    Raises:
        InvalidData: shape and values do not fit together, or the values are not numbers.
    """

    data: Array
    dtype: TensorDtype
    shape: tuple[int, ...]
    sparse_crow_indices: Array | None = None
    sparse_col_indices: Array | None = None

    def __init__(
        self,
        *,
        data: "Values",
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: "Values | None" = None,
        sparse_col_indices: "Values | None" = None,
    ) -> None:
        super().__init__(
            data=data,
            dtype=dtype,
            shape=shape,
            sparse_crow_indices=sparse_crow_indices,
            sparse_col_indices=sparse_col_indices,
        )

    @model_validator(mode="before")
    @classmethod
    def _pack(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return cast("object", fields)
        given = dict(cast("Mapping[str, Any]", fields))
        if "data" not in given:
            return given
        array = _as_array(given["data"])
        dtype = given.get("dtype") or _dtype_of(array)
        if dtype not in ("int64", "float32"):
            raise InvalidData(f"dtype {dtype!r} is not on the wire: use 'int64' or 'float32'")
        given["dtype"] = dtype
        if given.get("shape") is None:
            given["shape"] = array.shape
        given["data"] = _read_only(array.reshape(-1), dtype)
        for name in ("sparse_crow_indices", "sparse_col_indices"):
            if given.get(name) is not None:
                given[name] = _read_only(_as_array(given[name]).reshape(-1), "int64")
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(size < 0 for size in self.shape):
            raise InvalidData(f"shape {self.shape} has a negative size")
        crow, col = self.sparse_crow_indices, self.sparse_col_indices
        if crow is None and col is None:
            if math.prod(self.shape) != self.data.size:
                raise InvalidData(f"shape {self.shape} needs {math.prod(self.shape)} values, got {self.data.size}")
            return self
        if crow is None or col is None:
            raise InvalidData("a sparse tensor needs both sparse_crow_indices and sparse_col_indices")
        if len(self.shape) != 2 or crow.size != self.shape[0] + 1 or col.size != self.data.size:
            raise InvalidData(
                f"CSR parts do not fit: shape {self.shape}, {crow.size} row pointers, {col.size} columns, "
                f"{self.data.size} values"
            )
        if crow[0] != 0 or crow[-1] != self.data.size or (np.diff(crow) < 0).any():
            raise InvalidData("sparse_crow_indices must rise from 0 to the number of values")
        if col.size and (col.min() < 0 or col.max() >= self.shape[1]):
            raise InvalidData(f"sparse_col_indices must lie in [0, {self.shape[1]}), got {col.min()} to {col.max()}")
        return self

    @classmethod
    def of(cls, value: "TensorInput", *, name: str | None = None) -> "TensorData":
        """Packs a list, numpy array, torch tensor or TensorData.

        Args:
            value: the numbers.
            name: the `loss_fn_inputs` field it is for; plain lists under a known name get the wire's dtype.
        """
        if isinstance(value, TensorData):
            return value
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return cls.from_torch(cast("torch.Tensor", value))
        if isinstance(value, np.ndarray):
            return cls.from_numpy(value)
        if isinstance(value, Mapping):
            unknown = sorted(map(str, value.keys() - cls.model_fields.keys()))
            if unknown or "data" not in value:
                raise InvalidData(f"a tensor needs data, and knows no {unknown}" if unknown else "a tensor needs data")
            return cls(**value)
        return cls(data=value, dtype=KNOWN_DTYPES.get(name or ""))

    @classmethod
    def from_numpy(cls, array: Array) -> "TensorData":
        """Packs a numpy array; its shape is kept."""
        return cls(data=array, dtype=_dtype_of(array))

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> "TensorData":
        """Packs a torch tensor of any float or integer dtype, dense or CSR, from any device."""
        detached = tensor.detach().cpu()
        if str(detached.layout) == "torch.sparse_csr":
            return cls(
                data=_torch_to_numpy(detached.values()),
                dtype=None,
                shape=tuple(detached.shape),
                sparse_crow_indices=detached.crow_indices().numpy(),
                sparse_col_indices=detached.col_indices().numpy(),
            )
        if str(detached.layout) != "torch.strided":
            detached = detached.to_dense()
        return cls.from_numpy(_torch_to_numpy(detached))

    @property
    def is_sparse(self) -> bool:
        """True for a CSR tensor."""
        return self.sparse_crow_indices is not None

    def to_numpy(self) -> Array:
        """The dense array in its shape; read-only where it shares the packed buffer."""
        crow, col = self.sparse_crow_indices, self.sparse_col_indices
        if crow is None or col is None:
            return self.data.reshape(self.shape)
        dense = np.zeros(self.shape, self.data.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(crow))
        dense[rows, col] = self.data
        return dense

    def to_torch(self) -> "torch.Tensor":
        """A dense torch tensor with memory of its own."""
        import torch

        return torch.from_numpy(self.to_numpy().copy())  # pyright: ignore[reportUnknownMemberType]

    def tolist(self) -> list[Any]:
        """The dense values as nested Python lists."""
        return cast("list[Any]", self.to_numpy().tolist())

    def __eq__(self, other: object) -> bool:
        """Equal dtype, shape and values; a dense and a sparse tensor with the same values are equal."""
        if not isinstance(other, TensorData):
            return NotImplemented
        return (
            self.dtype == other.dtype
            and self.shape == other.shape
            and np.array_equal(self.to_numpy(), other.to_numpy(), equal_nan=self.dtype == "float32")
        )

    def __hash__(self) -> int:
        """Consistent with equality; tensors of equal shape collide, which is enough for a rare use."""
        return hash((self.dtype, self.shape))

    def __repr__(self) -> str:
        """Shape and dtype only: the values may be a user's prompt."""
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}{', sparse' if self.is_sparse else ''})"

    __str__ = __repr__

    @field_serializer("data", "sparse_crow_indices", "sparse_col_indices")
    def _serialize_array(self, array: Array | None) -> list[Any] | None:
        return None if array is None else cast("list[Any]", array.tolist())


Values = Union[Sequence[Any], Array, "torch.Tensor"]
TensorInput = TensorData | Values | Mapping[str, Any]


def read_tensor(value: object, *, name: str | None = None) -> TensorData:
    """A tensor of an answer; fields that it does not know are ignored.

    Raises:
        InvalidData: it is none.
    """
    if not isinstance(value, Mapping):
        return TensorData.of(cast("Any", value), name=name)
    given = {key: item for key, item in cast("Mapping[str, Any]", value).items() if key in TensorData.model_fields}
    if "data" not in given:
        raise InvalidData("a tensor needs data")
    tensor = TensorData(**given)
    if math.prod(tensor.shape) > _MOST_ELEMENTS:  # a sparse one claims any size with a few bytes
        raise InvalidData(f"shape {tensor.shape} is too large")
    return tensor


def _as_array(value: Any) -> Array:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = _torch_to_numpy(cast("torch.Tensor", value).detach().cpu())
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidData("the rows of a tensor must have equal length") from None
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(np.float32)
    if array.dtype.kind not in "iufb":
        raise InvalidData(f"a tensor must hold numbers, got dtype {array.dtype}")
    return array


def _torch_to_numpy(tensor: "torch.Tensor") -> Array:
    if tensor.is_floating_point() and tensor.element_size() < 4:  # numpy has no bfloat16
        tensor = tensor.float()
    return tensor.numpy()


def _dtype_of(array: Array) -> TensorDtype:
    return "float32" if array.dtype.kind == "f" else "int64"


def _check_fits(array: Array, packed: Array, dtype: TensorDtype) -> None:
    if dtype == "float32" and array.dtype.kind == "f" and array.dtype.itemsize > packed.dtype.itemsize:
        lost = np.isinf(packed) & np.isfinite(array)
    elif dtype == "int64" and array.dtype.kind in "uf":
        lost = (array >= 2**63) | (array < -(2**63))
    else:
        return
    if lost.any():
        raise InvalidData(f"{array[lost][0]} does not fit into {dtype}")


def _read_only(array: Array, dtype: TensorDtype) -> Array:
    if dtype == "int64" and array.dtype.kind == "f" and array.size and (array != np.trunc(array)).any():
        raise InvalidData("dtype 'int64' was asked for, but the values are not whole numbers")
    wire_dtype = np.dtype(dtype).newbyteorder("<")
    with np.errstate(over="ignore", invalid="ignore"):
        packed = np.array(array, dtype=wire_dtype, order="C", copy=True)
    _check_fits(array, packed, dtype)
    packed.flags.writeable = False
    return packed
