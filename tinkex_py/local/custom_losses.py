"""Uploaded losses: traced graphs, checked and interpreted node by node; none of their content runs as code.

The format is that of the protocol ("Custom losses on the server"): nodes in the order in which they run.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
import torch.fx
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.custom_operations import FUNCTIONS, LARGEST_INTEGER, METHODS, Function, cost
from tinkex_py.local.losses import DatumLoss, Inputs, Loss

CUSTOM_LOSS = "custom"
LOSSES_PER_SESSION = 256
MAX_NODES = 2000
MAX_ITEMS = 256
MAX_DEPTH = 6
MAX_ARGUMENTS = 20_000
"""Values in the arguments of all nodes."""
MAX_TEXT = 64
MAX_INPUTS = 16
MAX_ELEMENTS = 2**26
"""Elements of all intermediate results for one datum: 256 MiB of float32."""

_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d+)?")
_DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")
_CONSTANTS: Mapping[tuple[str, str | bool], Any] = {
    ("ellipsis", True): ...,
    ("layout", "strided"): torch.strided,
    **{("float", name): float(name) for name in ("inf", "-inf", "nan")},
    **{("dtype", name): getattr(torch, name) for name in _DTYPES},
    **{("memory_format", name): getattr(torch, name) for name in ("contiguous_format", "preserve_format")},
}
# Arguments that torch.fx adds; other values would change what the function does.
_EMPTY_KWARGS: Mapping[str, tuple[Any, ...]] = {"inplace": (False,), "_stacklevel": (3,), "out": (), "generator": ()}


class _Node(BaseModel):
    model_config = ConfigDict(extra="ignore")

    op: Literal["placeholder", "call_function", "call_method", "output"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
    target: str
    args: list[Any] = Field(default=[], max_length=MAX_ITEMS)
    kwargs: dict[str, Any] = Field(default={}, max_length=MAX_ITEMS)


class _Graph(BaseModel):
    format: Literal[1] = 1
    nodes: list[_Node] = Field(max_length=MAX_NODES)


class _Input(BaseModel):
    name: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,63}$")]
    rank: Literal[0, 1, 2]


class _Upload(BaseModel):
    name: str = Field(max_length=256)
    inputs: list[_Input] = Field(min_length=1, max_length=MAX_INPUTS)
    graph: _Graph


class CustomLosses:
    """The uploaded losses of all sessions; each session keeps its most recently used ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sessions: dict[str, OrderedDict[str, LossGraph]] = {}

    def add(self, session_id: str, number: int, fields: Mapping[str, Any]) -> str:
        """Checks and keeps a loss; returns its loss_id. InvalidData: the graph is not allowed."""
        graph = read_graph(fields, self._device)
        loss_id = f"{session_id}:loss:{number}"
        kept = self._sessions.setdefault(session_id, OrderedDict())
        kept[loss_id] = graph
        if len(kept) > LOSSES_PER_SESSION:
            kept.popitem(last=False)
        return loss_id

    def find(self, session_id: str, config: Mapping[str, float | str]) -> Loss:
        """Returns the loss that a pass names in its config; InvalidData: the session does not have it."""
        loss_id = config.get("loss_id")
        if not isinstance(loss_id, str) or len(config) != 1:
            raise InvalidData(f"loss_fn 'custom' takes exactly one option, loss_id, a text; got {sorted(config)}")
        kept = self._sessions.get(session_id, OrderedDict())
        graph = kept.get(loss_id)
        if graph is None:
            raise InvalidData(f"this session has no loss {loss_id!r}: upload it first, and use it in its own session")
        kept.move_to_end(loss_id)
        (_, logprobs_rank), *others = graph.inputs
        return Loss(
            name=CUSTOM_LOSS,
            compute=lambda p, inputs: _datum_loss(graph, p, inputs),
            required=tuple(name for name, _ in others),
            ranks=dict(others),
            logprobs_rank=logprobs_rank,
        )

    def forget(self, session_id: str) -> None:
        """Drops the losses of a session."""
        self._sessions.pop(session_id, None)


