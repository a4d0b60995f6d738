"""Tensors of the wire format: a packed buffer, its dtype and its shape."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, Union, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import field_serializer, model_validator

from tinkex_py.arguments import check_choice
from tinkex_py.errors import InvalidData
from tinkex_py.types.base import WireModel

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["int64", "float32"]
Array = NDArray[Any]

# The dtype of a plain Python list under a name of the protocol (protocol: "Tensors").
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
    """A tensor in the wire format: a flat row-major buffer, a dtype, a shape.

    Args:
        data: the values, as a list, a numpy array or a torch tensor; of a sparse tensor the stored values only. Copied
            once, read-only afterwards.
        dtype: "int64" or "float32"; by default int64 for integers and float32 for floats.
        shape: the dense shape; default is the shape of `data`.
        sparse_crow_indices: CSR row pointers `[rows + 1]`, for a sparse 2-D tensor.
        sparse_col_indices: CSR column of every stored value.

    Raises:
        InvalidData: shape and values do not match, or the values are not numbers.
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
        dtype: Any = given.get("dtype")
        if dtype is None:
            dtype = _dtype_of(array)
        check_choice("dtype", dtype, get_args(TensorDtype))
        given["dtype"] = dtype
        if given.get("shape") is None:
            given["shape"] = array.shape
        given["data"] = _read_only(array.reshape(-1), dtype)
        for name in ("sparse_crow_indices", "sparse_col_indices"):
            if given.get(name) is not None:
                try:
                    given[name] = _read_only(_as_array(given[name]).reshape(-1), "int64")
                except InvalidData as error:
                    raise InvalidData(f"{name}: {error}") from None
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
                f"the parts of a CSR tensor do not match: shape {self.shape}, {crow.size} row pointers, "
                f"{col.size} columns, {self.data.size} values"
            )
        if crow[0] != 0 or crow[-1] != self.data.size or (np.diff(crow) < 0).any():
            raise InvalidData(f"sparse_crow_indices must increase from 0 to the number of values, {self.data.size}")
        if col.size and (col.min() < 0 or col.max() >= self.shape[1]):
            raise InvalidData(f"sparse_col_indices must be in [0, {self.shape[1]}), got {col.min()} to {col.max()}")
        return self

    @classmethod
    def of(cls, value: "TensorInput", *, name: str | None = None) -> "TensorData":
        """Packs a list, numpy array, torch tensor or TensorData.

        Args:
            value: the numbers.
            name: name of the `loss_fn_inputs` field; a plain list under a name of the protocol gets its dtype.
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
                raise InvalidData(f"a tensor has no fields {unknown}" if unknown else "a tensor needs the field 'data'")
            return cls(**value)
        return cls(data=value, dtype=KNOWN_DTYPES.get(name) if isinstance(name, str) else None)

    @classmethod
    def from_numpy(cls, array: Array) -> "TensorData":
        """Packs a numpy array; its shape is kept."""
        if not isinstance(array, np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"from_numpy needs a numpy array, got a {type(array).__name__}")
        return cls(data=array, dtype=_dtype_of(array))

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> "TensorData":
        """Packs a torch tensor of any float or integer dtype, dense or CSR, from any device."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(tensor, torch.Tensor):
            raise InvalidData(f"from_torch needs a torch tensor, got a {type(tensor).__name__}")
        detached = _on_cpu(tensor)
        if str(detached.layout) == "torch.sparse_csr":
            return cls(
                data=_torch_to_numpy(detached.values()),
                dtype=None,
                shape=tuple(detached.shape),
                sparse_crow_indices=detached.crow_indices().numpy(),
                sparse_col_indices=detached.col_indices().numpy(),
            )
        return cls.from_numpy(_torch_to_numpy(detached))

    @property
    def is_sparse(self) -> bool:
        """True for a CSR tensor."""
        return self.sparse_crow_indices is not None

    def to_numpy(self) -> Array:
        """Returns the dense array in its shape; it is read-only if it shares the packed buffer."""
        crow, col = self.sparse_crow_indices, self.sparse_col_indices
        if crow is None or col is None:
            return self.data.reshape(self.shape)
        dense = np.zeros(self.shape, self.data.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(crow))
        dense[rows, col] = self.data
        return dense

    def to_torch(self) -> "torch.Tensor":
        """Returns a dense torch tensor that owns its memory."""
        import torch

        return torch.from_numpy(self.to_numpy().copy())  # pyright: ignore[reportUnknownMemberType]

    def tolist(self) -> list[Any]:
        """Returns the dense values as nested Python lists."""
        return cast("list[Any]", self.to_numpy().tolist())

    def __eq__(self, other: object) -> bool:
        """Whether dtype, shape and values are equal; a dense and a sparse tensor with the same values are equal."""
        if not isinstance(other, TensorData):
            return NotImplemented
        return (
            self.dtype == other.dtype
            and self.shape == other.shape
            and np.array_equal(self.to_numpy(), other.to_numpy(), equal_nan=self.dtype == "float32")
        )

    def __hash__(self) -> int:
        """Consistent with equality; tensors of equal dtype and shape collide."""
        return hash((self.dtype, self.shape))

    def __repr__(self) -> str:
        """Shows shape and dtype only, because the values may be a user's prompt."""
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}{', sparse' if self.is_sparse else ''})"

    __str__ = __repr__

    @field_serializer("data", "sparse_crow_indices", "sparse_col_indices")
    def _serialize_array(self, array: Array | None) -> list[Any] | None:
        return None if array is None else cast("list[Any]", array.tolist())


