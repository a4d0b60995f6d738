"""Terms that are the sum over datums of one function of a datum: they can also run on the service."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinkex_py.errors import InvalidData, InvalidSpec
from tinkex_py.losses.spec import Metric, PerDatum, TermFunction, TermResult, per_datum, term_name
from tinkex_py.types import Datum

if TYPE_CHECKING:
    import torch

_PLAIN = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class SumOverDatums:
    """What `sum_over_datums` wraps.

    Attributes:
        fn: the function of one datum.
        inputs: the `loss_fn_inputs` fields that it takes, in order.
        options: the names of its further parameters, which have defaults.
    """

    fn: Callable[..., TermResult]
    inputs: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def name(self) -> str | None:
        """The function's own `name`, if it has one."""
        return term_name(self.fn)

    @property
    def compute(self) -> TermFunction:
        """`compute(data, logprobs, **options)`, with one tensor per datum."""

        def compute(data: Sequence[Datum], logprobs: "Sequence[torch.Tensor]", **options: Any) -> TermResult:
            return self._summed(data, logprobs, options)

        keyword = inspect.Parameter.KEYWORD_ONLY
        positional = list(inspect.signature(compute).parameters.values())[:2]
        named = [inspect.Parameter(name, keyword, default=None) for name in self.options]
        setattr(compute, "__signature__", inspect.Signature([*positional, *named]))  # noqa: B010  # not a typed attribute
        return compute

    def values(self, datum: Datum, index: int) -> "list[torch.Tensor]":
        """The fields of a datum that the function takes.

        Raises:
            InvalidData: the datum lacks one.
        """
        missing = [name for name in self.inputs if name not in datum.loss_fn_inputs]
        if missing:
            raise InvalidData(
                f"datum {index} has no {missing[0]!r} in loss_fn_inputs (it has {sorted(datum.loss_fn_inputs)})"
            )
        return [datum.loss_fn_inputs[name].to_torch() for name in self.inputs]

    def _summed(
        self, data: Sequence[Datum], logprobs: "Sequence[torch.Tensor]", options: Mapping[str, Any]
    ) -> TermResult:
        if not data:
            raise InvalidData("sum_over_datums needs the datums: it calls the function once for each")
        losses: list[torch.Tensor] = []
        metrics: dict[str, Any] = {}
        for index, (datum, own) in enumerate(zip(data, logprobs, strict=True)):
            fields = [field.to(own.device) for field in self.values(datum, index)]
            result = self.fn(own, *fields, **options)
            named: Mapping[str, Metric] = result[1] if isinstance(result, tuple) else {}
            loss = result[0] if isinstance(result, tuple) else result
            losses.append(loss.sum())
            for name, value in named.items():
                metrics[name] = metrics.get(name, 0.0) + value
        total: torch.Tensor = sum(losses[1:], losses[0])
        return total, {name: metric_over_datums(name, value, len(data)) for name, value in metrics.items()}


def metric_over_datums(name: str, total: Any, count: int) -> Any:
    """A metric of all datums: their mean if its name ends with ":mean", else their sum."""
    return total / count if name.endswith(":mean") else total


def sum_over_datums(fn: Callable[..., TermResult]) -> PerDatum:
    """Makes a term of a function of one datum; the term is the sum over the datums.

    The function is what the official SDK's `create_custom_loss` takes. Where the service takes uploaded losses, such a
    term can be traced and run there (`execution="server"`).

    Args:
        fn: `fn(logprobs, advantages, ...) -> loss` or `(loss, metrics)`. `logprobs` is the datum's own, `[T]` or
            `[T, K]`; every further parameter without a default names a field of `loss_fn_inputs`, and comes as a
            tensor; parameters with defaults are options. A loss with dimensions is summed. Metrics are summed over the
            datums, or averaged where their name ends with ":mean".

    Raises:
        InvalidSpec: the function's parameters do not fit.
    """
    if not callable(fn) or inspect.iscoroutinefunction(fn):
        raise InvalidSpec(f"sum_over_datums takes a plain function, got {fn!r}")
    parameters = list(inspect.signature(fn).parameters.values())
    variable = [parameter.name for parameter in parameters if parameter.kind.name.startswith("VAR_")]
    inputs = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if variable or not inputs or any(parameter.kind not in _PLAIN for parameter in inputs):
        raise InvalidSpec(
            "sum_over_datums: the function must take logprobs and then named fields of loss_fn_inputs, as in "
            f"fn(logprobs, advantages); got {inspect.signature(fn)}"
        )
    options = tuple(parameter.name for parameter in parameters if parameter not in inputs)
    return per_datum(SumOverDatums(fn, tuple(parameter.name for parameter in inputs[1:]), options))
