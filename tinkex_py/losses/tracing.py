"""Traces a pipeline into a graph that a service runs on each datum, and reads the metrics that the service reports.

The graph computes the values of all terms as metrics and their weighted sum as the loss. The weights are inputs, so a
schedule does not change the graph. Every step traces again: tracing is fast, and values captured by the functions of
the terms may have changed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.fx
from torch.fx.proxy import GraphAppendingTracer

from tinkex_py.errors import InvalidData, InvalidResponse, UnsupportedFeature
from tinkex_py.losses.additivity import check_sum_over_positions, operation
from tinkex_py.losses.datum_sums import SumOverDatums, metric_over_datums
from tinkex_py.losses.gradients import Evaluation
from tinkex_py.losses.graph_encoding import encode_graph
from tinkex_py.losses.outcomes import prepare_regularizer, report, total
from tinkex_py.losses.output import BASE_LOSS_NAME, BaseLossOutput, CustomLossOutput, MetricValue
from tinkex_py.losses.pipeline import Pipeline
from tinkex_py.losses.spec import PerDatum, RegularizerSpec, Term, is_async_term, term_function
from tinkex_py.losses.weights import WeightController, weight_at
from tinkex_py.types import Datum, ForwardBackwardOutput, TensorData

MAX_INPUTS = 16
_WEIGHT = "tinkex_weight_{}"
# Operations without a gradient.
_WITHOUT_GRADIENT = frozenset({"detach", "gt", "lt", "ge", "le", "eq", "ne", "isnan", "isinf", "isfinite", "sign"})


@dataclass(frozen=True)
class TracedTerm:
    """One term of a traced pipeline.

    Attributes:
        value: metric of the service with the value of the term.
        metrics: metrics of the term: name -> metric of the service.
        constants: metrics of the term that are not tensors.
    """

    name: str
    value: str
    metrics: Mapping[str, str]
    constants: Mapping[str, MetricValue]
    differentiable: bool


@dataclass(frozen=True)
class TracedPipeline:
    """A pipeline that the service can run.

    Attributes:
        terms: the base loss, then the enabled regularizers.
        specs: the enabled regularizers.
        inputs: names and ranks of the inputs of the graph, logprobs first.
        fields: the inputs that are `loss_fn_inputs` fields.
        graph: the encoded graph.
        digest: hash of the graph and its inputs.
    """

    terms: Sequence[TracedTerm]
    specs: Sequence[RegularizerSpec]
    inputs: Sequence[tuple[str, int]]
    fields: Sequence[str]
    graph: Mapping[str, Any]
    digest: str

    @property
    def differentiable(self) -> bool:
        """False if no term depends on the logprobs."""
        return any(term.differentiable for term in self.terms)

    def weights(self, step: int) -> list[float]:
        """Returns the weights of the regularizers at a step.

        Raises:
            InvalidSpec: a schedule failed.
        """
        return [weight_at(spec.weight, spec.name, step) for spec in self.specs]

    def datums(self, data: Sequence[Datum], weights: Sequence[float]) -> list[Datum]:
        """Returns the datums with only the fields that the graph needs, and the weights."""
        scalars = {
            _WEIGHT.format(index): TensorData(data=[weight], dtype="float32", shape=())
            for index, weight in enumerate(weights)
        }
        return [
            Datum(
                model_input=datum.model_input,
                loss_fn_inputs={
                    "target_tokens": datum.loss_fn_inputs["target_tokens"],
                    **{name: datum.loss_fn_inputs[name] for name in self.fields},
                    **scalars,
                },
            )
            for datum in data
        ]

    def output(self, result: ForwardBackwardOutput, weights: Sequence[float]) -> CustomLossOutput:
        """Returns the output for the user.

        Raises:
            InvalidResponse: the service did not report a value.
        """
        base, *others = [
            Evaluation(_reported(result, term.value), _metrics(result, term), None, None, term.differentiable)
            for term in self.terms
        ]
        regularizers = {
            spec.name: report(replace(prepare_regularizer(spec), weight=weight), evaluation)
            for spec, weight, evaluation in zip(self.specs, weights, others, strict=True)
        }
        contributions = [output.contribution for output in regularizers.values()]
        return CustomLossOutput(
            loss_total=total([base.value, *contributions]),
            base_loss=BaseLossOutput(value=base.value, metrics=base.metrics),
            regularizers=regularizers,
            regularizer_total=total(contributions),
            service_output=result,
        )


def trace_pipeline(pipeline: Pipeline, data: Sequence[Datum]) -> TracedPipeline:
    """Traces all terms into one graph.

    Args:
        pipeline: the pipeline.
        data: validated datums; they determine the ranks of the inputs.

    Raises:
        UnsupportedFeature: the pipeline cannot run on a service; the message contains the reason.
        InvalidData: a datum lacks a field that a term needs.
    """
    specs = [spec for spec in pipeline.regularizers if spec.enabled]
    _check_options(pipeline, specs)
    named: list[tuple[str, Term, Mapping[str, Any]]] = [
        (BASE_LOSS_NAME, pipeline.base_loss, {}),
        *((spec.name, spec.fn, spec.options) for spec in specs),
    ]
    fields = list(dict.fromkeys(name for _, term, _ in named for name in _fields(term)))
    inputs = [("logprobs", _rank(data, "target_tokens")), *((name, _rank(data, name)) for name in fields)]
    inputs += [(_WEIGHT.format(index), 0) for index in range(len(specs))]
    if len(inputs) > MAX_INPUTS:
        raise UnsupportedFeature(
            f"the terms and weights of the pipeline have {len(inputs)} inputs, but a service accepts at most "
            f"{MAX_INPUTS}: use fewer regularizers or fields"
        )
    trace = _Trace(inputs, len(data))
    terms = [trace.add(index, name, term, options) for index, (name, term, options) in enumerate(named)]
    graph = encode_graph(trace.finish())
    digest = hashlib.sha256(json.dumps([inputs, graph], sort_keys=True).encode()).hexdigest()
    return TracedPipeline(terms, specs, inputs, fields, graph, digest)


class _NoGradTracer(GraphAppendingTracer):
    """Rejects operations under `torch.no_grad()`, because a graph would compute them with a gradient."""

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if not torch.is_grad_enabled():
            raise UnsupportedFeature("it uses torch.no_grad(), which a graph cannot express: use detach()")
        return super().create_node(*args, **kwargs)  # pyright: ignore[reportUnknownMemberType]


class _UnreadableData(Sequence[Datum]):
    """Replaces the datums while a packed term is traced."""

    def __len__(self) -> int:
        raise self._refusal()

    def __getitem__(self, index: Any) -> Any:
        raise self._refusal()

    def _refusal(self) -> UnsupportedFeature:
        return UnsupportedFeature(
            "it reads the datums: accept the fields that it needs as parameters of a function under sum_over_datums"
        )


class _Trace:
    """Builds the graph term by term."""

    def __init__(self, inputs: Sequence[tuple[str, int]], datums: int) -> None:
        self._datums = datums
        self._graph = torch.fx.Graph()
        self._tracer = _NoGradTracer(self._graph)
        nodes = {name: self._graph.placeholder(name) for name, _ in inputs}
        self._logprobs = nodes["logprobs"]
        self._proxies = {name: torch.fx.Proxy(node, self._tracer) for name, node in nodes.items()}
        self._total: Any = None
        self._metrics: dict[str, torch.fx.Node] = {}

    def add(self, index: int, name: str, term: Term, options: Mapping[str, Any]) -> TracedTerm:
        """Traces one term; index 0 is the base loss."""
        try:
            return self._add(index, name, term, options)
        except UnsupportedFeature as error:
            raise UnsupportedFeature(f"term {name!r} cannot run on the service: {error}") from error.__cause__

    def finish(self) -> torch.fx.Graph:
        """Returns the graph with its output."""
        self._graph.output((self._total.node, dict(self._metrics)))
        self._graph.eliminate_dead_code()
        return self._graph

    def _add(self, index: int, name: str, term: Term, options: Mapping[str, Any]) -> TracedTerm:
        before = len(self._graph.nodes)
        loss, named = self._called(term, options)
        nodes = list(self._graph.nodes)[before:]
        tensors = {key: value for key, value in named.items() if isinstance(value, torch.fx.Proxy)}
        if not isinstance(term, PerDatum):
            self._check_packed(nodes, loss, tensors)
        value = loss.sum()
        weight: Any = None if index == 0 else self._proxies[_WEIGHT.format(index - 1)]
        contribution: Any = value if weight is None else weight * value
        self._total = contribution if self._total is None else self._total + contribution
        value_key = self._report(f"custom/v{index}:sum", value)
        keys = {
            key: self._report(f"custom/m{index}.{place}:{'mean' if key.endswith(':mean') else 'sum'}", tensor.sum())
            for place, (key, tensor) in enumerate(tensors.items())
        }
        # A term per datum returns its constants for each datum, a packed term for all.
        count = self._datums if isinstance(term, PerDatum) else 1
        constants = {
            key: metric_over_datums(key, count * _constant(key, metric), count)
            for key, metric in named.items()
            if key not in tensors
        }
        return TracedTerm(name, value_key, keys, constants, self._depends_on_logprobs(value.node))

    def _called(self, term: Term, options: Mapping[str, Any]) -> tuple[torch.fx.Proxy, Mapping[str, Any]]:
        if isinstance(term, PerDatum) and isinstance(term.fn, SumOverDatums):
            inner = term.fn
            arguments = [self._proxies[name] for name in ("logprobs", *inner.inputs)]
            result = _run(inner.fn, arguments, options)
        elif isinstance(term, PerDatum):
            raise UnsupportedFeature("it receives all datums at once (per_datum): write it with sum_over_datums")
        else:
            result = _run(term_function(term), [_UnreadableData(), self._proxies["logprobs"]], options)
        pair: tuple[Any, Any] = cast("tuple[Any, Any]", result) if isinstance(result, tuple) else (result, {})
        loss, named = pair
        if not isinstance(loss, torch.fx.Proxy) or not isinstance(named, Mapping):
            raise UnsupportedFeature(
                f"its loss is a {type(loss).__name__} that is not computed from its arguments: return a tensor that "
                "depends on the logprobs"
            )
        return loss, cast("Mapping[str, Any]", named)

    def _check_packed(
        self, nodes: Sequence[torch.fx.Node], loss: torch.fx.Proxy, metrics: Mapping[str, torch.fx.Proxy]
    ) -> None:
        shapes = check_sum_over_positions(nodes, self._logprobs)
        for key, metric in metrics.items():
            if shapes[metric.node] != "sum" or key.endswith(":mean"):
                raise UnsupportedFeature(
                    f"its metric {key!r} is not a sum over positions: use sum(), or remove the metric"
                )
        assert loss.node in shapes, "the loss is one of the nodes"

    def _report(self, key: str, value: torch.fx.Proxy) -> str:
        self._metrics[key] = value.node
        return key

    def _depends_on_logprobs(self, result: torch.fx.Node) -> bool:
        dependent = {self._logprobs}
        for node in self._graph.nodes:
            if operation(node) not in _WITHOUT_GRADIENT and not dependent.isdisjoint(node.all_input_nodes):
                dependent.add(node)
        return result in dependent


def _run(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> object:
    try:
        with torch.enable_grad():
            return function(*arguments, **options)
    except UnsupportedFeature:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise UnsupportedFeature(f"tracing it failed with {type(error).__name__}: {first}") from error


def _check_options(pipeline: Pipeline, specs: Sequence[RegularizerSpec]) -> None:
    if pipeline.combine != "sum":
        raise UnsupportedFeature(
            f"combine={pipeline.combine!r} needs the gradient of every term, which the service does not return"
        )
    if pipeline.track_grad_norms:
        raise UnsupportedFeature(
            "track_grad_norms=True needs the gradient of every term, which the service does not return"
        )
    if is_async_term(pipeline.base_loss):
        raise UnsupportedFeature(f"term {BASE_LOSS_NAME!r} is async")
    for spec in specs:
        reason = _why_not(spec)
        if reason is not None:
            raise UnsupportedFeature(f"term {spec.name!r} {reason}")


def _why_not(spec: RegularizerSpec) -> str | None:
    if spec.is_async or (spec.is_async is None and is_async_term(spec.fn)):
        return "is async"
    if spec.on_error == "skip":
        return "has on_error='skip', but on the service all terms succeed or fail together"
    if spec.max_grad_norm is not None:
        return "has max_grad_norm, which needs the gradient of the term, and the service does not return it"
    if isinstance(spec.weight, WeightController):
        return "has a weight controller, which needs the values before the next optimizer step is sent"
    return None


def _fields(term: Term) -> Sequence[str]:
    return term.fn.inputs if isinstance(term, PerDatum) and isinstance(term.fn, SumOverDatums) else ()


def _rank(data: Sequence[Datum], name: str) -> int:
    """Returns the number of dimensions that a field has in all datums."""
    for index, datum in enumerate(data):
        if name not in datum.loss_fn_inputs:
            raise InvalidData(
                f"datum {index} has no {name!r} in loss_fn_inputs (it has {sorted(datum.loss_fn_inputs)})"
            )
    ranks = {len(datum.loss_fn_inputs[name].shape) for datum in data}
    if len(ranks) > 1:
        raise UnsupportedFeature(
            f"{name!r} has {sorted(ranks)} dimensions in different datums, but an input of a graph has one rank"
        )
    (rank,) = ranks
    if rank > 2:
        raise UnsupportedFeature(f"{name!r} has {rank} dimensions, but an input of a graph has at most 2")
    return rank


def _constant(key: str, value: object) -> MetricValue:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.detach().item()
    if not isinstance(value, bool | int | float):
        raise UnsupportedFeature(f"its metric {key!r} must be a number, got a {type(value).__name__}")
    return value


def _reported(result: ForwardBackwardOutput, key: str) -> float:
    value = result.metrics.get(key)
    if value is None:
        raise InvalidResponse(
            f"the service did not report the metric {key!r} of the uploaded loss: use execution='client'"
        )
    return float(value)


def _metrics(result: ForwardBackwardOutput, term: TracedTerm) -> dict[str, MetricValue]:
    return {**{name: _reported(result, key) for name, key in term.metrics.items()}, **term.constants}
