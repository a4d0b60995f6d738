"""Checks that a traced packed term is a sum over datums.

A service runs an uploaded loss once per datum and adds the results. A packed term, which sees all datums at once, has
the same value there only if it is a sum over positions of values that each depend on one position. Any other term, for
example a mean, raises an error that names the operation.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch.fx

from tinkex_py.errors import UnsupportedFeature

# One row per position, or the sum of such rows.
Shape = Literal["rows", "sum"]

_POINTWISE_NAMES = """
    abs acos acosh add asin asinh atan atan2 atanh bool clamp clamp_max clamp_min clip clone contiguous cos cosh
    detach digamma div divide double eq erf erfc exp exp2 expm1 float floordiv fmax fmin fmod ge gelu greater gt
    half heaviside hypot invert isfinite isinf isnan le leaky_relu less lgamma log log10 log1p log2 log_sigmoid
    logaddexp logical_and logical_not logical_or logical_xor logit logsigmoid lt masked_fill maximum minimum mod
    mul multiply nan_to_num ne neg negative pos pow reciprocal relu remainder rsqrt sigmoid sign silu sin sinh
    softplus special_expm1 special_xlogy sqrt square sub subtract tan tanh true_divide truediv where xlogy and_
    or_ xor
"""
_POINTWISE = frozenset(_POINTWISE_NAMES.split())
_FAMILIES = ("torch", "operator", "_operator")


def check_sum_over_positions(nodes: Sequence[torch.fx.Node], logprobs: torch.fx.Node) -> Mapping[torch.fx.Node, Shape]:
    """Returns the shape of each node of a packed term with the placeholder `logprobs`.

    Raises:
        UnsupportedFeature: a node mixes positions, or adds something that is not a sum over them.
    """
    shapes: dict[torch.fx.Node, Shape] = {logprobs: "rows"}
    for node in nodes:
        shape = _shape(node, shapes)
        if shape is None:
            raise UnsupportedFeature(
                f"{operation(node)}() does not sum over positions, so the loss would have another value one datum at a "
                "time: use sum(), or write the term with sum_over_datums"
            )
        shapes[node] = shape
    return shapes


def operation(node: torch.fx.Node) -> str:
    """Returns the name of the function or method that a node calls."""
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _shape(node: torch.fx.Node, shapes: Mapping[torch.fx.Node, Shape]) -> Shape | None:
    arguments = [*node.args, *node.kwargs.values()]
    given = [shapes.get(argument) for argument in arguments if isinstance(argument, torch.fx.Node)]
    constants = [argument for argument in arguments if not isinstance(argument, torch.fx.Node)]
    if None in given or not all(_is_plain(constant) for constant in constants) or not _is_known_family(node):
        return None
    name = operation(node)
    if name == "sum" and given == ["rows"] and not constants:
        return "sum"
    if "sum" in given:
        return "sum" if _keeps_sum(node, given, constants) else None
    return "rows" if name in _POINTWISE and given else None


def _keeps_sum(node: torch.fx.Node, given: Sequence[Any], constants: Sequence[Any]) -> bool:
    """Returns whether an operation maps sums over positions to such a sum: linear operations without a constant."""
    name = operation(node)
    if "rows" in given:
        return False
    if name in ("add", "sub", "subtract"):
        return len(given) == 2 and not constants
    if name in ("neg", "negative", "pos", "detach", "float", "double", "clone"):
        return not constants
    if len(given) != 1 or len(constants) != 1 or not isinstance(constants[0], int | float):
        return False
    if name in ("mul", "multiply"):
        return True
    return name in ("truediv", "div", "divide", "true_divide") and isinstance(node.args[0], torch.fx.Node)


def _is_plain(constant: object) -> bool:
    if isinstance(constant, torch.Tensor):
        return constant.ndim == 0
    return constant is None or isinstance(constant, bool | int | float | str | torch.dtype)


def _is_known_family(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        return True
    module = cast("str | None", getattr(node.target, "__module__", None)) or "torch"
    return node.op == "call_function" and module.split(".")[0] in _FAMILIES
