"""Terms that compare the model with a reference: where the reference's logprobs come from."""

import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch

from tinkex_py.errors import InvalidData, InvalidSpec
from tinkex_py.losses.spec import TermFunction, TermResult, is_async_term
from tinkex_py.terms.fields import aligned_field, like
from tinkex_py.terms.reduction import ReducedTerm
from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor, TensorData
from tinkex_py.types.datum import target_shape

ReferenceLogprobs = torch.Tensor | Sequence[torch.Tensor | TensorData] | ForwardBackwardOutput
Reference = torch.Tensor | Callable[[Sequence[Datum]], ReferenceLogprobs | Awaitable[ReferenceLogprobs]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceTerm(ReducedTerm):
    """A ready-made term that needs a reference's logprobs. They are constants: no gradient flows into them.

    Args:
        name: the regularizer's name, if its spec gives none.
        reduction: how the numbers become one loss, see `Positions.reduce`.
        mask: a `loss_fn_inputs` field that says what counts, see `Positions.of`.
        reference: a tensor that can be broadcast to the logprobs, or a function `reference(data)`, sync or async,
            that gives the reference's logprobs: packed, or one tensor per datum, or what a client's `forward` gives.
            So another training client's `forward` is a reference as it is.
        reference_field: a `loss_fn_inputs` field of every datum that holds them, in the shape of the datum's logprobs.
            Exactly one of the two is given.
    """

    reference: Reference | None = field(default=None, repr=False)
    reference_field: str | None = None

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_text("reference_field", optional=True)
        given = [name for name in ("reference", "reference_field") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidSpec(
                f"{type(self).__name__} needs exactly one of reference=<tensor>, reference=<function> and "
                f"reference_field=<name>, got {' and '.join(given) or 'none'}"
            )
        if self.reference is not None and not isinstance(self.reference, torch.Tensor) and not callable(self.reference):
            raise self._refuse("reference", "a tensor or a function of the datums")

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult | Awaitable[TermResult]:
        """The formula; an awaitable of its result if the reference is async."""
        found = self._find(data, logprobs)
        if inspect.isawaitable(found):
            return self._loss_later(found, data, logprobs)
        return self.loss_against(_aligned(found, data, logprobs), data, logprobs)

    @abstractmethod
    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; `reference` has the shape and dtype of the logprobs."""

    @property
    def compute(self) -> TermFunction:
        """`compute(data, logprobs, **settings)`; a coroutine function if the reference is one."""
        if not (callable(self.reference) and is_async_term(self.reference)):
            return super().compute

        async def compute(data: Sequence[Datum], logprobs: torch.Tensor, **settings: Any) -> TermResult:
            result = self.with_options(settings).loss(data, logprobs)
            return await result if inspect.isawaitable(result) else result

        return self._with_settings_in_signature(compute)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same term with some settings replaced; a reference given in one way replaces that of the other."""
        given = dict(options)
        if given.get("reference") is not None:
            given.setdefault("reference_field", None)
        elif given.get("reference_field") is not None:
            given.setdefault("reference", None)
        return super().with_options(given)

    def _find(self, data: Sequence[Datum], logprobs: torch.Tensor) -> object:
        if self.reference_field is not None:
            return aligned_field(data, self.reference_field, logprobs)
        if isinstance(self.reference, torch.Tensor):
            return _broadcast(self.reference, logprobs)
        assert self.reference is not None, "checked at construction"
        with torch.no_grad():
            return self.reference(data)

    async def _loss_later(self, found: Awaitable[object], data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        return self.loss_against(_aligned(await found, data, logprobs), data, logprobs)


def _broadcast(reference: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    try:
        return like(reference, logprobs).expand(logprobs.shape)
    except RuntimeError:
        raise _misfit(tuple(reference.shape), logprobs) from None


def _aligned(found: object, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    """What a reference gave, as one tensor of the logprobs' shape and dtype on their device."""
    if isinstance(found, ForwardBackwardOutput):
        found = found.packed.get("logprobs")
        if found is None:
            raise InvalidData("the reference gave a ForwardBackwardOutput without 'logprobs'")
    if isinstance(found, PackedTensor):
        found = [TensorData.from_numpy(found.datum(index)) for index in range(len(found))]
    if isinstance(found, Sequence) and not isinstance(found, str):
        found = _joined(cast("Sequence[object]", found), data, logprobs)
    if not isinstance(found, torch.Tensor):
        raise InvalidData(
            f"the reference gave a {type(found).__name__}, not a tensor, a list with one tensor per datum, or the "
            "result of a client's forward"
        )
    if found.shape != logprobs.shape:
        raise _misfit(tuple(found.shape), logprobs)
    return like(found, logprobs)


def _joined(parts: Sequence[object], data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    if len(parts) != len(data):
        raise InvalidData(f"the reference gave {len(parts)} tensors for {len(data)} datums")
    tensors = [_tensor(part) for part in parts]
    for index, (tensor, datum) in enumerate(zip(tensors, data, strict=True)):
        shape = tuple(tensor.shape)
        length = target_shape(datum, index)[:1] if "target_tokens" in datum.loss_fn_inputs else shape[:1]
        if shape != (*length, *logprobs.shape[1:]):
            raise InvalidData(
                f"the reference's logprobs of datum {index} have shape {shape}, those of the model "
                f"{(*length, *logprobs.shape[1:])}"
            )
    return torch.cat(tensors)


def _tensor(part: object) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else TensorData.of(cast("Any", part)).to_torch()


def _misfit(shape: tuple[int, ...], logprobs: torch.Tensor) -> InvalidData:
    return InvalidData(f"the reference's logprobs have shape {shape}, those of the model {tuple(logprobs.shape)}")
