"""Datums in the data of a step for worker processes: the layout of each, and all their arrays in one column.

To pickle every value would take several times as long as to copy the numbers.
"""

import math
from collections.abc import Sequence
from typing import Any, cast, overload

import numpy as np

from tinkex_py.processes.crossing import Column
from tinkex_py.types import Datum, EncodedTextChunk, ModelInput, TensorData
from tinkex_py.types.base import WireModel

# Place and length of the tokens of each chunk; name, dtype, shape and place of each tensor.
Layout = tuple[list[tuple[int, int]], list[tuple[str, str, tuple[int, ...], int]]]

_TOKENS = "int32"
_FORMATS = {dtype: np.zeros(0, dtype).data.format for dtype in ("int64", "float32", _TOKENS)}


def _defaults(kind: type[WireModel], *given: str) -> dict[str, Any]:
    return {name: info.default for name, info in kind.model_fields.items() if name not in given}


# The other fields of values, which have a layout only with these values.
_OF_CHUNKS = _defaults(EncodedTextChunk, "tokens")
_OF_TENSORS = _defaults(TensorData, "data", "dtype", "shape")
_OF_INPUTS = _defaults(ModelInput, "chunks")
_OF_DATUMS = _defaults(Datum, "model_input", "loss_fn_inputs")
# Validation sets all fields of these, as equality and pickles show.
_CHUNK_FIELDS, _TENSOR_FIELDS = set(EncodedTextChunk.model_fields), set(TensorData.model_fields)


def packed(data: Sequence[object]) -> tuple[list[object], Column]:
    """Returns the layout of every datum, and the column of their arrays. What has no layout stays as it is."""
    column = Column()
    return [_layout(datum, column) if type(datum) is Datum else datum for datum in data], column


def _layout(datum: Datum, column: Column) -> object:
    chunks, inputs = datum.model_input.chunks, datum.loss_fn_inputs
    arrays: list[memoryview] = []
    if not (_has(datum, _OF_DATUMS) and _has(datum.model_input, _OF_INPUTS)):
        return datum
    for chunk in chunks:
        if type(chunk) is not EncodedTextChunk or not _has(chunk, _OF_CHUNKS):
            return datum
        if not _is_usual(chunk.tokens.data, _TOKENS, arrays):
            return datum
    for tensor in inputs.values():
        if type(tensor) is not TensorData or not _has(tensor, _OF_TENSORS):
            return datum
        if not _is_usual(tensor.data.data, tensor.dtype, arrays):
            return datum
    places = [column.add(array) for array in arrays]
    count = len(chunks)
    return (
        [(place, len(array)) for place, array in zip(places[:count], arrays, strict=False)],
        [
            (name, tensor.dtype, tensor.shape, place)
            for (name, tensor), place in zip(inputs.items(), places[count:], strict=True)
        ],
    )


def _has(model: WireModel, others: dict[str, Any]) -> bool:
    fields = vars(model)
    for name, value in others.items():  # noqa: SIM110  # much faster for every value of a step
        if fields.get(name) is not value:
            return False
    return True


def _is_usual(array: memoryview, dtype: str, arrays: list[memoryview]) -> bool:
    """Appends an array if it is as validation makes it."""
    arrays.append(array)
    return array.format == _FORMATS[dtype] and array.readonly and array.c_contiguous


class CrossedDatums(Sequence[Any]):
    """The datums of `packed`, with arrays over the column. Each is made when it is read, because many terms read none.

    Args:
        layouts: of all datums.
        column: their arrays.
    """

    def __init__(self, layouts: Sequence[object], column: memoryview) -> None:
        self._datums = list(layouts)
        self._column = column

    def __len__(self) -> int:
        return len(self._datums)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        datum = self._datums[index]
        if type(datum) is tuple:
            datum = self._datums[index] = self._datum(cast("Layout", datum))
        return datum

    def __reduce__(self) -> Any:
        """Copies and pickles are lists."""
        return list, (list(self),)

    def _datum(self, layout: Layout) -> Datum:
        chunks = tuple([self._chunk(place, size) for place, size in layout[0]])
        inputs = {name: self._tensor(dtype, shape, place) for name, dtype, shape, place in layout[1]}
        # The fields were checked in the program; to check each again takes too long.
        return Datum.model_construct(model_input=ModelInput.model_construct(chunks=chunks), loss_fn_inputs=inputs)

    def _chunk(self, place: int, size: int) -> EncodedTextChunk:
        return EncodedTextChunk.model_construct(_CHUNK_FIELDS, tokens=self._array(_TOKENS, size, place))

    def _tensor(self, dtype: str, shape: tuple[int, ...], place: int) -> TensorData:
        data = self._array(dtype, math.prod(shape), place)
        return TensorData.model_construct(_TENSOR_FIELDS, data=data, dtype=dtype, shape=shape)

    def _array(self, dtype: str, count: int, place: int) -> "np.ndarray[Any, Any]":
        return np.frombuffer(self._column, dtype, count, place)
