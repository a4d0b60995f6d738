"""Forward and backward passes: target logprobs, losses and gradients of checked datums.

Microbatches have a maximum number of padded tokens. Padding is on the right, where a causal model does not see it, so
that results equal those of each sequence alone. All sums are plain sums.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import Array, EncodedDatum, EncodedImage
from tinkex_py.local.lora import Adapter
from tinkex_py.local.losses import DatumLoss, Loss
from tinkex_py.local.models import LoadedModel

# The exponentials of so many rows of logits stay in the processor's cache.
_ROWS = 32


@dataclass(frozen=True)
class Example:
    """A checked datum on the device: tokens [T], targets [T, K], `shape` of target_tokens, loss inputs, and images."""

    tokens: Tensor
    targets: Tensor
    shape: tuple[int, ...]
    inputs: Mapping[str, Tensor]
    images: tuple[EncodedImage, ...] = ()


@dataclass(frozen=True)
class Microbatch:
    """Target logprobs of the examples at `indices` of a request, with a graph if created in grad mode."""

    indices: tuple[int, ...]
    logprobs: tuple[Tensor, ...]

    def without_graph(self) -> "Microbatch":
        """Returns the same logprobs without their graph."""
        return Microbatch(self.indices, tuple(logprobs.detach() for logprobs in self.logprobs))


def prepare(data: Sequence[EncodedDatum], loss: Loss, model: LoadedModel, *, finite: bool = True) -> list[Example]:
    """Checks all datums before any work is done, so that invalid ones never leave a partial gradient.

    Args:
        data: the datums.
        loss: the loss to compute.
        model: the network.
        finite: whether to refuse loss inputs that are NaN or infinite; they only harm gradients.

    Raises:
        InvalidData: names the datum, the field and the value.
    """
    if not data:
        raise InvalidData("the request has no data: send at least one datum")
    return [_example(f"data[{index}]", datum, loss, model, finite=finite) for index, datum in enumerate(data)]


def _example(where: str, datum: EncodedDatum, loss: Loss, model: LoadedModel, *, finite: bool) -> Example:
    targets = _checked_targets(where, datum, loss, model)
    return Example(
        tokens=torch.as_tensor(_writable(datum.tokens, np.int64), device=model.device),
        targets=torch.as_tensor(_writable(targets, np.int64).reshape(len(targets), -1), device=model.device),
        shape=tuple(targets.shape),
        inputs={
            name: torch.as_tensor(value, device=model.device)
            for name, value in _checked_inputs(where, datum, loss, targets.shape, finite=finite).items()
        },
        images=datum.images,
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
        raise InvalidData(f"{where}: {length} tokens, but {model.name!r} supports at most {model.context_length}")
    ranks = (1, 2) if loss.matrix_targets else (1,)
    if targets.ndim not in (ranks if loss.logprobs_rank is None else (loss.logprobs_rank,)):
        raise InvalidData(f"{where}: loss_fn {loss.name!r} does not accept target_tokens of shape {targets.shape}")
    if targets.shape[0] != length or targets.size == 0:
        raise InvalidData(f"{where}: target_tokens has shape {targets.shape}, but model_input has {length} tokens")
    if targets.ndim == 2 and targets.shape[1] > model.vocabulary_size:
        raise InvalidData(
            f"{where}: target_tokens has {targets.shape[1]} candidates per position, more than the vocabulary has "
            f"tokens, {model.vocabulary_size}"
        )
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
        if value is None and name == "weights" and datum.images:
            value = _weights_of_text(datum, shape)
        if value is None and name in loss.optional:
            continue
        if value is None:
            raise InvalidData(f"{where}: loss_fn {loss.name!r} needs {name}; got {sorted(datum.inputs)}")
        if finite and not np.isfinite(value).all():
            raise InvalidData(f"{where}: {name} has a value that is not finite")
        inputs[name] = _fitted(f"{where}: {name}", value, loss, name, shape)
    return inputs


def _weights_of_text(datum: EncodedDatum, shape: tuple[int, ...]) -> Array:
    """Returns 1 for each position, and 0 where the next one is part of an image, which no model predicts."""
    weights = np.ones(shape, np.float32)
    for image in datum.images:
        weights[max(image.start - 1, 0) : image.start + image.length - 1] = 0
    return weights


def _fitted(where: str, value: Array, loss: Loss, name: str, shape: tuple[int, ...]) -> Array:
    if loss.ranks is None:
        if value.shape != shape:
            raise InvalidData(f"{where} has shape {value.shape}, but target_tokens has {shape}")
        return _writable(value, np.float32)
    rank = loss.ranks[name]
    if rank == 0 and value.size == 1:
        # The wire does not distinguish a scalar from a list of one number.
        return value.reshape(()).copy()
    if value.ndim != rank:
        raise InvalidData(f"{where} has shape {value.shape}, but the loss declares {rank} dimension(s) for it")
    return _writable(value, value.dtype.type)


def _writable(array: Array, dtype: type[np.generic]) -> Any:
    """Returns the array, or a copy if it belongs to the received bytes or has another dtype."""
    return np.require(array, dtype, ["C", "W", "ALIGNED"])


def check_tokens(where: str, tokens: Array, model: LoadedModel) -> None:
    """Raises InvalidData for the first token id that is not in the vocabulary."""
    bad = tokens[(tokens < 0) | (tokens >= model.vocabulary_size)]
    if bad.size:
        raise InvalidData(f"{where}: token {int(bad.flat[0])} is not in 0..{model.vocabulary_size - 1}")


def split(examples: Sequence[Example], max_tokens: int) -> list[tuple[int, ...]]:
    """Returns the indices of each microbatch: similar lengths, at most `max_tokens` with padding; images alone."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    groups: list[list[int]] = []
    alone: list[tuple[int, ...]] = []
    for index in order:
        length = len(examples[index].tokens)
        if examples[index].images:
            alone.append((index,))
        elif groups and (len(groups[-1]) + 1) * length <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [*map(tuple, groups), *alone]


