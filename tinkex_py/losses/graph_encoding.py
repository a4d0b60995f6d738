"""Encodes a traced loss for `create_custom_loss` (protocol: "Custom losses on the server")."""

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
    """Returns the nodes of a graph in order, as JSON values.

    Raises:
        UnsupportedFeature: the graph contains something that cannot be encoded.
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
        raise UnsupportedFeature(
            f"it calls {node.target}(), which changes a tensor in place: use {str(node.target).rstrip('_')}()"
        )
    return str(node.target) if node.op != "call_function" else _qualified_name(node.target)


def _qualified_name(function: Any) -> str:
    """Returns the name that torch.fx uses for a function. The official SDK sends the same names."""
    name: str = function.__name__
    if getattr(builtins, name, None) is function:
        return name
    # Functions implemented in C++ have no module.
    homes = [home.__name__ for home in (torch, torch.nn.functional) if getattr(home, name, None) is function]
    module: str = function.__module__ or next(iter(homes), "")
    # Python's operators are defined in a private module; the wire format uses the public name.
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
    raise UnsupportedFeature(
        f"it passes a {type(value).__name__} to a torch function, which a graph cannot contain: pass numbers, "
        "strings, dtypes or the term's own tensors"
    )


def _encoded_tensor(value: torch.Tensor) -> Any:
    if value.ndim == 0 and not value.requires_grad and not value.is_complex():
        return _encoded(value.item())
    raise UnsupportedFeature(
        f"it uses a captured tensor of shape {tuple(value.shape)}: put the tensor into loss_fn_inputs, and accept it "
        "as a parameter of a function under sum_over_datums"
    )
