"""The operations that an uploaded loss may use, and the cost of a call.

Other names cannot be called. The cost is known before a call runs: from running it on meta tensors, which have shapes
and no data, or from a bound. So no graph exceeds its memory. No operation works in place or draws random numbers.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from tinkex_py.errors import InvalidData

# Larger integers are no sizes, and Python could compute with them for a very long time.
LARGEST_INTEGER = 2**53
# Bytes of a tensor without its elements.
PER_TENSOR = 1024
# Size of the cache of costs; a loss on new lengths takes milliseconds on meta tensors.
MAX_COSTS = 2**17
META = torch.device("meta")

Function = Callable[..., Any]
_costs: dict[Any, int] = {}


def cost(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Returns the maximum number of elements of the results of an allowed call, and of what it needs for them.

    Raises:
        InvalidData: it depends on the data.
        RuntimeError: the call cannot succeed; so do the other exceptions of torch.
    """
    if function in _BOUNDS:
        args, kwargs = (*args[:1], *_with_numbers(tuple(args[1:]))), _with_numbers(dict(kwargs))
    key = function, _shapes(args), _shapes(kwargs)
    known = _costs.get(key)
    if known is not None:
        return known
    bound = _BOUNDS.get(function)
    size = None if bound is None else bound(*args, **kwargs)
    if size is None:
        try:
            size = _size_on_meta(function, args, kwargs)
        except RuntimeError as error:
            return _cost_with_numbers(function, args, kwargs, error)
    if len(_costs) >= MAX_COSTS:
        _costs.clear()
    _costs[key] = max(size, _broadcast(*args, **kwargs))
    return _costs[key]


def _cost_with_numbers(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any], error: RuntimeError) -> int:
    """The cost with numbers in place of tensors without dimensions, which may be sizes."""
    kept = 0 if function in _FACTORIES else 1
    numbers = (*args[:kept], *_with_numbers(tuple(args[kept:])))
    named = _with_numbers(dict(kwargs))
    if (_shapes(numbers), _shapes(named)) != (_shapes(args), _shapes(kwargs)):
        return cost(function, numbers, named)
    if isinstance(error, NotImplementedError):
        raise InvalidData("the size of its result depends on the data") from None
    raise error


def _size_on_meta(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return META
        return torch.empty_like(value, device=META) if isinstance(value, Tensor) else value

    with META, torch.no_grad():
        result = function(*map_aggregate(tuple(args), moved), **map_aggregate(dict(kwargs), moved))
    return sum(tensor.numel() + PER_TENSOR for tensor in tensors_in(result))


def tensors_in(values: Any) -> list[Tensor]:
    """Returns the tensors among arguments or results."""
    found: list[Any] = []
    map_aggregate(values, found.append)
    return [value for value in found if isinstance(value, Tensor)]


def _with_numbers(values: Any) -> Any:
    return map_aggregate(values, lambda value: value.item() if isinstance(value, Tensor) and value.ndim == 0 else value)


def _shapes(values: Any) -> Any:
    """What the cost of a call depends on: shapes and types of tensors, and all other values."""
    match values:
        case Tensor():
            return values.shape, values.dtype
        case list() | tuple():
            return tuple(_shapes(item) for item in cast("Sequence[Any]", values))
        case dict():
            return tuple((key, _shapes(item)) for key, item in cast("dict[str, Any]", values).items())
        case slice():
            bounds = cast("slice[Any, Any, Any]", values)
            return "slice", _shapes((bounds.start, bounds.stop, bounds.step))
        case _:
            return type(values), values


def _broadcast(*args: Any, **kwargs: Any) -> int:
    """Elements of the broadcast arguments, which some operations compute before they reduce."""
    shapes = [tensor.shape for tensor in tensors_in([*args, *kwargs.values()])]
    try:
        return math.prod(torch.broadcast_shapes(*shapes)) if shapes else 0  # pyright: ignore
    except RuntimeError:
        return 0  # the operation does not broadcast


def _product(left: Tensor, right: Tensor) -> int | None:
    """A batched product may copy both sides for the whole batch."""
    if left.ndim < 3 and right.ndim < 3:
        return None
    batch = math.prod(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]))  # pyright: ignore
    rows, inner = left.shape[-2:-1].numel(), left.shape[-1]
    columns = right.shape[-1] if right.ndim > 1 else 1
    return batch * (rows * inner + inner * columns + rows * columns)


def _where(condition: Tensor, *others: Any, **kwargs: Any) -> int | None:
    """A condition alone returns the indices where it holds."""
    return None if others or kwargs else condition.ndim * (condition.numel() + PER_TENSOR)


