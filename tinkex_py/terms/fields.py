"""Fields of `loss_fn_inputs` that belong to the logprobs: laid out like them, and checked datum by datum."""

from collections.abc import Sequence

import numpy as np
import torch

from tinkex_py.errors import InvalidData
from tinkex_py.losses.logprobs import PackedLogprobs
from tinkex_py.types import Datum
from tinkex_py.types.datum import target_shape

Shape = tuple[int, ...]


def datum_lengths(data: Sequence[Datum], positions: int) -> list[int]:
    """How many positions each datum has.

    Args:
        data: the datums, with `target_tokens`.
        positions: the length of the packed tensor.

    Raises:
        InvalidData: a datum has no targets, or the lengths do not add up.
    """
    lengths = [target_shape(datum, index)[0] for index, datum in enumerate(data)]
    if sum(lengths) != positions:
        raise InvalidData(
            f"target_tokens of {len(data)} datums cover {sum(lengths)} positions, but the logprobs have {positions}"
        )
    return lengths


def aligned_field(
    data: Sequence[Datum], name: str, logprobs: torch.Tensor, *, per_position: bool = False
) -> torch.Tensor:
    """A field of every datum, packed, in the shape and dtype of the logprobs and on their device.

    A datum's own shape follows from its `target_tokens`; where it has none, from the field itself.

    Args:
        data: the datums.
        name: the field.
        logprobs: packed, or a tensor given directly whose first axis is that of all datums' positions.
        per_position: one number per position, `[T]`, will do where the logprobs are `[T, K]`.

    Returns:
        The shape of the logprobs; `[N]` where the field has one number per position.

    Raises:
        InvalidData: naming the datum, the field and both shapes.
    """
    if not data:
        raise InvalidData(f"no datum to take {name!r} from")
    shapes = [_field_shape(datum, index, name) for index, datum in enumerate(data)]
    wanted = _datum_shapes(data, shapes, logprobs)
    flat = per_position and all(shape == full[:1] for shape, full in zip(shapes, wanted, strict=True))
    if shapes != wanted and not flat:
        bad = next(i for i, (shape, full) in enumerate(zip(shapes, wanted, strict=True)) if shape != full)
        raise InvalidData(f"{name!r} of datum {bad} has shape {shapes[bad]}, its logprobs have shape {wanted[bad]}")
    total = sum(shape[0] for shape in shapes)
    if total != logprobs.shape[0]:
        raise InvalidData(
            f"{name!r} of datums 0 to {len(data) - 1} covers {total} positions, the logprobs have shape "
            f"{tuple(logprobs.shape)}"
        )
    arrays = [datum.loss_fn_inputs[name].to_numpy() for datum in data]
    return like(torch.from_numpy(np.concatenate(arrays)), logprobs)  # pyright: ignore[reportUnknownMemberType]


def like(constants: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Constants in the dtype of the logprobs and on their device."""
    return constants.detach().to(logprobs.dtype).to(logprobs.device)


def has_field(data: Sequence[Datum], name: str) -> bool:
    """Whether the datums have the field.

    Raises:
        InvalidData: some have it and some do not.
    """
    lacking = [index for index, datum in enumerate(data) if name not in datum.loss_fn_inputs]
    if lacking and len(lacking) < len(data):
        raise InvalidData(f"datum {lacking[0]} has no {name!r} in loss_fn_inputs, but other datums have it")
    return bool(data) and not lacking


def is_one_number_per_position(data: Sequence[Datum], logprobs: torch.Tensor) -> bool:
    """Whether these are a client's `[T]` logprobs, those of the target tokens alone.

    A tensor given directly counts as such if it has one number for each of the datums' targets.
    """
    if logprobs.ndim != 1:
        return False
    if isinstance(logprobs, PackedLogprobs):
        return True
    targets = [datum.loss_fn_inputs.get("target_tokens") for datum in data]
    shapes = [target.shape for target in targets if target is not None]
    known = bool(data) and len(shapes) == len(targets) and all(len(shape) == 1 for shape in shapes)
    return known and sum(shape[0] for shape in shapes) == logprobs.shape[0]


def _field_shape(datum: Datum, index: int, name: str) -> Shape:
    field = datum.loss_fn_inputs.get(name)
    if field is None:
        raise InvalidData(f"datum {index} has no {name!r} in loss_fn_inputs (it has {sorted(datum.loss_fn_inputs)})")
    if not field.shape:
        raise InvalidData(f"{name!r} of datum {index} is a single number; it must have one entry per position")
    return field.shape


def _datum_shapes(data: Sequence[Datum], field_shapes: Sequence[Shape], logprobs: torch.Tensor) -> list[Shape]:
    if len(data) == 1:
        return [tuple(logprobs.shape)]
    trailing = tuple(logprobs.shape[1:])
    lengths = [
        target_shape(datum, index)[0] if "target_tokens" in datum.loss_fn_inputs else shape[0]
        for index, (datum, shape) in enumerate(zip(data, field_shapes, strict=True))
    ]
    return [(length, *trailing) for length in lengths]