def forward(model: LoadedModel, examples: Sequence[Example], indices: tuple[int, ...]) -> Microbatch:
    """Computes the target logprobs of one microbatch, each shaped like its target_tokens."""
    chosen = [examples[index] for index in indices]
    padded = torch.nn.utils.rnn.pad_sequence([example.tokens for example in chosen], batch_first=True)
    seen = inputs_of_images(f"data[{indices[0]}]", model, padded, chosen[0].images)
    wanted = target_logprobs(model.network(input_ids=padded, use_cache=False, **seen).logits, _padded_targets(chosen))
    logprobs = tuple(
        wanted[row, : len(example.tokens), : example.targets.shape[1]].reshape(example.shape)
        for row, example in enumerate(chosen)
    )
    return Microbatch(indices=indices, logprobs=logprobs)


def inputs_of_images(
    where: str, model: LoadedModel, tokens: Tensor, images: Sequence[EncodedImage]
) -> dict[str, Tensor]:
    """Returns the inputs of the network for the images of the only sequence of a batch, [1, T].

    Raises:
        InvalidData: the text contains a token that stands for an image, or the images do not go together.
    """
    if not images or model.images is None:
        return {}
    try:
        return model.images.inputs(tokens, images)
    except InvalidData as error:
        raise InvalidData(f"{where}: {error}") from error


def _padded_targets(examples: Sequence[Example]) -> Tensor:
    """Targets of all examples, [examples, longest, most candidates], padded with 0."""
    lengths, widths = zip(*(example.targets.shape for example in examples), strict=True)
    padded = examples[0].targets.new_zeros(len(examples), max(lengths), max(widths))
    for row, example in enumerate(examples):
        length, width = example.targets.shape
        padded[row, :length, :width] = example.targets
    return padded


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns `log_softmax(logits)` at the targets, float32.

    Args:
        logits: [..., vocabulary].
        targets: token ids, [..., candidates]; may repeat.

    Returns:
        [..., candidates].
    """
    vocabulary, candidates = logits.shape[-1], targets.shape[-1]
    rows, wanted = logits.float().reshape(-1, vocabulary), targets.reshape(-1, candidates)
    return cast("Tensor", _TargetLogprobs.apply(rows, wanted)).view(targets.shape)  # pyright: ignore[reportUnknownMemberType]


class _TargetLogprobs(torch.autograd.Function):
    """Needs one tensor of the size of the logits for the backward pass; autograd's own operations need three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        normalizer = torch.cat([rows.logsumexp(-1, keepdim=True) for rows in torch.split(logits, _ROWS)])
        ctx.save_for_backward(logits, normalizer, targets)
        return logits.gather(-1, targets) - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, normalizer, targets = ctx.saved_tensors
        of_logits = torch.sub(logits, normalizer).exp_().mul_(gradient.sum(-1, keepdim=True).neg_())
        return of_logits.scatter_add_(-1, targets, gradient), None


def microbatch_losses(microbatch: Microbatch, examples: Sequence[Example], loss: Loss) -> list[DatumLoss]:
    """Computes the losses of a microbatch; InvalidData: one fails, or is not finite although a gradient is wanted."""
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
    """Merges metrics: ":sum" adds up, ":mean" is the mean over the datums that have it."""
    columns: dict[str, list[float]] = {"loss:sum": [float(loss.value.item()) for loss in losses]}
    for loss in losses:
        for name, value in loss.metrics.items():
            columns.setdefault(name, []).append(float(value))
    return {name: sum(values) / (len(values) if name.endswith(":mean") else 1) for name, values in columns.items()}


def in_order(microbatches: Sequence[Microbatch], values: Sequence[Sequence[Any]], count: int) -> list[Any]:
    """Returns the values of all examples in the order of the request."""
    placed = {
        index: value
        for part, given in zip(microbatches, values, strict=True)
        for index, value in zip(part.indices, given, strict=True)
    }
    return [placed[index] for index in range(count)]


def gradients(total: Tensor, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Returns d(total)/d(parameter) for every parameter of the adapter, and frees the graph."""
    values = torch.autograd.grad(total, list(adapter.parameters.values()))
    return zip(adapter.parameters.keys(), values, strict=True)


def vector_jacobian_products(
    part: Microbatch, examples: Sequence[Example], names: Sequence[str], adapter: Adapter
) -> list[dict[str, Tensor]]:
    """Returns, for each of these inputs, its product with d(logprobs)/d(parameter), and frees the graph."""
    parameters = list(adapter.parameters.values())
    products: list[dict[str, Tensor]] = []
    for place, name in enumerate(names, start=1):
        vectors = [examples[index].inputs[name] for index in part.indices]
        values = torch.autograd.grad(part.logprobs, parameters, vectors, retain_graph=place < len(names))
        products.append(dict(zip(adapter.parameters, values, strict=True)))
    return products


def dot_products(gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Returns the dot product of each pair, as the metric `product/ROW/COLUMN` with `COLUMN <= ROW`."""
    return {
        f"product/{row}/{column}": math.fsum(
            float((own * other[key]).sum(dtype=torch.float64).item()) for key, own in gradients[row].items()
        )
        for row in range(len(gradients))
        for column, other in enumerate(gradients[: row + 1])
    }
