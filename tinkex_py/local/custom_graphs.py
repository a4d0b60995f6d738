"""Uploaded losses as data: reading a traced graph, refusing what is not allowed, and running it.

The format is that of the protocol ("Custom losses on the server"): nodes in the order in which they run. A graph is
checked whole when it is uploaded; nothing of it is ever evaluated as code.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.custom_operations import FUNCTIONS, LARGEST_INTEGER, METHODS, Budget, tensors_in

MAX_NODES = 2000
MAX_ITEMS = 256
MAX_DEPTH = 6
MAX_TEXT = 64
MAX_INPUTS = 16
# Elements of all intermediate results for one datum: 256 MiB of float32.
MAX_ELEMENTS = 2**26

_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")
}
_MEMORY_FORMATS = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format}
# What torch.fx writes beside the real arguments; other values than these would change what a function does.
_EMPTY_KWARGS: Mapping[str, tuple[Any, ...]] = {"inplace": (False,), "_stacklevel": (3,), "out": (), "generator": ()}


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
    name: str
    rank: Literal[0, 1, 2]


class _Upload(BaseModel):
    name: str = Field(max_length=256)
    inputs: list[_Input] = Field(min_length=1, max_length=MAX_INPUTS)
    graph: _Graph


@dataclass(frozen=True)
class Reference:
    """The result of an earlier node."""

    name: str


@dataclass(frozen=True)
class OwnDevice:
    """Whatever device was traced on: the loss runs where the logprobs are."""


@dataclass(frozen=True)
class Step:
    """One call: `operation` names an entry of FUNCTIONS, or of METHODS where `is_method`."""

    name: str
    operation: str
    is_method: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, results: Mapping[str, Any], device: torch.device, budget: Budget) -> Any:
        """The result of this step.

        Raises:
            InvalidData: the operation cannot take these arguments, or its result is too large.
        """
        operation = (METHODS if self.is_method else FUNCTIONS)[self.operation]
        args = [_filled_in(value, results, device) for value in self.args]
        kwargs = {key: _filled_in(value, results, device) for key, value in self.kwargs.items()}
        try:
            expected = operation.size(*args, **kwargs)
            budget.spend(expected)
            result = operation.run(*args, **kwargs)
        except InvalidData as error:
            raise InvalidData(f"node {self.name!r} ({self.operation}): {error}") from error
        except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            first = next(iter(str(error).splitlines()), "")
            raise InvalidData(f"node {self.name!r} ({self.operation}): {type(error).__name__}: {first}") from error
        budget.spend(max(0, sum(tensor.numel() for tensor in tensors_in(result)) - expected))
        return result


@dataclass(frozen=True)
class LossGraph:
    """A checked graph.

    Args:
        name: the loss's name, for messages.
        inputs: names and ranks in order; the first is logprobs.
        placeholders: the nodes that stand for the inputs, in order.
        steps: the calls, in order.
        loss: the node that holds the loss.
        metrics: metric name to node.
    """

    name: str
    inputs: tuple[tuple[str, int], ...]
    placeholders: tuple[str, ...]
    steps: tuple[Step, ...]
    loss: Reference
    metrics: Mapping[str, Reference]

    def run(self, values: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of one datum.

        Args:
            values: the inputs, in order.

        Raises:
            InvalidData: a step cannot be done, or the loss is no scalar tensor.
        """
        results: dict[str, Any] = dict(zip(self.placeholders, values, strict=True))
        device, budget = values[0].device, Budget(MAX_ELEMENTS)
        for step in self.steps:
            results[step.name] = step.run(results, device, budget)
        loss = results[self.loss.name]
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            what = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidData(f"the loss must be a floating point tensor without dimensions, not {what}")
        return loss, {key: _metric(key, results[node.name]) for key, node in self.metrics.items()}


def read_graph(fields: Mapping[str, Any]) -> LossGraph:
    """Check an uploaded loss.

    Args:
        fields: the body of create_custom_loss.

    Raises:
        InvalidData: it is malformed, too large, or uses something that is not allowed; the message names it.
    """
    try:
        upload = _Upload.model_validate(fields)
    except ValidationError as error:
        item = error.errors(include_input=False)[0]
        raise InvalidData(f"custom loss: {'.'.join(map(str, item['loc']))}: {item['msg']}") from None
    try:
        return _checked(upload)
    except InvalidData as error:
        raise InvalidData(f"custom loss {upload.name!r}: {error}") from None


def _checked(upload: _Upload) -> LossGraph:
    inputs = tuple((given.name, given.rank) for given in upload.inputs)
    names = [name for name, _ in inputs]
    _check_inputs(inputs)
    known: set[str] = set()
    placeholders: dict[str, str] = {}
    steps: list[Step] = []
    nodes = upload.graph.nodes
    for node in nodes[:-1]:
        if _NODE_NAME.fullmatch(node.name) is None or node.name in known:
            raise InvalidData(f"node name {node.name!r} is malformed or used twice")
        if node.op == "placeholder":
            if steps:
                raise InvalidData(f"placeholder {node.name!r} comes after a call")
            # Where the input's name is taken (a Python builtin, say), fx gives its node another one.
            placeholders[node.name] = node.target
        else:
            steps.append(_step(node, known))
        known.add(node.name)
    if list(placeholders.values()) != names:
        raise InvalidData(f"the graph's placeholders {list(placeholders.values())} are not its inputs {names}")
    if not nodes or nodes[-1].op != "output":
        raise InvalidData("the last node must be the output")
    loss, metrics = _output(nodes[-1], known)
    return LossGraph(upload.name, inputs, tuple(placeholders), tuple(steps), loss, metrics)


