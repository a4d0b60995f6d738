"""The logprobs that the terms share: one buffer that we own, and one leaf per term over it.

A leaf has the buffer's memory but a version counter and an autograd graph of its own. So terms cost no
copy, may run in different threads, and an in-place change is traced back to the term that made it.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, SupportsIndex, cast

import numpy as np
import torch

from tinkex_py.errors import InPlaceMutation, InvalidData, PipelineError
from tinkex_py.losses.grad_mode import autograd_on
from tinkex_py.types import Datum, PackedTensor
from tinkex_py.types.datum import target_shape

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LIST_HINT = "packed logprobs: wrap the function in per_datum(...) to see one tensor per datum"


class PackedLogprobs(torch.Tensor):
    """A packed leaf: any tensor operation works and gives plain tensors, but it is not a list of datums.

    Iterating or taking `logprobs[i]` would silently mean token i where datum i was meant.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def __iter__(self) -> NoReturn:
        raise TypeError(LIST_HINT)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"packed {self.detach()!r}"

    def __getitem__(self, index: Any) -> torch.Tensor:
        if _is_integer(index):
            raise TypeError(LIST_HINT)
        return super().__getitem__(index)


def _is_integer(index: object) -> bool:
    if isinstance(index, bool):
        return False
    if isinstance(index, torch.Tensor):
        return index.ndim == 0 and not index.is_floating_point() and index.dtype is not torch.bool
    try:
        operator.index(cast("SupportsIndex", index))
    except TypeError:
        return False
    return True