Values = Union[Sequence[Any], Array, "torch.Tensor"]
TensorInput = TensorData | Values | Mapping[str, Any]


def read_tensor(value: object, *, name: str | None = None) -> TensorData:
    """Parses a tensor of a response; unknown fields are ignored.

    Raises:
        InvalidData: it is not a tensor.
    """
    if not isinstance(value, Mapping):
        return TensorData.of(cast("Any", value), name=name)
    given = {key: item for key, item in cast("Mapping[str, Any]", value).items() if key in TensorData.model_fields}
    if "data" not in given:
        raise InvalidData("a tensor needs the field 'data'")
    tensor = TensorData(**given)
    if math.prod(tensor.shape) > _MOST_ELEMENTS:  # a sparse tensor can declare any size in a few bytes
        raise InvalidData(f"shape {tensor.shape} is too large: at most {_MOST_ELEMENTS} elements are allowed")
    return tensor


def without_torch(value: Any) -> Any:
    """Returns a torch tensor as a dense numpy array, anything else unchanged."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch_to_numpy(_on_cpu(cast("torch.Tensor", value)))
    return value


def _as_array(value: Any) -> Array:
    value = without_torch(value)
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidData("the rows of a tensor must have equal lengths") from None
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(np.float32)
    if array.dtype.kind not in "iufb":
        raise InvalidData(f"a tensor must contain numbers, got dtype {array.dtype}")
    return array


def _on_cpu(tensor: "torch.Tensor") -> "torch.Tensor":
    if tensor.is_meta:
        raise InvalidData("a tensor on the meta device has no values: move it to another device")
    return tensor.detach().cpu()


def _torch_to_numpy(tensor: "torch.Tensor") -> Array:
    if str(tensor.layout) != "torch.strided":
        tensor = tensor.to_dense()
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
        raise InvalidData(f"{array[lost][0]} is out of range for {dtype}")


def _read_only(array: Array, dtype: TensorDtype) -> Array:
    if dtype == "int64" and array.dtype.kind == "f" and array.size and (array != np.trunc(array)).any():
        raise InvalidData("dtype is 'int64', but the values are not integers: use 'float32'")
    wire_dtype = np.dtype(dtype).newbyteorder("<")
    with np.errstate(over="ignore", invalid="ignore"):
        packed = np.array(array, dtype=wire_dtype, order="C", copy=True)
    _check_fits(array, packed, dtype)
    packed.flags.writeable = False
    return packed
