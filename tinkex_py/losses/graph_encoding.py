"""A traced loss as plain data, as `create_custom_loss` takes it (protocol: "Custom losses on the server")."""

import builtins
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.fx

from tinkex_py.errors import UnsupportedFeature

_CONSTANTS = {
    torch.dtype: "dtype",
    torch.device: "device",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
}


def encode_graph(graph: torch.fx.Graph) -> dict[str, Any]:
    """The nodes of a graph in order.

    Raises:
        UnsupportedFeature: the graph holds something that cannot be sent.
    """
    return {"format": 1, "nodes": [_encoded_node(node) for node in graph.nodes]}


def _encoded_node(node: torch.fx.Node) -> dict[str, Any]:
    return {
        "op": node.op,
        "name": node.name,
        "target": _target(node),
        "args": [_encoded(argument) for argument in node.args],
        "kwargs": {key: _encoded(argument) for key, argument in node.kwargs.items() if argument is not None},
    }


def _target(node: torch.fx.Node) -> str:
    if node.op == "call_method" and str(node.target).endswith("_"):
        raise UnsupportedFeature(f"it calls {node.target}(), which changes a tensor in place")
    return str(node.target) if node.op != "call_function" else _qualified_name(node.target)


def _qualified_name(function: Any) -> str:
    """The name that torch.fx, and so the official SDK, gives a function; services know these names."""
    name: str = function.__name__
    if getattr(builtins, name, None) is function:
        return name
    # Functions that are written in C++ have no module.
    homes = [home.__name__ for home in (torch, torch.nn.functional) if getattr(home, name, None) is function]
    module: str = function.__module__ or next(iter(homes), "")
    # Python's operators live in a private module; the wire has the public one's name.
    return f"operator.{name}" if module == "_operator" else f"{module}.{name}"


def _encoded(value: Any) -> Any:
    if isinstance(value, torch.fx.Node):
        return {"ref": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return _encoded_tensor(value)
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item) for item in cast("tuple[Any, ...]", value)]}
    if isinstance(value, list):
        return [_encoded(item) for item in cast("list[Any]", value)]
    if isinstance(value, Mapping):
        return {"dict": {str(key): _encoded(item) for key, item in cast("Mapping[Any, Any]", value).items()}}
    if isinstance(value, slice):
        bounds = cast("slice[Any, Any, Any]", value)
        return {"slice": [_encoded(bounds.start), _encoded(bounds.stop), _encoded(bounds.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    kind = _CONSTANTS.get(cast("type[Any]", type(value)))
    if kind is not None:
        return {kind: str(value).removeprefix("torch.")}
    raise UnsupportedFeature(f"it passes a {type(value).__name__} to a torch function, which cannot be sent")


def _encoded_tensor(value: torch.Tensor) -> Any:
    if value.ndim == 0 and not value.requires_grad and not value.is_complex():
        return _encoded(value.item())
    raise UnsupportedFeature(
        f"it uses a tensor of shape {tuple(value.shape)} from outside; put it into loss_fn_inputs, and take it as a "
        "parameter of a function under sum_over_datums"
    )
