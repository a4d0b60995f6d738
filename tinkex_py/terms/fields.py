"""Fields of `loss_fn_inputs` that are aligned with the logprobs."""

from collections.abc import Sequence

import numpy as np
import torch

from tinkex_py.arguments import check_list
from tinkex_py.errors import InvalidData
from tinkex_py.losses.logprobs import PackedLogprobs
from tinkex_py.types import Datum, TensorData
from tinkex_py.types.datum import field_of, target_shape

Shape = tuple[int, ...]


def datum_lengths(data: Sequence[Datum], positions: int) -> list[int]:
    """Returns the number of positions of each datum.

    Args:
        data: the datums, with `target_tokens`.
        positions: the length of the packed tensor.

    Raises:
        InvalidData: a datum has no targets, or the lengths do not add up to the number of positions.
    """
    lengths = [target_shape(datum, index)[0] for index, datum in enumerate(data)]
    if sum(lengths) != positions:
        raise InvalidData(
            f"target_tokens of {len(data)} datums cover {sum(lengths)} positions, but the logprobs have {positions}: "
            "pass the logprobs of exactly these datums"
        )
    return lengths


def aligned_field(
    data: Sequence[Datum], name: str, logprobs: torch.Tensor, *, per_position: bool = False
) -> torch.Tensor:
    """Packs a field of all datums, in the dtype and on the device of the logprobs.

    Args:
        data: the datums. The shape of a datum is that of its `target_tokens`, or of the field if it has none.
        name: the field.
        logprobs: packed, or a tensor given directly whose first axis holds the positions of all datums.
        per_position: also accept one number per position, `[T]`, for logprobs of shape `[T, K]`.

    Returns:
        A tensor in the shape of the logprobs; `[N]` if the field has one number per position.

    Raises:
        InvalidData: a datum lacks the field or its shape does not match.
    """
    if not data:
        raise InvalidData(f"the term reads the field {name!r}, but data is empty: pass datums that have it")
    shapes = [_field_shape(datum, index, name) for index, datum in enumerate(data)]
    expected = _datum_shapes(data, shapes, logprobs)
    flat = per_position and all(shape == full[:1] for shape, full in zip(shapes, expected, strict=True))
    for index, (shape, full) in enumerate(zip(shapes, expected, strict=True)):
        if shape != full and not flat:
            raise InvalidData(f"{name!r} of datum {index} has shape {shape}, but its logprobs have shape {full}")
    total = sum(shape[0] for shape in shapes)
    if total != logprobs.shape[0]:
        raise InvalidData(
            f"{name!r} of {len(data)} datums covers {total} positions, but the logprobs have shape "
            f"{tuple(logprobs.shape)}: pass the logprobs of exactly these datums"
        )
    arrays = [datum.loss_fn_inputs[name].to_numpy() for datum in data]
    return like(torch.from_numpy(np.concatenate(arrays)), logprobs)  # pyright: ignore[reportUnknownMemberType]


def like(constants: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Detaches a tensor and moves it to the dtype and device of the logprobs."""
    return constants.detach().to(logprobs.dtype).to(logprobs.device)


def has_field(data: Sequence[Datum], name: str) -> bool:
    """Returns whether the datums have the field.

    Raises:
        InvalidData: only some datums have it.
    """
    missing = [index for index, datum in enumerate(check_list("data", data, Datum)) if name not in datum.loss_fn_inputs]
    if missing and len(missing) < len(data):
        raise InvalidData(
            f"datum {missing[0]} has no {name!r} in loss_fn_inputs, but other datums have it: set it on all or on none"
        )
    return bool(data) and not missing


def described_position(data: Sequence[Datum], index: Sequence[int]) -> str:
    """Describes the position of a packed tensor with an index per axis: in its datum where the targets tell which."""
    first, rest = (index[0], index[1:]) if index else (0, ())
    candidate = f", candidate {', '.join(map(str, rest))}" if rest else ""
    targets = [_targets(datum) for datum in data]
    start = 0
    for number, target in enumerate(targets):
        length = target.shape[0] if target is not None and target.shape else 0
        if start <= first < start + length:
            return f"position {first - start} of datum {number}{candidate}"
        start += length
    return f"position {first}{candidate}"


def is_one_number_per_position(data: Sequence[Datum], logprobs: torch.Tensor) -> bool:
    """Returns whether the logprobs are those of the target tokens alone, `[T]`.

    That is the case for one-dimensional logprobs of a client, and for a tensor given directly that has one number for
    each target of the datums.
    """
    if logprobs.ndim != 1:
        return False
    if isinstance(logprobs, PackedLogprobs):
        return True
    targets = [_targets(datum) for datum in data]
    shapes = [target.shape for target in targets if target is not None]
    known = bool(data) and len(shapes) == len(targets) and all(len(shape) == 1 for shape in shapes)
    return known and sum(shape[0] for shape in shapes) == logprobs.shape[0]


def _targets(datum: Datum) -> TensorData | None:
    return datum.loss_fn_inputs.get("target_tokens") if isinstance(datum, Datum) else None  # pyright: ignore[reportUnnecessaryIsInstance]


def _field_shape(datum: Datum, index: int, name: str) -> Shape:
    field = field_of(datum, index, name)
    if not field.shape:
        raise InvalidData(f"{name!r} of datum {index} is a scalar: pass one entry per position")
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
