"""Datums with the logprobs on which a term is probed, and variants of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tinkex_py.errors import InvalidData
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.types import Datum, ModelInput
from tinkex_py.types.datum import target_shape
from tinkex_py.types.tensors import Array

_SAMPLER_NOISE = 0.1  # a policy that has moved a little from its sampler
_REFERENCE_NOISE = 0.3
_NO_LOGPROBS = ("target_tokens", "weights", "mask", "advantages")
_LARGEST = -1e-3  # of a probed logprob
_LEFT_MASS = 0.05  # logarithm of the probability that candidates leave to other tokens, at least


@dataclass(frozen=True)
class Case:
    """Datums and their logprobs, one tensor per datum, `[T]` or `[T, K]`."""

    data: Sequence[Datum]
    logprobs: Sequence[torch.Tensor]

    def values(self, name: str) -> list[Array] | None:
        """Returns a field of all datums; None if one of them lacks it."""
        if any(name not in datum.loss_fn_inputs for datum in self.data):
            return None
        return [datum.loss_fn_inputs[name].to_numpy() for datum in self.data]

    def logprob_fields(self) -> list[str]:
        """Returns the fields of all datums that hold logprobs: numbers in their shape, none of them above 0."""
        names = [name for name in self.data[0].loss_fn_inputs if name not in _NO_LOGPROBS]
        return [name for name in names if self._is_aligned(name) and ("logprob" in name or self._is_negative(name))]

    def _is_negative(self, name: str) -> bool:
        values = self.values(name)
        assert values is not None, "checked before"
        return all(bool((own <= 0).all()) for own in values) and any(bool((own < 0).any()) for own in values)

    def _is_aligned(self, name: str) -> bool:
        values = self.values(name)
        shapes = [tuple(part.shape) for part in self.logprobs]
        return values is not None and [value.shape for value in values] == shapes

    def with_values(self, name: str, values: Sequence[Array]) -> "Case":
        """Returns the case with another field."""
        data = [
            datum.with_inputs(**{name: own.astype(np.float32)}) for datum, own in zip(self.data, values, strict=True)
        ]
        return replace(self, data=data)

    def with_logprobs(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> "Case":
        """Returns the case with `change(logprobs, index)` of each datum."""
        return replace(self, logprobs=[change(part, index) for index, part in enumerate(self.logprobs)])

    def moved(self, direction: Sequence[torch.Tensor], distance: float) -> "Case":
        """Returns the case with logprobs a distance along a direction."""
        return self.with_logprobs(lambda part, index: part + distance * direction[index])

    def picked(self, indices: Sequence[int]) -> "Case":
        """Returns the case of some of the datums."""
        return Case([self.data[index] for index in indices], [self.logprobs[index] for index in indices])

    def with_longer(self, index: int) -> "Case":
        """Returns the case in which one datum is repeated within itself: all of its tokens come twice."""
        datum, part = self.data[index], self.logprobs[index]
        fields = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}
        long = Datum(
            model_input=ModelInput(chunks=datum.model_input.chunks * 2),
            loss_fn_inputs={
                name: np.concatenate([own, own]) if own.shape[:1] == part.shape[:1] else own
                for name, own in fields.items()
            },
        )
        data, logprobs = list(self.data), list(self.logprobs)
        data[index], logprobs[index] = long, torch.cat([part, part])
        return Case(data, logprobs)

    def excluded(self, mask: str | None) -> list[torch.Tensor] | None:
        """Returns which positions a mask excludes, `[T]` for each datum; None if there are none."""
        weights = None if mask is None else self.values(mask)
        lengths = [part.shape[:1] for part in self.logprobs]
        if weights is None or [own.shape[:1] for own in weights] != lengths:
            return None
        zero = [torch.tensor((own.reshape(len(own), -1) == 0).all(1)) for own in weights]
        return zero if any(bool(own.any()) for own in zero) else None


def case_of(data: Sequence[Datum], logprobs: torch.Tensor | Sequence[torch.Tensor] | None, *, seed: int = 0) -> Case:
    """Returns the case of some datums.

    Without logprobs, it has plausible ones: near a field of logprobs if there is one, that of the sampler first.

    Raises:
        InvalidData: there are no datums, or they have no targets.
        PipelineError: the logprobs are invalid.
    """
    if not data:
        raise InvalidData("data is empty: pass a few datums of the training data")
    shapes = [target_shape(datum, index) for index, datum in enumerate(data)]
    if logprobs is None:
        return _plausible(data, shapes, seed)
    own = Logprobs.from_tensors(logprobs, data)
    return Case(data, [part.double() for part in own.views(own.buffer, data)])


def _plausible(data: Sequence[Datum], shapes: Sequence[tuple[int, ...]], seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    case = Case(data, [-1.0 - part.abs() for part in noise])
    names = case.logprob_fields()
    name = "logprobs" if "logprobs" in names else next(iter(names), None)
    near = None if name is None else case.values(name)
    scale = _SAMPLER_NOISE if name == "logprobs" else _REFERENCE_NOISE
    if near is not None:
        centers = [torch.tensor(own, dtype=torch.float64) for own in near]
        case = case.with_logprobs(lambda _, index: _finite(centers[index]) + scale * noise[index])
    return case.with_logprobs(lambda part, _: _possible(part))


def _finite(part: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(part), part, -1.0)


def _possible(part: torch.Tensor) -> torch.Tensor:
    """Returns logprobs below 0, and with candidates below 1 together."""
    if part.ndim > 1:
        part = part - (part.logsumexp(-1, keepdim=True) + _LEFT_MASS).clamp(min=0.0)
    return part.clamp(max=_LARGEST)
