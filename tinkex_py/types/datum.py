"""One training example."""

from collections.abc import Mapping
from typing import Any, cast

from pydantic import field_validator

from tinkex_py.errors import InvalidData
from tinkex_py.types.base import WireModel
from tinkex_py.types.model_input import ModelInput
from tinkex_py.types.tensors import TensorData, TensorInput


class Datum(WireModel):
    """One training example: what the model reads, and what the loss needs.

    Position `i` of every loss input belongs to the prediction made at input position `i`: for a token
    sequence `s`, `model_input` holds `s[:-1]` and `target_tokens` holds `s[1:]`.

    Args:
        model_input: `N` tokens.
        loss_fn_inputs: name -> values, as lists, numpy arrays, torch tensors or TensorData, with one entry
            per position: `[N]`, or `[N, K]` for `K` candidate targets.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, TensorData]

    def __init__(self, *, model_input: ModelInput, loss_fn_inputs: Mapping[str, TensorInput]) -> None:
        super().__init__(model_input=model_input, loss_fn_inputs=loss_fn_inputs)

    @field_validator("loss_fn_inputs", mode="before")
    @classmethod
    def _pack(cls, inputs: Any) -> dict[str, TensorData]:
        if not isinstance(inputs, Mapping):
            raise InvalidData(f"loss_fn_inputs must map names to tensors, got a {type(inputs).__name__}")
        packed: dict[str, TensorData] = {}
        for name, value in cast("Mapping[object, Any]", inputs).items():
            if not isinstance(name, str) or not name.isprintable():
                raise InvalidData(f"the names of loss_fn_inputs must be printable texts, got {name!r}")
            try:
                packed[name] = TensorData.of(value, name=name)
            except InvalidData as error:
                raise InvalidData(f"loss_fn_inputs[{name!r}]: {error}") from None
        return packed


def target_shape(datum: Datum, index: int) -> tuple[int, ...]:
    """Shape of a datum's `target_tokens`.

    Raises:
        InvalidData: there are none, or they are neither `[T]` nor `[T, K]`.
    """
    if not isinstance(datum, Datum):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"data[{index}] must be a Datum, got a {type(datum).__name__}")
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is None:
        raise InvalidData(
            f"datum {index} has no 'target_tokens' in loss_fn_inputs (it has {sorted(datum.loss_fn_inputs)})"
        )
    if len(targets.shape) not in (1, 2):
        raise InvalidData(f"target_tokens of datum {index} must be [T] or [T, K], got shape {targets.shape}")
    return targets.shape
