"""The logprobs that the terms share: one buffer that we own, and one leaf per term over it.

A leaf has the buffer's memory but a version counter and an autograd graph of its own. So terms cost no
copy, may run in different threads, and an in-place change is traced back to the term that made it.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, SupportsIndex, cast

import numpy as np
import torch

from tinkex_py.errors import InPlaceMutation, InvalidData, PipelineError
from tinkex_py.losses.grad_mode import autograd_on
from tinkex_py.types import Datum, PackedTensor
from tinkex_py.types.datum import target_shape

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOTHING = torch.zeros(0, dtype=torch.int64)
LIST_HINT = (
    "packed logprobs: wrap the function in per_datum(...) to see one tensor per datum; a slice such as logprobs[0:1] "
    "takes positions"
)


class PackedLogprobs(torch.Tensor):
    """A packed leaf: any tensor operation works and gives plain tensors, but it is not a list of datums.

    Iterating or taking `logprobs[i]` would silently mean token i where datum i was meant.
    """

    # A parameter is a subclass whose operations give plain tensors at no cost; so is this.
    __torch_function__ = torch.nn.Parameter.__torch_function__  # pyright: ignore

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


@dataclass(frozen=True)
class _Leaf:
    """A term's leaf, and an operation on it whose backward pass torch refuses once the leaf was changed in place."""

    term: str
    tensor: torch.Tensor
    probe: torch.Tensor

    def was_replaced(self, buffer: torch.Tensor) -> bool:
        """Whether other numbers are under the leaf, as `leaf.data = other` does."""
        return self.tensor.data_ptr() != buffer.data_ptr() or self.tensor.shape != buffer.shape

    def was_written(self) -> bool:
        try:
            torch.autograd.grad(self.probe.sum(), self.tensor, retain_graph=True)
        except RuntimeError:
            return True
        return False


