"""Forward and backward passes: datums in, target logprobs, loss and gradients out.

Work is cut into microbatches of at most so many padded tokens. Sequences are padded on the right; in a causal model
no real position sees what comes after it, so the numbers are those of each sequence alone. All sums are plain sums.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import Array, EncodedDatum
from tinkex_py.local.lora import Adapter
from tinkex_py.local.losses import DatumLoss, Loss
from tinkex_py.local.models import LoadedModel
from tinkex_py.local.target_logprobs import target_logprobs


@dataclass(frozen=True)
class Example:
    """One checked datum on the device: tokens [T], targets [T, K], the `shape` of target_tokens, its loss inputs."""

    tokens: Tensor
    targets: Tensor
    shape: tuple[int, ...]
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Microbatch:
    """Target logprobs of some examples, with a graph when made in grad mode; `indices` are places in the request."""

    indices: tuple[int, ...]
    logprobs: tuple[Tensor, ...]


def prepare(data: Sequence[EncodedDatum], loss: Loss, model: LoadedModel, *, finite: bool = True) -> list[Example]:
    """Check every datum before any work is done, so that bad input never leaves half a gradient behind.

    Args:
        data: the datums.
        loss: what will be computed on them.
        model: the network.
        finite: refuse loss inputs that are NaN or infinite; without a gradient they do no harm.

    Raises:
        InvalidData: naming the datum, the field and the value.
    """
    if not data:
        raise InvalidData("the request has no data: send at least one datum")
    return [_prepare_one(f"data[{index}]", datum, loss, model, finite=finite) for index, datum in enumerate(data)]


def _prepare_one(where: str, datum: EncodedDatum, loss: Loss, model: LoadedModel, *, finite: bool) -> Example:
    targets = _checked_targets(where, datum, loss, model)
    return Example(
        tokens=torch.as_tensor(np.array(datum.tokens, dtype=np.int64), device=model.device),
        targets=torch.as_tensor(np.array(targets, dtype=np.int64).reshape(len(targets), -1), device=model.device),
        shape=tuple(targets.shape),
        inputs={
            name: torch.as_tensor(value, device=model.device)
            for name, value in _checked_inputs(where, datum, loss, targets.shape, finite=finite).items()
        },
    )


def _checked_targets(where: str, datum: EncodedDatum, loss: Loss, model: LoadedModel) -> Array:
    targets = datum.inputs.get("target_tokens")
    if targets is None:
        raise InvalidData(f"{where}: loss_fn {loss.name!r} needs target_tokens; got {sorted(datum.inputs)}")
    if targets.dtype.kind != "i":
        raise InvalidData(f"{where}: target_tokens must be int64, not {targets.dtype}")
    length = len(datum.tokens)
    if length == 0:
        raise InvalidData(f"{where}: model_input is empty")
    if length > model.context_length:
        raise InvalidData(f"{where}: {length} tokens, but {model.name!r} holds at most {model.context_length}")
    ranks = (1, 2) if loss.matrix_targets else (1,)
    if targets.ndim not in (ranks if loss.logprobs_rank is None else (loss.logprobs_rank,)):
        raise InvalidData(f"{where}: target_tokens of shape {targets.shape} cannot be used by loss_fn {loss.name!r}")
    if targets.shape[0] != length or targets.size == 0:
        raise InvalidData(f"{where}: target_tokens has shape {targets.shape}, but model_input has {length} tokens")
    check_tokens(f"{where}: model_input", datum.tokens, model)
    check_tokens(f"{where}: target_tokens", targets, model)
    return targets


def _checked_inputs(
    where: str, datum: EncodedDatum, loss: Loss, shape: tuple[int, ...], *, finite: bool
) -> dict[str, Array]:
    for name in loss.refused:
        if name in datum.inputs:
            raise InvalidData(f"{where}: loss_fn {loss.name!r} takes {name} as one number in loss_fn_config only")
    inputs: dict[str, Array] = {}
    for name in (*loss.required, *loss.optional):
        value = datum.inputs.get(name)
        if value is None and name in loss.optional:
            continue
        if value is None:
            raise InvalidData(f"{where}: loss_fn {loss.name!r} needs {name}; got {sorted(datum.inputs)}")
        if finite and not np.isfinite(value).all():
            raise InvalidData(f"{where}: {name} has a value that is not finite")
        inputs[name] = _fitted(f"{where}: {name}", value, loss, name, shape)
    return inputs


def _fitted(where: str, value: Array, loss: Loss, name: str, shape: tuple[int, ...]) -> Array:
    if loss.ranks is None:
        if value.shape != shape:
            raise InvalidData(f"{where} has shape {value.shape}, but target_tokens has {shape}")
        return np.array(value, dtype=np.float32)
    rank = loss.ranks[name]
    if rank == 0 and value.size == 1:
        # On the wire a scalar and one number in a list look the same.
        return value.reshape(()).copy()
    if value.ndim != rank:
        raise InvalidData(f"{where} has shape {value.shape}, but the loss declared {rank} dimension(s) for it")
    return value.copy()


def check_tokens(where: str, tokens: Array, model: LoadedModel) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        InvalidData: naming the first bad id.
    """
    bad = tokens[(tokens < 0) | (tokens >= model.vocabulary_size)]
    if bad.size:
        raise InvalidData(f"{where}: token {int(bad.flat[0])} is not in 0..{model.vocabulary_size - 1}")