class Logprobs:
    """The logprobs of one step.

    Args:
        buffer: a tensor nobody else holds: packed `[N]` or `[N, K]`, flat if the datums' shapes are mixed,
            or any shape if it was given directly.
        unchanged: compares the buffer with the numbers it was copied from.
        shapes: shape of every datum's slice, in order; None if there are no known boundaries.
        packable: False if datums have mixed rank or K.
        guarded: leaves refuse to be used as a list of datums.
    """

    def __init__(
        self,
        buffer: torch.Tensor,
        unchanged: Callable[[], bool],
        *,
        shapes: Sequence[tuple[int, ...]] | None,
        packable: bool,
        guarded: bool,
    ) -> None:
        self.buffer = buffer
        self.shapes = shapes
        self.packable = packable
        self._unchanged = unchanged
        self._guarded = guarded
        self._leaves: dict[int, tuple[str, torch.Tensor, int]] = {}  # by the id of the leaf

    @classmethod
    def from_packed(cls, packed: PackedTensor) -> "Logprobs":
        """From a service's answer: one copy into memory of our own."""
        trailing = set(packed.trailing_shapes)
        shape = (-1, *next(iter(trailing))) if len(trailing) == 1 else (-1,)
        received = [np.ascontiguousarray(part, dtype=np.float32) for part in packed.parts]
        array = np.concatenate(received)
        starts = itertools.accumulate((part.size for part in received), initial=0)
        own_parts = [array[start : start + part.size] for start, part in zip(starts, received, strict=False)]

        def unchanged() -> bool:
            pairs = zip(own_parts, received, strict=True)
            return all(np.array_equal(own.view(np.int32), part.view(np.int32)) for own, part in pairs)

        with torch.inference_mode(False):
            return cls(
                torch.from_numpy(array).reshape(shape),  # pyright: ignore[reportUnknownMemberType]
                unchanged,
                shapes=packed.shapes,
                packable=len(trailing) <= 1,
                guarded=True,
            )

    @classmethod
    def from_tensors(cls, logprobs: torch.Tensor | Sequence[torch.Tensor], *, datums: int = 0) -> "Logprobs":
        """From one tensor of any shape, or from one tensor per datum; the caller's tensors are never changed.

        Args:
            logprobs: the numbers.
            datums: how many tensors a list must have; 0 takes any number.

        Raises:
            PipelineError: not a floating point tensor, tensors of different dtypes, or too few or many of them.
        """
        if isinstance(logprobs, torch.Tensor):
            _check_floating(logprobs)
            with torch.inference_mode(False):
                own = _copied([logprobs], logprobs.shape)
                return cls(own, _comparison(own), shapes=None, packable=True, guarded=False)
        if not isinstance(logprobs, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PipelineError(f"logprobs must be a tensor or a list of tensors, got a {type(logprobs).__name__}")
        parts = list(logprobs)
        if datums and len(parts) != datums:
            raise PipelineError(f"{datums} datums need as many logprobs tensors, got {len(parts)}")
        for part in parts:
            _check_floating(part)
        if len({part.dtype for part in parts}) > 1:
            raise PipelineError(f"logprobs must share one dtype, got {sorted({str(part.dtype) for part in parts})}")
        shapes = [tuple(part.shape) for part in parts]
        if any(not shape for shape in shapes):
            raise PipelineError("a datum's logprobs must be [T] or [T, K], got a 0-d tensor")
        packable = len({shape[1:] for shape in shapes}) <= 1
        with torch.inference_mode(False):
            packed = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if packable and shapes else (-1,)
            own = _copied(parts, packed) if parts else torch.zeros(0)
            return cls(own, _comparison(own), shapes=shapes, packable=packable, guarded=True)

    def leaf(self, name: str) -> torch.Tensor:
        """A new leaf for the term `name`."""
        with autograd_on():
            # Other ways to share memory let other threads run Python in between, and the event loop waits for them.
            leaf = self.buffer.data
            if self._guarded:
                leaf = leaf.as_subclass(PackedLogprobs)
            leaf.requires_grad_()
        self._leaves[id(leaf)] = (name, leaf, leaf._version)  # pyright: ignore
        return leaf

    def views(self, leaf: torch.Tensor, data: Sequence[Datum]) -> list[torch.Tensor]:
        """One view of the leaf per datum, in data order.

        Raises:
            PipelineError: the boundaries are not known.
        """
        shapes = self.shapes
        if shapes is None:
            if not data:
                raise PipelineError("per_datum needs to know the datums: pass a list with one tensor per datum")
            return split(data, leaf)
        if self.packable:
            return list(torch.split(leaf, [shape[0] for shape in shapes])) if shapes else []
        flat = torch.split(leaf, [math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(flat, shapes, strict=True)]

    def check_packable(self, name: str) -> None:
        """Raises PipelineError if the datums' shapes are mixed, so that there is no packed tensor."""
        if not self.packable:
            raise PipelineError(
                f"term {name!r} wants packed logprobs, but the datums' target_tokens have different rank or K: "
                "wrap the function in per_datum(...)"
            )

    def check_leaf(self, leaf: torch.Tensor) -> None:
        """Raises InPlaceMutation if the term that got this leaf wrote into it."""
        known = self._leaves.get(id(leaf))
        if known is not None and self._was_changed(leaf, known[2]):
            raise _mutation(known[0])

    def check_unchanged(self) -> None:
        """Raises InPlaceMutation if anybody wrote into the shared buffer."""
        for name, leaf, version in self._leaves.values():
            if self._was_changed(leaf, version):
                raise _mutation(name)
        if not self._unchanged():
            names = ", ".join(repr(name) for name, _, _ in self._leaves.values())
            raise InPlaceMutation(
                f"the shared logprobs were overwritten past autograd (.data or numpy); the writer is unknown, one of "
                f"{names}. Work on a copy: logprobs.clone()",
                name="unknown",
            )

    def release_leaves(self) -> None:
        """Forgets the leaves, once all terms have ended: an abandoned thread must not keep those of other terms."""
        self._leaves.clear()

    def _was_changed(self, leaf: torch.Tensor, version: int) -> bool:
        # `leaf.data = other` puts other numbers under the leaf without a new version.
        was_moved = leaf.shape != self.buffer.shape or leaf.data_ptr() != self.buffer.data_ptr()
        return was_moved or leaf._version != version  # pyright: ignore


def split(data: Sequence[Datum], logprobs: torch.Tensor) -> list[torch.Tensor]:
    """Cuts a packed tensor into one view per datum.

    Args:
        data: the datums; the length of `target_tokens` says how many positions each one owns.
        logprobs: packed, `[sum(T_i), ...]`.

    Raises:
        InvalidData: the lengths do not add up.
    """
    if not isinstance(logprobs, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"split needs a packed tensor, got a {type(logprobs).__name__}")
    lengths = [target_shape(datum, index)[0] for index, datum in enumerate(data)]
    if not logprobs.ndim or sum(lengths) != logprobs.shape[0]:
        raise InvalidData(
            f"target_tokens of {len(data)} datums cover {sum(lengths)} positions, "
            f"but the tensor has shape {tuple(logprobs.shape)}"
        )
    return list(torch.split(logprobs, lengths))


def packed_field(data: Sequence[Datum], name: str) -> torch.Tensor:
    """One `loss_fn_inputs` field of all datums, laid end to end like packed logprobs.

    Args:
        data: the datums; each must have the field.
        name: which field.

    Raises:
        InvalidData: a datum lacks the field, or the trailing shapes differ.
    """
    if not data:
        raise InvalidData(f"no datum to take {name!r} from")
    arrays: list[Any] = []
    for index, datum in enumerate(data):
        if not isinstance(datum, Datum):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"data[{index}] must be a Datum, got a {type(datum).__name__}")
        if name not in datum.loss_fn_inputs:
            raise InvalidData(
                f"datum {index} has no {name!r} in loss_fn_inputs (it has {sorted(datum.loss_fn_inputs)})"
            )
        array = datum.loss_fn_inputs[name].to_numpy()
        if array.shape[1:] != (arrays[0] if arrays else array).shape[1:]:
            raise InvalidData(
                f"{name!r} of datum {index} has shape {array.shape}, which does not pack with {arrays[0].shape}"
            )
        arrays.append(array)
    return torch.from_numpy(np.concatenate(arrays))  # pyright: ignore[reportUnknownMemberType]


def _mutation(name: str) -> InPlaceMutation:
    return InPlaceMutation(
        f"term {name!r} changed the shared logprobs in place. Work on a copy: logprobs.clone()", name=name
    )


def _check_floating(tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise PipelineError(f"logprobs must be a tensor or a list of tensors, got a {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise PipelineError(f"logprobs must be floating point, got dtype {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise PipelineError(f"logprobs must be on the CPU, got device {tensor.device}: pass logprobs.cpu()")
    if tensor.layout is not torch.strided:
        raise PipelineError(f"logprobs must be dense, got layout {tensor.layout}: pass logprobs.to_dense()")


def _copied(tensors: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """All elements in one contiguous tensor of our own.

    Numpy copies with the calling thread alone. Torch's further threads would go on spinning for a while, on the CPUs
    that the terms' threads are about to need.
    """
    array = np.concatenate([_bits(tensor) for tensor in tensors])
    copy: torch.Tensor = torch.from_numpy(array).view(tensors[0].dtype)  # pyright: ignore[reportUnknownMemberType]
    return copy.reshape(tuple(shape))


def _comparison(own: torch.Tensor) -> Callable[[], bool]:
    untouched = _bits(own).copy()  # not the caller's tensor: the caller may change that
    return lambda: np.array_equal(_bits(own), untouched)


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.signedinteger[Any]]]:
    """The same memory as integers, which NaN cannot hide in: numpy compares them much faster than torch."""
    return tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()]).numpy()
