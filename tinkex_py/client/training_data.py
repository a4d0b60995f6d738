"""What a training client checks before anything is sent."""

import math
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tinkex_py.errors import InvalidData
from tinkex_py.transport.codec import NO_DATUMS, PassHeader, encode_request
from tinkex_py.types import Datum
from tinkex_py.types.datum import target_shape

# The protocol's own losses, and what they need beside target_tokens. Other names are a service's own affair.
_SAMPLED = ("logprobs", "advantages")
_NEEDED: Mapping[str, Sequence[str]] = {
    "cross_entropy": (),
    "importance_sampling": _SAMPLED,
    "ppo": _SAMPLED,
    "cispo": _SAMPLED,
    "dro": _SAMPLED,
    "gspo": (*_SAMPLED, "sequence_ratio_mask"),
}

_CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def check_data(data: Sequence[Datum]) -> Sequence[Datum]:
    """The datums, if they are datums and there is at least one.

    Raises:
        InvalidData: no datum, or something that is none.
    """
    if isinstance(data, Datum) or not isinstance(data, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"data must be a list of Datum, got a {type(data).__name__}")
    if not data:
        raise InvalidData("data is empty: a training request needs at least one datum")
    for index, datum in enumerate(data):
        if not isinstance(datum, Datum):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"data[{index}] must be a Datum, got a {type(datum).__name__}")
        if datum.model_input.length == 0:
            raise InvalidData(f"model_input of datum {index} is empty")
    return list(data)


def check_targets(data: Sequence[Datum]) -> None:
    """Checks that every datum has targets that fit its input, and weights that fit its targets.

    Raises:
        InvalidData: naming the datum, the field and both shapes.
    """
    for index, datum in enumerate(data):
        shape = target_shape(datum, index)
        targets = datum.loss_fn_inputs["target_tokens"]
        if targets.dtype != "int64":
            raise InvalidData(f"target_tokens of datum {index} must be integers, got {targets.dtype}")
        if shape[0] != datum.model_input.length:
            raise InvalidData(
                f"target_tokens of datum {index} have shape {shape}, but its model_input has "
                f"{datum.model_input.length} tokens: one target per input position is needed (targets are pre-shifted)"
            )
        weights = datum.loss_fn_inputs.get("weights")
        if weights is not None and weights.shape != shape:
            raise InvalidData(
                f"weights of datum {index} have shape {weights.shape}, its target_tokens {shape}; they must be equal"
            )


def check_inputs(data: Sequence[Datum], loss_fn: str) -> None:
    """Checks that every datum has what one of the protocol's losses needs; other losses are not checked.

    Raises:
        InvalidData: as `check_targets`, or naming the datum and the missing field.
    """
    needed = _NEEDED.get(loss_fn)
    if needed is None:
        return
    check_targets(data)
    for index, datum in enumerate(data):
        missing = [name for name in needed if name not in datum.loss_fn_inputs]
        if missing:
            raise InvalidData(
                f"datum {index} has no {', '.join(map(repr, missing))} in loss_fn_inputs, which loss_fn {loss_fn!r} "
                f"needs (it has {sorted(datum.loss_fn_inputs)})"
            )


def check_loss(loss_fn: str, config: Mapping[str, float | str]) -> None:
    """Checks the name and the settings of one of the service's losses.

    Raises:
        InvalidData: naming what cannot be sent.
    """
    if not isinstance(loss_fn, str) or not loss_fn:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"loss_fn must be the name of a loss, got {loss_fn!r}")
    if not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"loss_fn_config must map names to numbers or texts, got {config!r}")
    for name, value in config.items():
        sendable = isinstance(value, str | int | float) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not isinstance(name, str) or not sendable:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"loss_fn_config must map names to numbers or texts, got {name!r}: {value!r}")
    try:
        encode_request(NO_DATUMS, PassHeader("", 1, loss_fn, config, forward_only=True))
    except (ValueError, OverflowError) as error:
        raise InvalidData(f"loss_fn {loss_fn!r} with {dict(config)!r} cannot be encoded: {error}") from None


def check_finite(data: Sequence[Datum], config: Mapping[str, float | str], *, fields: Collection[str] | None) -> None:
    """Checks that JSON, which has neither NaN nor infinity, can hold all numbers.

    Args:
        data: the datums.
        config: settings of the loss.
        fields: the loss inputs that are sent; None is all.

    Raises:
        InvalidData: naming the datum and the field.
    """
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidData(f"loss_fn_config[{name!r}] is {value}, which JSON cannot hold: use wire='protobuf'")
    for index, datum in enumerate(data):
        for name, tensor in datum.loss_fn_inputs.items():
            is_sent = fields is None or name in fields
            if is_sent and tensor.dtype == "float32" and not np.isfinite(tensor.data).all():
                raise InvalidData(
                    f"{name!r} of datum {index} is not finite, which JSON cannot hold: use wire='protobuf'"
                )


def check_name(name: str) -> str:
    """A checkpoint name the service can use as a path segment.

    Raises:
        InvalidData: it is not one.
    """
    if not isinstance(name, str) or not _CHECKPOINT_NAME.fullmatch(name):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"a checkpoint name has 1 to 128 letters, digits, '_', '.', '-', got {name!r}")
    return name