def _check_inputs(inputs: Sequence[tuple[str, int]]) -> None:
    names = [name for name, _ in inputs]
    if len(set(names)) != len(names):
        raise InvalidData(f"two inputs have the same name: {names}")
    for name in names:
        if _INPUT_NAME.fullmatch(name) is None:
            raise InvalidData(f"input {name!r} must be a lowercase name of letters, digits and underscores")
    if inputs[0][0] != "logprobs" or inputs[0][1] == 0:
        raise InvalidData(f"the first input must be logprobs, of rank 1 or 2, not {inputs[0]}")


def _step(node: _Node, known: set[str]) -> Step:
    if node.op == "call_function":
        # CPython's own operators live in a private module.
        target = re.sub(r"^_operator\.", "operator.", node.target)
        allowed = FUNCTIONS
    elif node.op == "call_method":
        target, allowed = node.target, METHODS
    else:
        raise InvalidData(f"node {node.name!r}: {node.op} is not allowed here")
    if target not in allowed:
        kind = "method" if node.op == "call_method" else "function"
        raise InvalidData(f"node {node.name!r}: {kind} {node.target!r} is not among the {len(allowed)} allowed ones")
    args = tuple(_argument(node.name, value, known) for value in node.args)
    kwargs = {key: _argument(node.name, value, known) for key, value in node.kwargs.items() if value is not None}
    for key, harmless in _EMPTY_KWARGS.items():
        if key in kwargs and kwargs.pop(key) not in harmless:
            raise InvalidData(f"node {node.name!r} ({node.target}): argument {key!r} is not allowed")
    return Step(node.name, target, node.op == "call_method", args, kwargs)


def _output(node: _Node, known: set[str]) -> tuple[Reference, dict[str, Reference]]:
    value = _argument(node.name, node.args[0], known) if len(node.args) == 1 else None
    pair: tuple[Any, ...] = tuple(cast("Sequence[Any]", value)) if isinstance(value, tuple | list) else ()
    loss, metrics = pair if len(pair) == 2 else (None, None)
    if not isinstance(loss, Reference) or not isinstance(metrics, dict):
        raise InvalidData("the output must be (loss, {metric name: value})")
    named = cast("dict[str, Any]", metrics)
    for key, metric in named.items():
        if _METRIC.fullmatch(key) is None:
            raise InvalidData(f"metric {key!r} must be named custom/<name>:sum or custom/<name>:mean, in lowercase")
        if not isinstance(metric, Reference):
            raise InvalidData(f"metric {key!r} must be a tensor")
    return loss, named


def _argument(where: str, value: Any, known: set[str], depth: int = 0) -> Any:
    """An encoded argument as Python value, with `Reference` and `OwnDevice` where something is filled in later."""
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
        return value
    if isinstance(value, list):
        return [_argument(where, item, known, depth + 1) for item in _items(where, cast("list[Any]", value))]
    if isinstance(value, dict) and len(cast("dict[str, Any]", value)) == 1:
        ((kind, inner),) = cast("dict[str, Any]", value).items()
        return _encoded(where, kind, inner, known, depth)
    raise InvalidData(f"node {where!r}: an argument is encoded in no known way")


def _encoded(where: str, kind: str, inner: Any, known: set[str], depth: int) -> Any:
    match kind, inner:
        case "ref", str() if inner in known:
            return Reference(inner)
        case "tuple", list():
            items = _items(where, cast("list[Any]", inner))
            return tuple(_argument(where, item, known, depth + 1) for item in items)
        case "dict", dict():
            fields = cast("dict[str, Any]", inner)
            _items(where, list(fields))
            return {key: _argument(where, item, known, depth + 1) for key, item in fields.items()}
        case "slice", [start, stop, step]:
            return slice(*(_argument(where, item, known, depth + 1) for item in (start, stop, step)))
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
            return OwnDevice()
        case _:
            text = inner if isinstance(inner, str) else type(inner).__name__
            raise InvalidData(f"node {where!r}: {kind[:MAX_TEXT]!r}: {text[:MAX_TEXT]!r} is not allowed or not known")


def _items(where: str, items: list[Any]) -> list[Any]:
    if len(items) > MAX_ITEMS:
        raise InvalidData(f"node {where!r}: a list has {len(items)} items; at most {MAX_ITEMS}")
    return items


def _filled_in(value: Any, results: Mapping[str, Any], device: torch.device) -> Any:
    match value:
        case Reference():
            return results[value.name]
        case OwnDevice():
            return device
        case list() | tuple():
            items = cast("Sequence[Any]", value)
            return type(value)(_filled_in(item, results, device) for item in items)  # pyright: ignore
        case dict():
            fields = cast("dict[str, Any]", value)
            return {key: _filled_in(item, results, device) for key, item in fields.items()}
        case slice():
            bounds = cast("slice[Any, Any, Any]", value)
            parts = (bounds.start, bounds.stop, bounds.step)
            return slice(*(_filled_in(part, results, device) for part in parts))
        case _:
            return value


def _metric(key: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.detach().item()
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise InvalidData(f"metric {key!r} must be one finite number")
    return float(value)
