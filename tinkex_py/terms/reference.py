"""Terms that compare the model with a reference."""

import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, cast

import torch

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidData
from tinkex_py.losses.spec import TermFunction, TermResult, is_async_term
from tinkex_py.terms.fields import aligned_field, like
from tinkex_py.terms.ready_made import NonEmptyStr
from tinkex_py.terms.reduction import Positions, ReducedTerm
from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor, TensorData
from tinkex_py.types.datum import target_shape

ReferenceLogprobs = torch.Tensor | Sequence[torch.Tensor | TensorData] | ForwardBackwardOutput
Reference = torch.Tensor | Callable[[Sequence[Datum]], ReferenceLogprobs | Awaitable[ReferenceLogprobs]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceTerm(ReducedTerm):
    """A ready-made term that needs the logprobs of a reference. They are constants: no gradient flows into them.

    Args:
        name: default name of the regularizer.
        reduction: see `Positions.reduce`.
        mask: see `ReducedTerm`.
        reference: a tensor that can be broadcast to the logprobs, or a function `reference(data)`, sync or async,
            that returns them packed, as one tensor per datum, or as the result of a client's `forward`.
        reference_field: a `loss_fn_inputs` field of every datum, in the shape of its logprobs. Exactly one of
            `reference` and `reference_field` is required.
    """

    reference: Reference | None = field(default=None, repr=False)
    reference_field: NonEmptyStr | None = None

    def __eq__(self, other: object) -> bool:
        """Compares all settings. A reference that is a tensor equals only itself."""
        return isinstance(other, ReferenceTerm) and type(self) is type(other) and self._compared() == other._compared()

    def __hash__(self) -> int:
        """Hash that is consistent with equality."""
        return hash(self._compared())

    def _compared(self) -> tuple[object, ...]:
        reference = id(self.reference) if isinstance(self.reference, torch.Tensor) else self.reference
        return reference, *(getattr(self, one.name) for one in fields(self) if one.name != "reference")

    def check(self) -> None:
        """Raises InvalidSpec unless exactly one usable reference is given."""
        given = [name for name in ("reference", "reference_field") if getattr(self, name) is not None]
        if len(given) != 1:
            raise self.invalid(
                "pass exactly one of reference=<tensor>, reference=<function> and reference_field=<name>, got "
                f"{' and '.join(given) or 'none'}"
            )
        if self.reference is not None and not isinstance(self.reference, torch.Tensor) and not callable(self.reference):
            raise self.invalid(f"reference must be a tensor or a function of the datums, got {shown(self.reference)}")

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult | Awaitable[TermResult]:
        """Computes the loss; returns an awaitable if the reference is async."""
        if self.reference_field is not None:
            reference = aligned_field(data, self.reference_field, logprobs)
        elif isinstance(self.reference, torch.Tensor):
            reference = _broadcast(self.reference, logprobs)
        else:
            assert self.reference is not None, "checked at construction"
            with torch.no_grad():
                found = self.reference(data)
            if inspect.isawaitable(found):
                return self._loss_later(found, data, logprobs)
            reference = _aligned(found, data, logprobs)
        return self.loss_against(reference, data, logprobs)

    @abstractmethod
    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; `reference` has the shape and dtype of the logprobs."""

    def _select_reference(self, positions: Positions, reference: torch.Tensor, data: Sequence[Datum]) -> torch.Tensor:
        """Returns the selected logprobs of the reference; raises InvalidData if they are no logprobs."""
        source = "the reference" if self.reference_field is None else f"the field {self.reference_field!r}"
        return positions.select_logprobs(reference, data, source)

    @property
    def compute(self) -> TermFunction:
        """`compute(data, logprobs, **settings)`; a coroutine function if the reference is one."""
        is_async = callable(self.reference) and is_async_term(self.reference)
        return self._compute_async if is_async else super().compute

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Returns the term with some settings replaced; `reference` and `reference_field` replace each other."""
        given = dict(options)
        if given.get("reference") is not None:
            given.setdefault("reference_field", None)
        elif given.get("reference_field") is not None:
            given.setdefault("reference", None)
        return super().with_options(given)

    async def _compute_async(self, data: Sequence[Datum], logprobs: torch.Tensor, **settings: Any) -> TermResult:
        result = self._compute(data, logprobs, **settings)
        return await result if inspect.isawaitable(result) else result

    async def _loss_later(self, found: Awaitable[object], data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        return self.loss_against(_aligned(await found, data, logprobs), data, logprobs)


def _broadcast(reference: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    try:
        return like(reference, logprobs).expand(logprobs.shape)
    except RuntimeError:
        raise _mismatch(tuple(reference.shape), logprobs) from None


def _aligned(found: object, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    """Converts what a reference function returned to one tensor like the logprobs."""
    if isinstance(found, ForwardBackwardOutput):
        found = found.packed.get("logprobs")
        if found is None:
            raise InvalidData(
                "the reference returned a ForwardBackwardOutput without 'logprobs': return that of a forward pass"
            )
    if isinstance(found, PackedTensor):
        found = [TensorData.from_numpy(found.datum(index)) for index in range(len(found))]
    if isinstance(found, Sequence) and not isinstance(found, str):
        found = _joined(cast("Sequence[object]", found), data, logprobs)
    if not isinstance(found, torch.Tensor):
        raise InvalidData(
            f"the reference returned a {type(found).__name__}: return a tensor, a list with one tensor per datum, or "
            "the result of a client's forward"
        )
    if found.shape != logprobs.shape:
        raise _mismatch(tuple(found.shape), logprobs)
    return like(found, logprobs)


def _joined(parts: Sequence[object], data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    if len(parts) != len(data):
        raise InvalidData(f"the reference returned {len(parts)} tensors for {len(data)} datums: return one per datum")
    tensors = [
        part if isinstance(part, torch.Tensor) else TensorData.of(cast("Any", part)).to_torch() for part in parts
    ]
    for index, (tensor, datum) in enumerate(zip(tensors, data, strict=True)):
        shape = tuple(tensor.shape)
        length = target_shape(datum, index)[:1] if "target_tokens" in datum.loss_fn_inputs else shape[:1]
        expected = (*length, *logprobs.shape[1:])
        if shape != expected:
            raise InvalidData(
                f"the logprobs of the reference have shape {shape} for datum {index}, those of the model {expected}"
            )
    return torch.cat(tensors)


def _mismatch(shape: tuple[int, ...], logprobs: torch.Tensor) -> InvalidData:
    return InvalidData(f"the logprobs of the reference have shape {shape}, those of the model {tuple(logprobs.shape)}")
