"""The operations that an uploaded loss may use, and how large their results can get.

A name that is not in these tables cannot be called. Each operation knows, from its arguments alone, the most elements
that its result may have; that is charged to a budget before it runs, so that no graph can ask for more memory than it
was given. Nothing here looks a name up anywhere else, changes a tensor in place, or draws random numbers.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tinkex_py.errors import InvalidData

Size = Callable[..., int]
# Whole numbers beyond this are no sizes, and Python would compute with them for as long as it takes.
LARGEST_INTEGER = 2**53


@dataclass(frozen=True)
class Operation:
    """One allowed operation.

    Args:
        run: does it.
        size: the most elements of its result, from the same arguments.
    """

    run: Callable[..., Any]
    size: Size


class Budget:
    """How many elements the results of one run may still have."""

    def __init__(self, elements: int) -> None:
        self.total = elements
        self.left = elements

    def spend(self, elements: int) -> None:
        """Take what a result needs.

        Raises:
            InvalidData: there is not enough left.
        """
        if elements > self.left:
            raise InvalidData(f"its intermediate results need more than {self.total} elements for one datum")
        self.left -= elements


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors in arguments, in lists too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in cast("Sequence[Any]", values):
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(cast("Mapping[str, Any]", values).values()))


def _broadcast(*args: Any, **kwargs: Any) -> int:
    shapes = [tuple(tensor.shape) for tensor in tensors_in([*args, *kwargs.values()])]
    return math.prod(torch.broadcast_shapes(*shapes)) if shapes else 1  # pyright: ignore


def _no_larger(*args: Any, **kwargs: Any) -> int:
    return sum(tensor.numel() for tensor in tensors_in([*args, *kwargs.values()]))


def _none(*args: Any, **kwargs: Any) -> int:
    del args, kwargs
    return 0


def _whole(values: Any) -> list[int]:
    flat: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            flat += cast("Sequence[Any]", value)
        else:
            flat.append(value)
    if not all(isinstance(value, int) for value in flat):
        raise InvalidData(f"sizes must be whole numbers, not {flat!r}")
    return flat


def _filled(*size: Any, **kwargs: Any) -> int:
    return math.prod(max(0, number) for number in _whole([*size, *([kwargs["size"]] if "size" in kwargs else [])]))


def _full(size: Any, *args: Any, **kwargs: Any) -> int:
    del args, kwargs
    return _filled(size)


def _expanded(tensor: Tensor, *sizes: Any, **kwargs: Any) -> int:
    wanted = _whole([*sizes, *kwargs.values()])
    # -1 keeps a dimension, which the tensor's own number of elements covers.
    return math.prod(max(1, size) for size in wanted) * max(1, tensor.numel() if -1 in wanted else 1)


def _repeated(tensor: Tensor, *sizes: Any, **kwargs: Any) -> int:
    return tensor.numel() * _filled(*sizes, *kwargs.values())


def _padded(tensor: Tensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> int:
    del args, kwargs
    shape = list(tensor.shape)
    amounts = _whole(pad)
    for index in range(len(amounts) // 2):
        shape[-1 - index] += max(0, amounts[2 * index]) + max(0, amounts[2 * index + 1])
    return math.prod(shape)


def _product(left: Tensor, right: Tensor) -> int:
    if left.ndim < 2 or right.ndim < 2:
        return max(left.numel(), right.numel())
    batch = math.prod(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]))  # pyright: ignore
    return batch * left.shape[-2] * right.shape[-1]


def _outer(left: Tensor, right: Tensor) -> int:
    return left.numel() * right.numel()


def _gathered(input: Tensor, dim: int, index: Tensor) -> int:  # noqa: A002  # torch's own name
    del input, dim
    return index.numel()


def _selected(input: Tensor, dim: int, index: Tensor) -> int:  # noqa: A002
    return index.numel() * (input.numel() // max(1, input.shape[dim]))


def _counted(*args: Any, **kwargs: Any) -> int:
    numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int | float)]
    return math.ceil(sum(abs(number) for number in numbers[:2])) if all(map(math.isfinite, numbers)) else 0


def _step_one(*args: Any, **kwargs: Any) -> Tensor:
    """Numbers from a start up to an end; a step other than 1 could make any number of them."""
    if len(args) > 2 or "step" in kwargs:
        raise InvalidData("torch.arange takes start and end only")
    return torch.arange(*args, **kwargs)


def _number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on tensors and numbers only: on lists or texts it would mean something else."""

    def run(*operands: Any) -> Any:
        if not all(isinstance(operand, Tensor) or _number(operand) for operand in operands):
            raise InvalidData(f"operands must be tensors or numbers, not {[type(o).__name__ for o in operands]}")
        return _bounded(function(*operands))

    return run


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise InvalidData(f"a whole number is beyond {LARGEST_INTEGER}")
    return value


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