def _unbound(tensor: Tensor, dim: int = 0) -> int:
    return tensor.numel() + PER_TENSOR * tensor.shape[dim]


def _split(tensor: Tensor, split_size: int | Sequence[int], dim: int = 0) -> int:
    pieces = tensor.shape[dim] // max(1, split_size) + 1 if isinstance(split_size, int) else len(split_size)
    return tensor.numel() + PER_TENSOR * pieces


def _chunked(input: Tensor, chunks: int, dim: int = 0) -> int:  # noqa: A002  # torch's own name
    # A dimension of size 0 has as many chunks as the call asks for.
    pieces = min(chunks, input.shape[dim]) if input.shape[dim] else chunks
    return input.numel() + PER_TENSOR * max(1, pieces)


def _nothing(*args: Any) -> int:
    """The result is a Python number, or exists already."""
    del args
    return 0


def _item_bound(container: Any, index: Any) -> int | None:
    """A mask selects at most all elements."""
    if not isinstance(container, Tensor):
        return 0
    masks = [tensor.dtype is torch.bool for tensor in tensors_in(index)]
    if not any(masks):
        return None
    if not all(masks):
        raise InvalidData("an index cannot combine a mask and whole numbers")
    return container.numel() + PER_TENSOR


def _arithmetic(function: Function) -> Function:
    """Restricts an operator to tensors and numbers; on lists and texts it means something else."""

    @functools.wraps(function)
    def run(*operands: Any) -> Any:
        if not all(isinstance(operand, Tensor | bool | int | float) for operand in operands):
            raise InvalidData(f"operands must be tensors or numbers, not {[type(o).__name__ for o in operands]}")
        result = function(*operands)
        if isinstance(result, int) and abs(result) > LARGEST_INTEGER:
            raise InvalidData(f"a whole number is beyond {LARGEST_INTEGER}")
        return result

    return run


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, Tensor) or isinstance(exponent, Tensor):
        return cast("Any", torch.pow(base, exponent))
    result = math.pow(base, exponent)
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent >= 0 and abs(result) < LARGEST_INTEGER
    return int(result) if whole else result


def _item(container: Any, index: Any) -> Any:
    if not isinstance(container, Tensor | list | tuple | dict):
        raise InvalidData(f"{type(container).__name__} has no items")
    return cast("Any", container)[index]


_ATTRIBUTES: Mapping[str, Callable[[Tensor], Any]] = {
    "shape": lambda tensor: tuple(tensor.shape),
    "ndim": lambda tensor: tensor.ndim,
    "dtype": lambda tensor: tensor.dtype,
    "device": lambda tensor: tensor.device,
    "T": lambda tensor: tensor.t(),
    "mT": lambda tensor: tensor.mT,
}


def _attribute(value: Any, name: Any) -> Any:
    if isinstance(value, Tensor) and name in _ATTRIBUTES:
        return _ATTRIBUTES[name](value)
    if isinstance(value, tuple) and name in ("values", "indices", "min", "max"):  # of topk, sort, aminmax and others
        return getattr(cast("object", value), name)
    raise InvalidData(f"attribute {name!r} is not allowed. Allowed, of tensors: {', '.join(_ATTRIBUTES)}")


