"""The logprobs that the terms share: one buffer, and one leaf per term over it.

A leaf shares the memory of the buffer, but has its own version counter and autograd graph. So terms need no copy, can
run in different threads, and an in-place change can be attributed to a term.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, SupportsIndex, cast

import numpy as np
import torch

from tinkex_py.arguments import check_text
from tinkex_py.errors import InPlaceMutation, InvalidData, PipelineError
from tinkex_py.losses.torch_modes import autograd_on
from tinkex_py.types import Datum, PackedTensor
from tinkex_py.types.datum import field_of, is_official, own_datums, target_shape

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOTHING = torch.zeros(0, dtype=torch.int64, device="cpu")
LIST_HINT = (
    "packed logprobs are not a list of datums: wrap the function in per_datum(...) to get one tensor per datum, or use "
    "a slice such as logprobs[0:1] to select positions"
)


class PackedLogprobs(torch.Tensor):
    """A packed leaf. Tensor operations return plain tensors; iteration and integer indices raise.

    `logprobs[i]` would silently select position i where datum i was intended.
    """

    # As for a parameter, operations return plain tensors at no cost.
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
    """A term's leaf, with an operation on it whose backward pass fails after an in-place change of the leaf."""

    term: str
    tensor: torch.Tensor
    probe: torch.Tensor

    def was_replaced(self, buffer: torch.Tensor) -> bool:
        """Returns whether the leaf has other memory, as after `leaf.data = other`."""
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
        buffer: a copy of the logprobs, on any device: packed `[N]` or `[N, K]`, flat if the datums have different
            trailing shapes, or any shape if it comes from a single tensor.
        unchanged: compares the buffer with its source.
        shapes: shape of every datum's slice, in order; None if the source is a single tensor.
        packable: False if the datums have different rank or K.
        guarded: whether leaves raise if they are used as a list of datums.
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
        self.guarded = guarded
        self._leaves: list[_Leaf] = []
        self._nothing = _NOTHING.to(buffer.device)

    @classmethod
    def from_packed(cls, packed: PackedTensor) -> "Logprobs":
        """Copies the logprobs of a service response."""
        trailing = set(packed.trailing_shapes)
        shape = (-1, *next(iter(trailing))) if len(trailing) == 1 else (-1,)
        received = [np.ascontiguousarray(part, dtype=np.float32) for part in packed.parts]
        array = np.concatenate(received)

        def unchanged() -> bool:
            return np.array_equal(array.view(np.int32), np.concatenate(received).view(np.int32))

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
        """Copies one tensor of any shape, or one tensor per datum. The tensors of the caller are not modified.

        Args:
            logprobs: the tensor or tensors, on any device.
            data: the datums. A list must contain one tensor per datum. A single tensor is guarded if the lengths of
                the datums add up to its first dimension.

        Raises:
            PipelineError: a tensor is not dense or not floating point, the dtypes or devices differ, or the number of
                tensors is wrong.
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
            raise PipelineError(f"logprobs must contain one tensor per datum: got {len(parts)} for {len(data)} datums")
        for part in parts:
            _check_usable(part)
        for what in ("dtype", "device"):
            kinds = {str(getattr(part, what)) for part in parts}
            if len(kinds) > 1:
                raise PipelineError(f"logprobs must have the same {what}, got {sorted(kinds)}")
        shapes = [tuple(part.shape) for part in parts]
        if any(not shape for shape in shapes):
            raise PipelineError("the logprobs of a datum must have shape [T] or [T, K], got a 0-d tensor")
        trailing = {shape[1:] for shape in shapes}
        packed = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(trailing) == 1 else (-1,)
        with torch.inference_mode(False):
            own = _copied(parts).reshape(packed) if parts else torch.zeros(0, dtype=torch.float32, device="cpu")
            return cls(own, _comparison(own), shapes=shapes, packable=len(trailing) <= 1, guarded=True)

    def leaf(self, name: str, *, packed: bool = True) -> torch.Tensor:
        """Creates a leaf for a term.

        Args:
            name: name of the term.
            packed: whether the term receives the leaf itself instead of one view per datum.

        Raises:
            PipelineError: the logprobs cannot be packed, because the datums have different rank or K.
        """
        if packed and not self.packable:
            raise PipelineError(
                f"term {name!r} needs packed logprobs, but the target_tokens of the datums have different rank or K: "
                "wrap the function in per_datum(...)"
            )
        with autograd_on():
            # Other operations release the GIL, and the event loop would then wait for other threads.
            leaf = self.buffer.data
            if self.guarded:
                leaf = leaf.as_subclass(PackedLogprobs)
            # Taking no elements saves the current version of the leaf for the backward pass.
            probe = leaf.requires_grad_().take(self._nothing)
        self._leaves.append(_Leaf(name, leaf, probe))
        return leaf

    def views(self, leaf: torch.Tensor, data: Sequence[Datum]) -> list[torch.Tensor]:
        """Returns one view of the leaf per datum, in data order.

        Raises:
            PipelineError: the lengths of the datums are unknown.
        """
        shapes = self.shapes
        if shapes is None:
            if not data:
                raise PipelineError(
                    "a term under per_datum(...) needs the datums to split a single tensor: pass data, or logprobs as "
                    "a list with one tensor per datum"
                )
            return split(data, leaf)
        if self.packable:
            return list(torch.split(leaf, [shape[0] for shape in shapes])) if shapes else []
        flat = torch.split(leaf, [math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(flat, shapes, strict=True)]

    def check_unchanged(self) -> None:
        """Raises InPlaceMutation if a term wrote into the shared buffer or replaced the memory of its leaf."""
        leaves = list(self._leaves)
        writers = [leaf.term for leaf in leaves if leaf.was_replaced(self.buffer)]
        if not writers and self._unchanged():
            return
        with autograd_on():
            writers += [leaf.term for leaf in leaves if leaf.was_written()]
        if writers:
            raise InPlaceMutation(
                f"term {writers[0]!r} modified the shared logprobs in place: use a copy, logprobs.clone()",
                name=writers[0],
            )
        raise InPlaceMutation(
            "the shared logprobs were modified in place without autograd (.data or numpy), by an unknown term out of "
            f"{', '.join(repr(leaf.term) for leaf in leaves)}: use a copy, logprobs.clone()",
            name="unknown",
        )

    def release_leaves(self) -> None:
        """Drops the leaves after the terms ended: an abandoned thread must not keep those of other terms alive."""
        self._leaves.clear()


def checked_data(data: Sequence[Datum]) -> Sequence[Datum]:
    """Returns the datums if they are a sequence, which may be empty; datums of the official SDK are converted.

    Raises:
        InvalidData: they are not a sequence, or an official datum contains something other than text.
    """
    if isinstance(data, Datum | str) or not isinstance(data, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"data must be a list of Datum, got a {type(data).__name__}")
    return own_datums(data) if any(map(is_official, data)) else data


def split(data: Sequence[Datum], logprobs: torch.Tensor) -> list[torch.Tensor]:
    """Splits a packed tensor into one view per datum.

    Args:
        data: the datums; the length of `target_tokens` is the number of positions of a datum.
        logprobs: packed, `[sum(T_i), ...]`.

    Raises:
        InvalidData: the lengths do not add up to the first dimension of the tensor.
    """
    if not isinstance(logprobs, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"split: logprobs must be a packed tensor, got a {type(logprobs).__name__}")
    data = checked_data(data)
    lengths = [target_shape(datum, index)[0] for index, datum in enumerate(data)]
    if not logprobs.ndim or sum(lengths) != logprobs.shape[0]:
        raise InvalidData(
            f"split: data has {len(data)} datums, whose target_tokens have {sum(lengths)} positions in total, but the "
            f"tensor has shape {tuple(logprobs.shape)}: pass the packed logprobs of exactly these datums"
        )
    return list(torch.split(logprobs, lengths))


def packed_field(data: Sequence[Datum], name: str) -> torch.Tensor:
    """Concatenates a `loss_fn_inputs` field of all datums in the layout of packed logprobs.

    Args:
        data: the datums; each must have the field.
        name: name of the field.

    Raises:
        InvalidData: a datum lacks the field, or the trailing shapes differ.
    """
    check_text("name", name)
    data = checked_data(data)
    if not data:
        raise InvalidData(f"cannot read the field {name!r}, because data is empty: pass at least one datum")
    arrays: list[Any] = []
    for index, datum in enumerate(data):
        array = field_of(datum, index, name).to_numpy()
        if array.shape[1:] != (arrays[0] if arrays else array).shape[1:]:
            raise InvalidData(
                f"{name!r} of datum {index} has shape {array.shape}, but that of datum 0 has {arrays[0].shape}: to be "
                "packed, the shapes may differ only in the first dimension"
            )
        arrays.append(array)
    return torch.from_numpy(np.concatenate(arrays))  # pyright: ignore[reportUnknownMemberType]


def _add_up(data: Sequence[Datum], logprobs: torch.Tensor) -> bool:
    """Returns whether the lengths of the datums add up to the first dimension of a tensor."""
    targets = [datum.loss_fn_inputs.get("target_tokens") for datum in data if isinstance(datum, Datum)]  # pyright: ignore[reportUnnecessaryIsInstance]
    lengths = [target.shape[0] for target in targets if target is not None and target.shape]
    known = bool(lengths) and len(lengths) == len(data)
    return known and logprobs.ndim > 0 and sum(lengths) == logprobs.shape[0]


def _check_usable(tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise PipelineError(f"logprobs must be a tensor or a list of tensors, got a {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise PipelineError(f"logprobs must be floating point, got dtype {tensor.dtype}: pass logprobs.float()")
    if tensor.device.type == "meta":
        raise PipelineError("logprobs must have values, got a tensor on device meta: move them to a real device")
    if tensor.layout is not torch.strided:
        raise PipelineError(f"logprobs must be dense, got layout {tensor.layout}: pass logprobs.to_dense()")


def _copied(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copies all elements into one flat tensor.

    On the CPU, numpy copies in the calling thread. Torch would use its thread pool, whose threads spin after the copy
    on the CPUs that the threads of the terms need.
    """
    if tensors[0].device.type != "cpu":
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    array = np.concatenate([bits_of(tensor).numpy() for tensor in tensors])
    return torch.from_numpy(array).view(tensors[0].dtype)  # pyright: ignore[reportUnknownMemberType]


def _comparison(own: torch.Tensor) -> Callable[[], bool]:
    original = _copied([own])  # the caller may modify its own tensor
    if own.device.type != "cpu":
        return lambda: torch.equal(bits_of(own), bits_of(original))
    return lambda: np.array_equal(bits_of(own).numpy(), bits_of(original).numpy())  # much faster on the CPU


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the elements as integers, flat, so that NaN compares equal to itself."""
    return tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