class Logprobs:
    """The logprobs of one step.

    Args:
        buffer: a tensor of their own, on any device: packed `[N]` or `[N, K]`, flat if the datums' shapes are
            mixed, or any shape if it was given directly.
        unchanged: compares the buffer with the numbers it was copied from.
        shapes: shape of every datum's slice, in order; None if one tensor was given directly.
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
        self._leaves: list[_Leaf] = []
        self._nothing = _NOTHING.to(buffer.device)

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
    def from_tensors(cls, logprobs: torch.Tensor | Sequence[torch.Tensor], data: Sequence[Datum] = ()) -> "Logprobs":
        """From one tensor of any shape, or from one tensor per datum; the caller's tensors are never changed.

        Args:
            logprobs: the numbers, on any device.
            data: the datums. A list must have a tensor for each. One tensor is guarded, as in a client, if its first
                axis has as many positions as they have; else it stays plain.

        Raises:
            PipelineError: not a dense floating point tensor, tensors of different dtypes or devices, or too few or
                many of them.
        """
        if isinstance(logprobs, torch.Tensor):
            _check_usable(logprobs)
            with torch.inference_mode(False):
                own = _copied([logprobs]).reshape(logprobs.shape)
                guarded = _add_up(data, logprobs)
                return cls(own, _comparison(own), shapes=None, packable=True, guarded=guarded)
        if not isinstance(logprobs, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PipelineError(f"logprobs must be a tensor or a list of tensors, got a {type(logprobs).__name__}")
        parts = list(logprobs)
        if data and len(parts) != len(data):
            raise PipelineError(f"{len(data)} datums need as many logprobs tensors, got {len(parts)}")
        for part in parts:
            _check_usable(part)
        for what in ("dtype", "device"):
            kinds = {str(getattr(part, what)) for part in parts}
            if len(kinds) > 1:
                raise PipelineError(f"logprobs must share one {what}, got {sorted(kinds)}")
        shapes = [tuple(part.shape) for part in parts]
        if any(not shape for shape in shapes):
            raise PipelineError("a datum's logprobs must be [T] or [T, K], got a 0-d tensor")
        trailing = {shape[1:] for shape in shapes}
        packed = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(trailing) == 1 else (-1,)
        with torch.inference_mode(False):
            own = _copied(parts).reshape(packed) if parts else torch.zeros(0)
            return cls(own, _comparison(own), shapes=shapes, packable=len(trailing) <= 1, guarded=True)

    def leaf(self, name: str, *, packed: bool = True) -> torch.Tensor:
        """A new leaf for the term `name`.

        Args:
            name: of the term.
            packed: whether it sees the leaf itself and not one view per datum.

        Raises:
            PipelineError: the datums' shapes are mixed, so that there is no packed tensor.
        """
        if packed and not self.packable:
            raise PipelineError(
                f"term {name!r} wants packed logprobs, but the datums' target_tokens have different rank or K: "
                "wrap the function in per_datum(...)"
            )
        with autograd_on():
            # Other operations let other threads run Python in between, and the event loop waits for them.
            leaf = self.buffer.data
            if self._guarded:
                leaf = leaf.as_subclass(PackedLogprobs)
            # Taking nothing saves the leaf as it is now.
            probe = leaf.requires_grad_().take(self._nothing)
        self._leaves.append(_Leaf(name, leaf, probe))
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

    def check_unchanged(self) -> None:
        """Raises InPlaceMutation if a term wrote into the shared buffer, or put other numbers under its leaf."""
        leaves = list(self._leaves)
        writers = [leaf.term for leaf in leaves if leaf.was_replaced(self.buffer)]
        if not writers and self._unchanged():
            return
        with autograd_on():
            writers += [leaf.term for leaf in leaves if leaf.was_written()]
        if writers:
            raise InPlaceMutation(
                f"term {writers[0]!r} changed the shared logprobs in place. Work on a copy: logprobs.clone()",
                name=writers[0],
            )
        raise InPlaceMutation(
            f"the shared logprobs were overwritten past autograd (.data or numpy); the writer is unknown, one of "
            f"{', '.join(repr(leaf.term) for leaf in leaves)}. Work on a copy: logprobs.clone()",
            name="unknown",
        )

    def release_leaves(self) -> None:
        """Forgets the leaves, once all terms have ended: an abandoned thread must not keep those of other terms."""
        self._leaves.clear()


def checked_data(data: Sequence[Datum]) -> Sequence[Datum]:
    """The datums, if they are a list; it may be empty.

    Raises:
        InvalidData: they are something else.
    """
    if isinstance(data, Datum | str) or not isinstance(data, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"data must be a list of Datum, got a {type(data).__name__}")
    return data


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


def _add_up(data: Sequence[Datum], logprobs: torch.Tensor) -> bool:
    """Whether a tensor has the positions of these datums on its first axis."""
    targets = [datum.loss_fn_inputs.get("target_tokens") for datum in data if isinstance(datum, Datum)]  # pyright: ignore[reportUnnecessaryIsInstance]
    lengths = [target.shape[0] for target in targets if target is not None and target.shape]
    known = bool(lengths) and len(lengths) == len(data)
    return known and logprobs.ndim > 0 and sum(lengths) == logprobs.shape[0]


def _check_usable(tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise PipelineError(f"logprobs must be a tensor or a list of tensors, got a {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise PipelineError(f"logprobs must be floating point, got dtype {tensor.dtype}")
    if tensor.device.type == "meta":
        raise PipelineError("logprobs are on device meta, where tensors have no numbers")
    if tensor.layout is not torch.strided:
        raise PipelineError(f"logprobs must be dense, got layout {tensor.layout}: pass logprobs.to_dense()")


def _copied(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All elements in one flat tensor of our own.

    On the CPU, numpy copies with the calling thread alone. Torch's further threads would go on spinning for a while, on
    the CPUs that the terms' threads are about to need.
    """
    if tensors[0].device.type != "cpu":
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    array = np.concatenate([_bits(tensor).numpy() for tensor in tensors])
    return torch.from_numpy(array).view(tensors[0].dtype)  # pyright: ignore[reportUnknownMemberType]


def _comparison(own: torch.Tensor) -> Callable[[], bool]:
    untouched = _copied([own])  # not the caller's tensor: the caller may change that
    if own.device.type != "cpu":
        return lambda: torch.equal(_bits(own), _bits(untouched))
    return lambda: np.array_equal(_bits(own).numpy(), _bits(untouched).numpy())  # much faster there


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers, flat, which NaN cannot hide in."""
    return tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
