"""Terms that sum a function over the datums. They can also run on the service."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidData, InvalidSpec
from tinkex_py.losses.spec import Metric, PerDatum, TermFunction, TermResult, per_datum, term_name
from tinkex_py.types import Datum
from tinkex_py.types.datum import field_of

if TYPE_CHECKING:
    import torch

_PLAIN = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class SumOverDatums:
    """A term made by `sum_over_datums`.

    Attributes:
        fn: the function of one datum.
        inputs: names of the `loss_fn_inputs` fields that `fn` accepts, in order.
        options: names of its parameters with defaults.
    """

    fn: Callable[..., TermResult]
    inputs: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def name(self) -> str | None:
        """Name of the function, if it has one."""
        return term_name(self.fn)

    @property
    def compute(self) -> TermFunction:
        """The function `compute(data, logprobs, **options)`, with one tensor per datum."""

        def compute(data: Sequence[Datum], logprobs: "Sequence[torch.Tensor]", **options: Any) -> TermResult:
            return self._summed(data, logprobs, options)

        keyword = inspect.Parameter.KEYWORD_ONLY
        positional = list(inspect.signature(compute).parameters.values())[:2]
        named = [inspect.Parameter(name, keyword, default=None) for name in self.options]
        setattr(compute, "__signature__", inspect.Signature([*positional, *named]))  # noqa: B010  # not a typed attribute
        return compute

    def _summed(
        self, data: Sequence[Datum], logprobs: "Sequence[torch.Tensor]", options: Mapping[str, Any]
    ) -> TermResult:
        from tinkex_py.losses.known_gradient import as_loss  # loads torch

        if not data:
            raise InvalidData("sum_over_datums calls the function once per datum, but data is empty: pass the datums")
        losses: list[torch.Tensor] = []
        metrics: dict[str, Any] = {}
        for index, (datum, own) in enumerate(zip(data, logprobs, strict=True)):
            fields = [field_of(datum, index, name).to_torch().to(own.device) for name in self.inputs]
            result: Any = as_loss(self.fn(own, *fields, **options), own, self.name or "sum_over_datums")
            parts: tuple[Any, ...] = cast("tuple[Any, ...]", result) if isinstance(result, tuple) else (result, {})
            loss, named = parts[0], cast("Mapping[str, Metric]", parts[1])
            losses.append(loss.sum())
            for name, value in named.items():
                metrics[name] = metrics.get(name, 0.0) + value
        total: torch.Tensor = sum(losses[1:], losses[0])
        return total, {name: metric_over_datums(name, value, len(data)) for name, value in metrics.items()}


def metric_over_datums(name: str, total: Any, count: int) -> Any:
    """Returns a metric over all datums: the mean if its name ends with ":mean", else the sum."""
    return total / count if name.endswith(":mean") else total


def sum_over_datums(fn: Callable[..., TermResult]) -> PerDatum:
    """Makes a term that sums a function of one datum over the datums.

    The function has the signature that the official SDK's `create_custom_loss` expects. On services that accept
    uploaded losses the term can be traced and run there (`execution="server"`).

    Args:
        fn: `fn(logprobs, advantages, ...) -> loss` or `(loss, metrics)`. `logprobs` belongs to one datum, `[T]` or
            `[T, K]`. Every other parameter without a default is the name of a `loss_fn_inputs` field and receives it
            as a tensor. Parameters with defaults are options. A non-scalar loss is summed. Metrics are summed over the
            datums, or averaged if their name ends with ":mean".

    Raises:
        InvalidSpec: the parameters of the function do not have this form.
    """
    if not callable(fn) or inspect.iscoroutinefunction(fn):
        raise InvalidSpec(f"sum_over_datums: fn must be a plain function, not async, got {shown(fn)}")
    parameters = list(inspect.signature(fn).parameters.values())
    variable = [parameter.name for parameter in parameters if parameter.kind.name.startswith("VAR_")]
    inputs = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if variable or not inputs or any(parameter.kind not in _PLAIN for parameter in inputs):
        raise InvalidSpec(
            "sum_over_datums: the parameters of fn must be logprobs and then names of loss_fn_inputs fields, as in "
            f"fn(logprobs, advantages); got {inspect.signature(fn)}"
        )
    options = tuple(parameter.name for parameter in parameters if parameter not in inputs)
    return per_datum(SumOverDatums(fn, tuple(parameter.name for parameter in inputs[1:]), options))
