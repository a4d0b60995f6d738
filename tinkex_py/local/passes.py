"""Forward and backward passes: datums in, target logprobs, loss and gradients out.

Work is cut into microbatches of at most so many padded tokens. Sequences are padded on the right; in a causal model
no real position sees what comes after it, so the numbers are those of each sequence alone. All sums are plain sums.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import Array, EncodedDatum
from tinkex_py.local.lora import Adapter
from tinkex_py.local.losses import BuiltinLoss
from tinkex_py.local.models import LoadedModel


@dataclass(frozen=True)
class Example:
    """One checked datum on the device: tokens [T], targets [T, K]; loss inputs have the `shape` of target_tokens."""

    tokens: Tensor
    targets: Tensor
    shape: tuple[int, ...]
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Microbatch:
    """Target logprobs of some examples, with a graph when made in grad mode; `indices` are places in the request."""

    indices: tuple[int, ...]
    logprobs: tuple[Tensor, ...]


def prepare(data: Sequence[EncodedDatum], loss_fn: str, loss: BuiltinLoss, model: LoadedModel) -> list[Example]:
    """Check every datum before any work is done, so that bad input never leaves half a gradient behind.

    Raises:
        InvalidData: naming the datum, the field and the value.
    """
    if not data:
        raise InvalidData("the request has no data: send at least one datum")
    return [_prepare_one(index, datum, loss_fn, loss, model) for index, datum in enumerate(data)]


def _prepare_one(index: int, datum: EncodedDatum, loss_fn: str, loss: BuiltinLoss, model: LoadedModel) -> Example:
    where = f"data[{index}]"
    targets = datum.inputs.get("target_tokens")
    if targets is None:
        raise InvalidData(f"{where}: loss_fn {loss_fn!r} needs target_tokens; got {sorted(datum.inputs)}")
    length = len(datum.tokens)
    if length == 0:
        raise InvalidData(f"{where}: model_input is empty")
    if length > model.context_length:
        raise InvalidData(f"{where}: {length} tokens, but {model.name!r} holds at most {model.context_length}")
    if targets.ndim not in (1, 2) or (targets.ndim == 2 and not loss.matrix_targets):
        raise InvalidData(f"{where}: target_tokens of shape {targets.shape} cannot be used by loss_fn {loss_fn!r}")
    if targets.shape[0] != length or targets.size == 0:
        raise InvalidData(f"{where}: target_tokens has shape {targets.shape}, but model_input has {length} tokens")
    check_tokens(f"{where}: model_input", datum.tokens, model)
    check_tokens(f"{where}: target_tokens", targets, model)
    inputs: dict[str, Tensor] = {}
    for name in (*loss.required, *loss.optional):
        value = datum.inputs.get(name)
        if value is None and name in loss.optional:
            continue
        if value is None:
            raise InvalidData(f"{where}: loss_fn {loss_fn!r} needs {name}; got {sorted(datum.inputs)}")
        if value.shape != targets.shape:
            raise InvalidData(f"{where}: {name} has shape {value.shape}, but target_tokens has {targets.shape}")
        inputs[name] = torch.as_tensor(np.array(value, dtype=np.float32), device=model.device)
    columns = np.array(targets, dtype=np.int64).reshape(length, -1)
    return Example(
        tokens=torch.as_tensor(np.array(datum.tokens, dtype=np.int64), device=model.device),
        targets=torch.as_tensor(columns, device=model.device),
        shape=tuple(targets.shape),
        inputs=inputs,
    )


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
    logits = model.network(input_ids=padded, use_cache=False).logits.float()
    normalizers = logits.logsumexp(-1, keepdim=True)
    logprobs = tuple(
        (
            logits[row, : len(example.tokens)].gather(-1, example.targets) - normalizers[row, : len(example.tokens)]
        ).reshape(example.shape)
        for row, example in enumerate(chosen)
    )
    return Microbatch(indices=indices, logprobs=logprobs)


def microbatch_loss(
    microbatch: Microbatch, examples: Sequence[Example], loss: BuiltinLoss, config: Mapping[str, float]
) -> Tensor:
    """The summed loss of one microbatch."""
    losses = [
        loss.compute(logprobs, examples[index].inputs, config)
        for index, logprobs in zip(microbatch.indices, microbatch.logprobs, strict=True)
    ]
    return torch.stack(losses).sum()


def gradients(total: Tensor, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """d(total)/d(parameter) for every parameter of the adapter; frees the graph.

    Raises:
        InvalidData: the loss is not finite.
    """
    if not math.isfinite(total.item()):
        raise InvalidData(f"the loss is {total.item()}: nothing was added to the gradients")
    values = torch.autograd.grad(total, list(adapter.parameters.values()))
    return zip(adapter.parameters.keys(), values, strict=True)