class LossGraph(torch.fx.Interpreter):
    """A checked graph.

    Args:
        name: name of the loss, for errors.
        inputs: names and ranks in order; the first is logprobs.
        graph: calls of allowed operations; the output is the loss, and metrics by name.
    """

    def __init__(self, name: str, inputs: Sequence[tuple[str, int]], graph: torch.fx.Graph) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self.loss_name = name
        self.inputs = tuple(inputs)
        self._nodes = list(graph.nodes)
        self._left = 0

    def compute(self, values: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Computes loss and metrics from the inputs of one datum; InvalidData: a node or the loss is invalid."""
        self._left = MAX_ELEMENTS
        loss, metrics = self._interpreted(values)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            what = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidData(f"the loss must be a floating point tensor without dimensions, not {what}")
        return loss, {key: _metric(key, value) for key, value in metrics.items()}

    def _interpreted(self, values: Sequence[Tensor]) -> Any:
        """Like `run` of the base class, which would start the thread of a progress bar."""
        self.args_iter = iter(values)
        result: Any = None
        try:
            for node in self._nodes:
                result = self.env[node] = self.run_node(node)
                for used in self.user_to_last_uses.get(node, ()):
                    del self.env[used]
        finally:
            self.env = {}
        return result

    def run_node(self, n: torch.fx.Node) -> Any:
        """Runs one node; its errors name it."""
        named = f"node {n.name!r} ({n.meta.get('operation', n.op)})"
        try:
            return super().run_node(n)
        except InvalidData as error:
            raise InvalidData(f"{named}: {error}") from error
        except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            first = next(iter(str(error).splitlines()), "")
            raise InvalidData(f"{named}: {type(error).__name__}: {first}") from error

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls an allowed function."""
        return self._call(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls an allowed method."""
        if not isinstance(args[0], Tensor):
            raise InvalidData(f"{target} is a method of tensors, not of {type(args[0]).__name__}")
        return self._call(METHODS[target], args, kwargs)

    def _call(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        needed = cost(function, args, kwargs)
        if needed > self._left:
            raise InvalidData(f"its intermediate results need more than {MAX_ELEMENTS} elements for one datum")
        self._left -= needed
        return function(*args, **kwargs)


def read_graph(fields: Mapping[str, Any], device: torch.device | None = None) -> LossGraph:
    """Checks an uploaded loss.

    Args:
        fields: the body of create_custom_loss.
        device: where it runs, for any device of the trace; None is the CPU.

    Raises:
        InvalidData: it is malformed, too large, or uses something that is not allowed, which the message names.
    """
    try:
        upload = _Upload.model_validate(fields)
    except ValidationError as error:
        item = error.errors(include_input=False)[0]
        raise InvalidData(f"custom loss: {'.'.join(map(str, item['loc']))}: {item['msg']}") from None
    inputs = [(given.name, given.rank) for given in upload.inputs]
    try:
        graph = _GraphReader(device or torch.device("cpu")).read(upload.graph.nodes, inputs)
    except InvalidData as error:
        raise InvalidData(f"custom loss {upload.name!r}: {error}") from None
    return LossGraph(upload.name, inputs, graph)


class _GraphReader:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.fx.Graph()
        self._known: dict[str, torch.fx.Node] = {}
        self._arguments_left = MAX_ARGUMENTS

    def read(self, nodes: Sequence[_Node], inputs: Sequence[tuple[str, int]]) -> torch.fx.Graph:
        names = [name for name, _ in inputs]
        if len(set(names)) != len(names):
            raise InvalidData(f"two inputs have the same name: {names}")
        if inputs[0][0] != "logprobs" or inputs[0][1] == 0:
            raise InvalidData(f"the first input must be logprobs, of rank 1 or 2, not {inputs[0]}")
        placeholders: list[str] = []
        for node in nodes[:-1]:
            if node.name in self._known:
                raise InvalidData(f"node name {node.name!r} is used twice")
            if node.op == "placeholder":
                if len(placeholders) < len(self._known):
                    raise InvalidData(f"placeholder {node.name!r} comes after a call")
                # fx renames a node whose name is taken, for example by a Python builtin; its target stays.
                placeholders.append(node.target)
                self._known[node.name] = self._graph.placeholder(node.name)
            else:
                self._known[node.name] = self._call(node)
        if placeholders != names:
            raise InvalidData(f"the graph's placeholders {placeholders} are not its inputs {names}")
        if not nodes or nodes[-1].op != "output":
            raise InvalidData("the last node must be the output")
        self._graph.output(self._output(nodes[-1]))
        return self._graph

    def _call(self, node: _Node) -> torch.fx.Node:
        if node.op == "output":
            raise InvalidData(f"node {node.name!r}: the output must be the last node")
        # CPython's own operators are in a private module.
        name = re.sub(r"^_operator\.", "operator.", node.target)
        kind, allowed = ("function", FUNCTIONS) if node.op == "call_function" else ("method", METHODS)
        if name not in allowed:
            raise InvalidData(
                f"node {node.name!r}: {kind} {node.target!r} is not among the {len(allowed)} allowed ones"
            )
        args = tuple(self._argument(node.name, value) for value in node.args)
        kwargs = {
            key: self._device if key == "device" else self._argument(node.name, value)
            for key, value in node.kwargs.items()
            if value is not None
        }
        for key, harmless in _EMPTY_KWARGS.items():
            if key in kwargs and kwargs.pop(key) not in harmless:
                raise InvalidData(f"node {node.name!r} ({node.target}): argument {key!r} is not allowed")
        if kind == "method" and not args:
            raise InvalidData(f"node {node.name!r}: method {name!r} has no tensor")
        target = FUNCTIONS[name] if kind == "function" else name
        created = self._graph.create_node(node.op, target, args, kwargs, name=node.name)
        created.meta["operation"] = name
        return created

    def _output(self, node: _Node) -> tuple[torch.fx.Node, dict[str, torch.fx.Node]]:
        value = self._argument(node.name, node.args[0]) if len(node.args) == 1 else None
        pair: tuple[Any, ...] = tuple(cast("Sequence[Any]", value)) if isinstance(value, tuple | list) else ()
        loss, metrics = pair if len(pair) == 2 else (None, None)
        if not isinstance(loss, torch.fx.Node) or not isinstance(metrics, dict):
            raise InvalidData("the output must be (loss, {metric name: value})")
        named = cast("dict[str, Any]", metrics)
        for key, metric in named.items():
            if _METRIC.fullmatch(key) is None:
                raise InvalidData(f"metric {key!r} must be named custom/<name>:sum or custom/<name>:mean, in lowercase")
            if not isinstance(metric, torch.fx.Node):
                raise InvalidData(f"metric {key!r} must be a tensor")
        return loss, named

    def _argument(self, where: str, value: Any, depth: int = 0) -> Any:
        """Decodes an argument, with nodes for references and the loss's own device for any device."""
        if depth > MAX_DEPTH:
            raise InvalidData(f"node {where!r}: its arguments are nested more than {MAX_DEPTH} deep")
        self._arguments_left -= 1
        if self._arguments_left < 0:
            raise InvalidData(f"node {where!r}: the nodes have more than {MAX_ARGUMENTS} arguments together")
        match value:
            case int() if abs(value) > LARGEST_INTEGER:
                raise InvalidData(f"node {where!r}: a whole number is beyond {LARGEST_INTEGER}")
            case str() if len(value) > MAX_TEXT:
                raise InvalidData(f"node {where!r}: a text has more than {MAX_TEXT} characters")
            case str():
                return self._device if _DEVICE.fullmatch(value) else value
            case None | bool() | int() | float():
                return value
            case list():
                return self._arguments(where, cast("list[Any]", value), depth)
            case dict() if len(cast("dict[str, Any]", value)) == 1:
                ((kind, inner),) = cast("dict[str, Any]", value).items()
                return self._encoded(where, kind, inner, depth)
            case _:
                raise InvalidData(f"node {where!r}: an argument has an unknown encoding")

    def _arguments(self, where: str, values: Sequence[Any], depth: int) -> list[Any]:
        if len(values) > MAX_ITEMS:
            raise InvalidData(f"node {where!r}: a list has {len(values)} items; at most {MAX_ITEMS}")
        return [self._argument(where, value, depth + 1) for value in values]

    def _encoded(self, where: str, kind: str, inner: Any, depth: int) -> Any:
        match kind, inner:
            case "ref", str() if inner in self._known:
                return self._known[inner]
            case "tuple", list():
                return tuple(self._arguments(where, cast("list[Any]", inner), depth))
            case "dict", dict():
                fields = cast("dict[str, Any]", inner)
                return dict(zip(fields, self._arguments(where, list(fields.values()), depth), strict=True))
            case "slice", [_, _, _]:
                return slice(*self._arguments(where, cast("list[Any]", inner), depth))
            case "device", str():
                return self._device
            case _, str() | bool() if (kind, inner) in _CONSTANTS:
                return _CONSTANTS[kind, inner]
            case _:
                text = inner if isinstance(inner, str) else type(inner).__name__
                raise InvalidData(f"node {where!r}: {kind[:MAX_TEXT]!r}: {text[:MAX_TEXT]!r} is unknown or not allowed")


def _metric(key: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.detach().item()
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise InvalidData(f"metric {key!r} must be one finite number")
    return float(value)


def _datum_loss(graph: LossGraph, p: Tensor, inputs: Inputs) -> DatumLoss:
    # On a leaf of its own the loss's graph does not contain the model's, and is freed at once.
    leaf = p.detach().clone().requires_grad_(p.requires_grad)
    loss, metrics = graph.compute([leaf, *(inputs[name] for name, _ in graph.inputs[1:])])
    value = loss.detach().float()
    if p.requires_grad:
        # Adds zero to the value, and the loss's gradient to the model's graph.
        surrogate = (_gradient(graph, loss, leaf) * p).sum()
        value = value + (surrogate - surrogate.detach())
    return DatumLoss(value, metrics=metrics)


def _gradient(graph: LossGraph, loss: Tensor, leaf: Tensor) -> Tensor:
    named = f"custom loss {graph.loss_name!r}"
    gradient: Tensor | None = None
    if loss.requires_grad:
        try:
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        except RuntimeError as error:
            raise InvalidData(f"{named} has no gradient: {str(error).splitlines()[0]}") from error
    if gradient is None:
        raise InvalidData(f"{named} does not depend on logprobs, so that there is nothing to train")
    if not bool(torch.isfinite(gradient).all()):
        raise InvalidData(f"the gradient of {named} is not finite; nothing was added")
    return gradient