def split(examples: Sequence[Example], max_tokens: int) -> list[tuple[int, ...]]:
    """Places of the examples of each microbatch: neighbours in length, at most `max_tokens` with padding."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    groups: list[list[int]] = []
    for index in order:
        length = len(examples[index].tokens)
        if groups and (len(groups[-1]) + 1) * length <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [tuple(group) for group in groups]


def forward(model: LoadedModel, examples: Sequence[Example], indices: tuple[int, ...]) -> Microbatch:
    """Target logprobs of one microbatch, each shaped like its target_tokens; with a graph in grad mode."""
    chosen = [examples[index] for index in indices]
    padded = torch.nn.utils.rnn.pad_sequence([example.tokens for example in chosen], batch_first=True)
    wanted = target_logprobs(model.network(input_ids=padded, use_cache=False).logits, _padded_targets(chosen))
    logprobs = tuple(
        wanted[row, : len(example.tokens), : example.targets.shape[1]].reshape(example.shape)
        for row, example in enumerate(chosen)
    )
    return Microbatch(indices=indices, logprobs=logprobs)


def _padded_targets(examples: Sequence[Example]) -> Tensor:
    """Targets of all examples, `[examples, longest, most candidates]`; 0 where there are none."""
    lengths, widths = zip(*(example.targets.shape for example in examples), strict=True)
    padded = examples[0].targets.new_zeros(len(examples), max(lengths), max(widths))
    for row, example in enumerate(examples):
        length, width = example.targets.shape
        padded[row, :length, :width] = example.targets
    return padded


def microbatch_losses(microbatch: Microbatch, examples: Sequence[Example], loss: Loss) -> list[DatumLoss]:
    """The loss of each example of a microbatch, in the microbatch's order.

    Raises:
        InvalidData: the loss cannot be computed for an example, or is not finite although a gradient is wanted.
    """
    return [
        _datum_loss(index, logprobs, examples[index], loss)
        for index, logprobs in zip(microbatch.indices, microbatch.logprobs, strict=True)
    ]


def _datum_loss(index: int, logprobs: Tensor, example: Example, loss: Loss) -> DatumLoss:
    try:
        result = loss.compute(logprobs, example.inputs)
    except InvalidData as error:
        raise InvalidData(f"data[{index}]: {error}") from error
    if logprobs.requires_grad and not math.isfinite(result.value.item()):
        raise InvalidData(f"data[{index}]: the loss is {result.value.item()}; nothing was added to the gradients")
    return result


def merged_metrics(losses: Sequence[DatumLoss]) -> dict[str, float]:
    """The metrics of all datums together: ":sum" adds up, ":mean" is the mean over the datums that have it."""
    columns: dict[str, list[float]] = {"loss:sum": [float(loss.value.item()) for loss in losses]}
    for loss in losses:
        for name, value in loss.metrics.items():
            columns.setdefault(name, []).append(float(value))
    return {name: sum(values) / (len(values) if name.endswith(":mean") else 1) for name, values in columns.items()}


def in_order(microbatches: Sequence[Microbatch], values: Sequence[Sequence[Any]], count: int) -> list[Any]:
    """What every example of a request got, in the order of the request."""
    placed = {
        index: value
        for part, given in zip(microbatches, values, strict=True)
        for index, value in zip(part.indices, given, strict=True)
    }
    return [placed[index] for index in range(count)]


def gradients(total: Tensor, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """d(total)/d(parameter) for every parameter of the adapter; frees the graph."""
    values = torch.autograd.grad(total, list(adapter.parameters.values()))
    return zip(adapter.parameters.keys(), values, strict=True)
