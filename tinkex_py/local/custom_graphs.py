"""Uploaded losses as data: reading a traced graph, refusing what is not allowed, and running it.

The format is that of the protocol ("Custom losses on the server"): nodes in the order in which they run. A graph is
checked whole when it is uploaded, and interpreted node by node; nothing of it is ever evaluated as code.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
import torch.fx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.custom_operations import FUNCTIONS, LARGEST_INTEGER, METHODS, Function, cost

MAX_NODES = 2000
MAX_ITEMS = 256
MAX_DEPTH = 6
MAX_TEXT = 64
MAX_INPUTS = 16
# Elements of all intermediate results for one datum: 256 MiB of float32.
MAX_ELEMENTS = 2**26

_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")
}
_MEMORY_FORMATS = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format}
CPU = torch.device("cpu")
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d+)?")
# What torch.fx writes beside the real arguments; other values than these would change what a function does.
_EMPTY_KWARGS: Mapping[str, tuple[Any, ...]] = {"inplace": (False,), "_stacklevel": (3,), "out": (), "generator": ()}


def _lowercase(name: str) -> str:
    if re.fullmatch(r"[a-z_][a-z0-9_]{0,63}", name) is None:
        raise ValueError(f"input {name!r} must be a lowercase name of letters, digits and underscores")
    return name


class _Node(BaseModel):
    model_config = ConfigDict(extra="ignore")

    op: Literal["placeholder", "call_function", "call_method", "call_module", "get_attr", "output"]
    name: str
    target: str
    args: list[Any] = Field(default=[], max_length=MAX_ITEMS)
    kwargs: dict[str, Any] = Field(default={}, max_length=MAX_ITEMS)


class _Graph(BaseModel):
    format: Literal[1] = 1
    nodes: list[_Node] = Field(max_length=MAX_NODES)


class _Input(BaseModel):
    name: Annotated[str, AfterValidator(_lowercase)]
    rank: Literal[0, 1, 2]


class _Upload(BaseModel):
    name: str = Field(max_length=256)
    inputs: list[_Input] = Field(min_length=1, max_length=MAX_INPUTS)
    graph: _Graph


class LossGraph(torch.fx.Interpreter):
    """A checked graph.

    Args:
        name: the loss's name, for messages.
        inputs: names and ranks in order; the first is logprobs.
        graph: calls of allowed operations; its output is the loss and the metrics by name.
    """

    def __init__(self, name: str, inputs: Sequence[tuple[str, int]], graph: torch.fx.Graph) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self.loss_name = name
        self.inputs = tuple(inputs)
        self._nodes = list(graph.nodes)
        self._left = 0

    def compute(self, values: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of one datum.

        Args:
            values: the inputs, in order.

        Raises:
            InvalidData: a node cannot be run, or the loss is no scalar tensor.
        """
        self._left = MAX_ELEMENTS
        loss, metrics = self._interpreted(values)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            what = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidData(f"the loss must be a floating point tensor without dimensions, not {what}")
        return loss, {key: _metric(key, value) for key, value in metrics.items()}

    def _interpreted(self, values: Sequence[Tensor]) -> Any:
        """What the output node holds. `run` of the base class would start the thread of a progress bar."""
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
        """The result of one node; what goes wrong is the graph's fault."""
        try:
            return super().run_node(n)
        except InvalidData as error:
            raise InvalidData(f"{_named(n)}: {error}") from error
        except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            first = next(iter(str(error).splitlines()), "")
            raise InvalidData(f"{_named(n)}: {type(error).__name__}: {first}") from error

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an allowed function, if there is room for it."""
        return self._call(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an allowed method, if there is room for it."""
        if not isinstance(args[0], Tensor):
            raise InvalidData(f"{target} is a method of tensors, not of {type(args[0]).__name__}")
        return self._call(METHODS[target], args, kwargs)

    def _call(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        needed = cost(function, args, kwargs)
        if needed > self._left:
            raise InvalidData(f"its intermediate results need more than {MAX_ELEMENTS} elements for one datum")
        self._left -= needed
        return function(*args, **kwargs)


def read_graph(fields: Mapping[str, Any], device: torch.device = CPU) -> LossGraph:
    """Check an uploaded loss.

    Args:
        fields: the body of create_custom_loss.
        device: where it runs, whatever device it was traced on.

    Raises:
        InvalidData: it is malformed, too large, or uses something that is not allowed; the message names it.
    """
    try:
        upload = _Upload.model_validate(fields)
    except ValidationError as error:
        item = error.errors(include_input=False)[0]
        raise InvalidData(f"custom loss: {'.'.join(map(str, item['loc']))}: {item['msg']}") from None
    inputs = [(given.name, given.rank) for given in upload.inputs]
    try:
        _check_inputs(inputs)
        graph = _GraphReader(device).read(upload.graph.nodes, [name for name, _ in inputs])
    except InvalidData as error:
        raise InvalidData(f"custom loss {upload.name!r}: {error}") from None
    return LossGraph(upload.name, inputs, graph)


def _check_inputs(inputs: Sequence[tuple[str, int]]) -> None:
    names = [name for name, _ in inputs]
    if len(set(names)) != len(names):
        raise InvalidData(f"two inputs have the same name: {names}")
    if inputs[0][0] != "logprobs" or inputs[0][1] == 0:
        raise InvalidData(f"the first input must be logprobs, of rank 1 or 2, not {inputs[0]}")


class _GraphReader:
    """Makes a graph of encoded nodes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.fx.Graph()
        self._known: dict[str, torch.fx.Node] = {}

    def read(self, nodes: Sequence[_Node], inputs: Sequence[str]) -> torch.fx.Graph:
        """The graph of nodes that take these inputs."""
        placeholders: list[str] = []
        for node in nodes[:-1]:
            if _NODE_NAME.fullmatch(node.name) is None or node.name in self._known:
                raise InvalidData(f"node name {node.name!r} is malformed or used twice")
            if node.op == "placeholder":
                if len(placeholders) < len(self._known):
                    raise InvalidData(f"placeholder {node.name!r} comes after a call")
                # Where the input's name is taken (a Python builtin, say), fx gives its node another one.
                placeholders.append(node.target)
                self._known[node.name] = self._graph.placeholder(node.name)
            else:
                self._known[node.name] = self._call(node)
        if placeholders != list(inputs):
            raise InvalidData(f"the graph's placeholders {placeholders} are not its inputs {list(inputs)}")
        if not nodes or nodes[-1].op != "output":
            raise InvalidData("the last node must be the output")
        self._graph.output(self._output(nodes[-1]))
        return self._graph

    def _call(self, node: _Node) -> torch.fx.Node:
        if node.op not in ("call_function", "call_method"):
            raise InvalidData(f"node {node.name!r}: {node.op} is not allowed here")
        # CPython's own operators live in a private module.
        name = re.sub(r"^_operator\.", "operator.", node.target)
        kind, allowed = ("function", FUNCTIONS) if node.op == "call_function" else ("method", METHODS)
        if name not in allowed:
            raise InvalidData(
                f"node {node.name!r}: {kind} {node.target!r} is not among the {len(allowed)} allowed ones"
            )
        args = tuple(self._argument(node.name, value) for value in node.args)
        given = {key: value for key, value in node.kwargs.items() if value is not None}
        kwargs = {
            key: self._device if key == "device" else self._argument(node.name, item) for key, item in given.items()
        }
        for key, harmless in _EMPTY_KWARGS.items():
            if key in kwargs and kwargs.pop(key) not in harmless:
                raise InvalidData(f"node {node.name!r} ({node.target}): argument {key!r} is not allowed")
        if kind == "method" and not args:
            raise InvalidData(f"node {node.name!r}: method {name!r} has no tensor")
        target = FUNCTIONS[name] if kind == "function" else name
        made = self._graph.create_node(node.op, target, args, kwargs, name=node.name)
        made.meta["operation"] = name
        return made

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
        """An encoded argument as Python value, with nodes for references and the loss's own device for any other."""
        if depth > MAX_DEPTH:
            raise InvalidData(f"node {where!r}: its arguments are nested more than {MAX_DEPTH} deep")
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            if abs(value) > LARGEST_INTEGER:
                raise InvalidData(f"node {where!r}: a whole number is beyond {LARGEST_INTEGER}")
            return value
        if isinstance(value, str):
            if len(value) > MAX_TEXT:
                raise InvalidData(f"node {where!r}: a text has more than {MAX_TEXT} characters")
            return self._device if _DEVICE.fullmatch(value) else value
        if isinstance(value, list):
            return self._arguments(where, cast("list[Any]", value), depth)
        if isinstance(value, dict) and len(cast("dict[str, Any]", value)) == 1:
            ((kind, inner),) = cast("dict[str, Any]", value).items()
            return self._encoded(where, kind, inner, depth)
        raise InvalidData(f"node {where!r}: an argument is encoded in no known way")

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
            case "ellipsis", True:
                return ...
            case "float", str() if inner in _FLOATS:
                return _FLOATS[inner]
            case "dtype", str() if inner in _DTYPES:
                return _DTYPES[inner]
            case "memory_format", str() if inner in _MEMORY_FORMATS:
                return _MEMORY_FORMATS[inner]
            case "layout", "strided":
                return torch.strided
            case "device", str():
                return self._device
            case _:
                text = inner if isinstance(inner, str) else type(inner).__name__
                raise InvalidData(
                    f"node {where!r}: {kind[:MAX_TEXT]!r}: {text[:MAX_TEXT]!r} is not allowed or not known"
                )


def _named(node: torch.fx.Node) -> str:
    return f"node {node.name!r} ({node.meta.get('operation', node.op)})"


def _metric(key: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.detach().item()
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise InvalidData(f"metric {key!r} must be one finite number")
    return float(value)