# Functions of torch and methods of tensors.
_COMMON = """
    abs acos acosh add addcdiv addcmul all amax amin aminmax any argmax argmin argsort asin asinh atan atan2 atanh
    bitwise_and bitwise_not bitwise_or bitwise_xor bmm broadcast_to ceil chunk clamp clamp_max clamp_min clip copysign
    cos cosh count_nonzero cummax cummin cumprod cumsum deg2rad detach diff digamma dist div divide dot eq erf erfc
    erfinv exp exp2 expm1 fix flatten fliplr flip flipud float_power floor floor_divide fmax fmin fmod frac gather ge
    greater greater_equal gt heaviside hypot index_select isclose isfinite isinf isnan isneginf isposinf kthvalue le
    lerp less less_equal lgamma log log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp logical_and
    logical_not logical_or logical_xor logit logsumexp lt masked_fill masked_select matmul max maximum mean median min
    minimum mm mode movedim mul multiply nan_to_num nanmean nanmedian nansum narrow ne neg negative nextafter norm
    not_equal numel outer permute positive pow prod rad2deg ravel reciprocal relu remainder renorm reshape roll rot90
    round rsqrt select sgn sigmoid sign signbit sin sinc sinh softmax sort split sqrt square squeeze std sub subtract
    sum swapaxes t tan tanh tile topk transpose trapezoid trace tril triu true_divide trunc unbind unflatten unsqueeze
    var where xlogy
"""
_TORCH = """
    arange cat concat cosine_similarity full full_like hstack ones ones_like stack std_mean var_mean vstack zeros
    zeros_like
"""
_TENSOR = """
    bool clone contiguous dim double expand expand_as float half int is_floating_point long ndimension nelement repeat
    reshape_as size to type_as view view_as
"""
_FUNCTIONAL = """
    binary_cross_entropy binary_cross_entropy_with_logits celu cosine_similarity elu gaussian_nll_loss gelu hardsigmoid
    hardswish hardtanh hinge_embedding_loss huber_loss kl_div l1_loss leaky_relu log_softmax logsigmoid
    margin_ranking_loss mish mse_loss normalize pad poisson_nll_loss relu relu6 selu sigmoid silu smooth_l1_loss
    soft_margin_loss softmax softmin softplus softshrink softsign tanh tanhshrink
"""
_SPECIAL = """
    digamma entr erf erfc exp2 expit expm1 gammaln log1p log_ndtr logit ndtr sinc xlog1py xlogy
"""
_OPERATORS = "abs add and_ eq floordiv ge gt invert le lt mod mul ne neg or_ pos sub truediv xor"
_MATH = """
    acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees erf erfc exp expm1 fabs floor fmod hypot
    isfinite isinf isnan lgamma log log10 log1p log2 pow radians sin sinh sqrt tan tanh trunc
"""
# Other names that torch.fx uses for allowed functions.
_INNER_NAMES: Mapping[str, str] = {
    **{
        f"torch._C._nn.{name}": f"torch.nn.functional.{name}"
        for name in ["softplus", "gelu", "softshrink", "hardtanh", "pad"]
    },
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    **{f"torch._C._special.special_{name}": f"torch.special.{name}" for name in _SPECIAL.split()},
    "torch._C._special.special_log_softmax": "torch.log_softmax",
    "torch._C._special.special_softmax": "torch.softmax",
    "torch._C._special.special_logsumexp": "torch.logsumexp",
    "torch._C._linalg.linalg_vector_norm": "torch.linalg.vector_norm",
    "torch.functional.norm": "torch.norm",
    "torch.functional.split": "torch.split",
    "builtins.getattr": "getattr",
}


def _of(module: Any, prefix: str, names: str) -> dict[str, Function]:
    """Functions by full name; older versions of torch lack some."""
    return {f"{prefix}.{name}": getattr(module, name) for name in names.split() if hasattr(module, name)}


def _functions() -> dict[str, Function]:
    table: dict[str, Function] = {
        **_of(torch, "torch", _COMMON + _TORCH),
        **_of(torch.nn.functional, "torch.nn.functional", _FUNCTIONAL),
        **_of(torch.special, "torch.special", _SPECIAL),
        **_of(torch.linalg, "torch.linalg", "vector_norm"),
        "operator.matmul": torch.matmul,
        "operator.pow": _arithmetic(_power),
        "operator.getitem": _item,
        "getattr": _attribute,
        **{name: _arithmetic(function) for name, function in _of(operator, "operator", _OPERATORS).items()},
        **{name: _arithmetic(function) for name, function in _of(math, "math", _MATH).items()},
    }
    return {**table, **{alias: table[name] for alias, name in _INNER_NAMES.items() if name in table}}


FUNCTIONS: Mapping[str, Function] = _functions()
METHODS: Mapping[str, Function] = {
    name.rpartition(".")[2]: method for name, method in _of(Tensor, "", _COMMON + _TENSOR).items()
}
_FACTORIES = frozenset({torch.arange, torch.full, torch.ones, torch.zeros})
# For results that depend on the data, are many tensors, or are Python numbers, where meta tensors do not help.
_BOUNDS: Mapping[Function, Callable[..., int | None]] = {
    torch.matmul: _product,
    Tensor.matmul: _product,
    torch.where: _where,
    Tensor.where: _where,
    torch.masked_select: _broadcast,
    Tensor.masked_select: _broadcast,
    torch.nn.functional.gaussian_nll_loss: _broadcast,
    torch.unbind: _unbound,
    Tensor.unbind: _unbound,
    FUNCTIONS["torch.split"]: _split,
    METHODS["split"]: _split,
    torch.chunk: _chunked,
    Tensor.chunk: _chunked,
    _item: _item_bound,
    _attribute: _nothing,
    **{function: _nothing for name, function in FUNCTIONS.items() if name.startswith("math.")},
}