def _item_size(container: Any, index: Any) -> int:
    if not isinstance(container, Tensor):
        return 0
    picked = [tensor for tensor in tensors_in(index) if tensor.dtype is not torch.bool]
    if not picked:
        return container.numel()
    first = 0 if isinstance(index, tuple) else 1
    return math.prod(torch.broadcast_shapes(*[tensor.shape for tensor in picked])) * math.prod(container.shape[first:])  # pyright: ignore


_ATTRIBUTES: Mapping[str, Callable[[Tensor], Any]] = {
    "shape": lambda tensor: tuple(tensor.shape),
    "ndim": lambda tensor: tensor.ndim,
    "dtype": lambda tensor: tensor.dtype,
    "device": lambda tensor: tensor.device,
    "T": lambda tensor: tensor.t(),
    "mT": lambda tensor: tensor.mT,
}


def _attribute(tensor: Any, name: Any) -> Any:
    if not isinstance(tensor, Tensor) or name not in _ATTRIBUTES:
        raise InvalidData(f"attribute {name!r} is not allowed. Allowed, of tensors: {', '.join(_ATTRIBUTES)}")
    return _ATTRIBUTES[name](tensor)


def _method(name: str) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(Tensor, name)

    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, Tensor):
            raise InvalidData(f"{name} is a method of tensors, not of {type(tensor).__name__}")
        return method(tensor, *args, **kwargs)

    return run


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Element by element, with broadcasting; under torch and as a method of tensors.
_ELEMENTWISE = _names(
    """
    abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
    bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma dist div divide eq erf
    erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac ge greater greater_equal
    gt heaviside hypot isclose isfinite isinf isnan isneginf isposinf le lerp less less_equal lgamma log log10
    log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill max
    maximum min minimum mul multiply nan_to_num ne neg negative nextafter masked_select not_equal positive pow
    rad2deg reciprocal relu remainder round rsqrt sgn sigmoid sign signbit sin sinc sinh sqrt square sub
    subtract tan tanh true_divide trunc where xlogy
    """
)
# Their results are no larger than all of their arguments together.
_SHRINKING = _names(
    """
    all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum detach diff dot
    fliplr flip flipud kthvalue logcumsumexp logsumexp log_softmax mean median mode movedim nanmean nanmedian
    nansum narrow norm permute prod ravel renorm reshape roll rot90 select softmax sort squeeze std sum swapaxes
    t topk transpose trapezoid trace tril triu unbind unflatten unsqueeze var
    """
)
_FUNCTIONS_ONLY_SHRINKING = _names(
    """
    cat chunk concat flatten hstack std_mean split stack var_mean vstack zeros_like ones_like
    """
)
_METHODS_ONLY_SHRINKING = _names(
    """
    bool chunk clone contiguous double flatten float half int long split to type_as view view_as reshape_as
    """
)
_SIZES = ("dim", "is_floating_point", "ndimension", "numel", "nelement", "size")
_FUNCTIONAL_ELEMENTWISE = _names(
    """
    binary_cross_entropy binary_cross_entropy_with_logits celu cosine_similarity elu gaussian_nll_loss gelu
    hardsigmoid hardswish hardtanh hinge_embedding_loss huber_loss kl_div l1_loss leaky_relu logsigmoid
    margin_ranking_loss mish mse_loss poisson_nll_loss relu relu6 selu sigmoid silu smooth_l1_loss
    soft_margin_loss softplus softshrink softsign tanh tanhshrink
    """
)
_FUNCTIONAL_SHRINKING = ("log_softmax", "normalize", "softmax", "softmin")
_SPECIAL_ELEMENTWISE = _names(
    """
    digamma entr erf erfc exp2 expit expm1 gammaln log1p log_ndtr logit ndtr sinc xlog1py xlogy
    """
)
_OPERATORS = _names(
    """
    abs add and_ eq floordiv ge gt invert le lt mod mul ne neg or_ pos sub truediv xor
    """
)
_MATH = _names(
    """
    acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees erf erfc exp expm1 fabs floor fmod
    hypot isfinite isinf isnan lgamma log log10 log1p log2 pow radians sin sinh sqrt tan tanh trunc
    """
)
# What torch.fx calls some functions of torch.nn.functional and torch.special.
_INNER_NAMES: Mapping[str, str] = {
    **{
        f"torch._C._nn.{name}": f"torch.nn.functional.{name}" for name in ("softplus", "gelu", "softshrink", "hardtanh")
    },
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    **{f"torch._C._special.special_{name}": f"torch.special.{name}" for name in _SPECIAL_ELEMENTWISE},
    "torch._C._special.special_log_softmax": "torch.log_softmax",
    "torch._C._special.special_softmax": "torch.softmax",
    "torch._C._special.special_logsumexp": "torch.logsumexp",
    "torch._C._linalg.linalg_vector_norm": "torch.linalg.vector_norm",
    "torch.functional.norm": "torch.norm",
    "torch._C._nn.pad": "torch.nn.functional.pad",
    "builtins.getattr": "getattr",
}


def _of(module: Any, prefix: str, names: Sequence[str], size: Size) -> dict[str, Operation]:
    """Operations by name; older versions of torch may lack some."""
    return {f"{prefix}.{name}": Operation(getattr(module, name), size) for name in names if hasattr(module, name)}


def _functions() -> dict[str, Operation]:
    functional, special, linear = torch.nn.functional, torch.special, torch.linalg
    table: dict[str, Operation] = {
        **_of(torch, "torch", (*_ELEMENTWISE, "cosine_similarity"), _broadcast),
        **_of(torch, "torch", (*_SHRINKING, *_FUNCTIONS_ONLY_SHRINKING), _no_larger),
        "torch.gather": Operation(torch.gather, _gathered),
        "torch.index_select": Operation(torch.index_select, _selected),
        **_of(functional, "torch.nn.functional", _FUNCTIONAL_ELEMENTWISE, _broadcast),
        **_of(functional, "torch.nn.functional", _FUNCTIONAL_SHRINKING, _no_larger),
        **_of(special, "torch.special", _SPECIAL_ELEMENTWISE, _broadcast),
        **_of(linear, "torch.linalg", ("vector_norm",), _no_larger),
        "torch.nn.functional.pad": Operation(functional.pad, _padded),
        "torch.full_like": Operation(torch.full_like, _no_larger),
        "torch.zeros": Operation(torch.zeros, _filled),
        "torch.ones": Operation(torch.ones, _filled),
        "torch.full": Operation(torch.full, _full),
        "torch.arange": Operation(_step_one, _counted),
        "torch.outer": Operation(torch.outer, _outer),
        "torch.matmul": Operation(torch.matmul, _product),
        "torch.mm": Operation(torch.mm, _product),
        "torch.bmm": Operation(torch.bmm, _product),
        "torch.broadcast_to": Operation(torch.broadcast_to, _expanded),
        "torch.tile": Operation(torch.tile, _repeated),
        "torch.numel": Operation(torch.numel, _none),
        "operator.matmul": Operation(torch.matmul, _product),
        "operator.pow": Operation(_arithmetic(_power), _broadcast),
        "operator.getitem": Operation(_item, _item_size),
        "getattr": Operation(_attribute, _none),
    }
    for name in _OPERATORS:
        table[f"operator.{name}"] = Operation(_arithmetic(getattr(operator, name)), _broadcast)
    for name in _MATH:
        table[f"math.{name}"] = Operation(_arithmetic(getattr(math, name)), _none)
    table.update({alias: table[name] for alias, name in _INNER_NAMES.items() if name in table})
    return table


def _methods() -> dict[str, Operation]:
    sizes: list[tuple[Sequence[str], Size]] = [
        (_ELEMENTWISE, _broadcast),
        ((*_SHRINKING, *_METHODS_ONLY_SHRINKING), _no_larger),
        (_SIZES, _none),
        (("gather",), _gathered),
        (("index_select",), _selected),
        (("expand", "broadcast_to"), _expanded),
        (("repeat", "tile"), _repeated),
        (("matmul", "mm", "bmm"), _product),
        (("outer",), _outer),
        (("expand_as",), _broadcast),
    ]
    return {name: Operation(_method(name), size) for names, size in sizes for name in names if hasattr(Tensor, name)}


FUNCTIONS: Mapping[str, Operation] = _functions()
METHODS: Mapping[str, Operation] = _methods()
