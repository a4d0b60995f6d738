"""Autograd graphs of forward passes, kept for their backward pass.

A custom step requests logprobs, and later returns weights for the same datums; a kept graph saves the second forward
pass. Graphs are bounded in number and bytes; without one, the forward pass is computed again.
"""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinkex_py.local.passes import Example, Microbatch

GRAPHS_PER_MODEL = 2


@dataclass(frozen=True)
class KeptGraph:
    """The microbatches of a forward pass, and the bytes they keep alive."""

    owner: str
    key: bytes
    microbatches: tuple[Microbatch, ...]
    size: int


@dataclass
class GraphMeter:
    """Measures the bytes that graphs keep alive, without the weights of the network."""

    weights: frozenset[int]
    storages: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self.storages.values())

    @contextmanager
    def measuring(self) -> Generator[None]:
        """Counts the tensors that the block saves for backward."""
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda saved: saved):
            yield

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        # The tensor itself refers to the graph that saves it: without a backward pass, the graph would never be freed.
        return tensor.detach()


def weight_storages(network: Any) -> frozenset[int]:
    """Returns the addresses of all weights of a network, adapters included."""
    return frozenset(parameter.untyped_storage().data_ptr() for parameter in network.parameters())


def fingerprint(examples: Sequence[Example]) -> bytes:
    """Returns a digest of tokens, images and targets, which passes must have in common to share a graph."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((tuple(example.tokens.shape), example.shape)).encode())
        digest.update(example.tokens.cpu().numpy().tobytes())
        digest.update(example.targets.cpu().numpy().tobytes())
        for image in example.images:
            digest.update(hashlib.sha256(image.data).digest())
    return digest.digest()


class GraphKeeper:
    """The kept graphs of all models, oldest first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._graphs: list[KeptGraph] = []

    @property
    def size(self) -> int:
        """Bytes kept alive."""
        return sum(graph.size for graph in self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def keep(self, graph: KeptGraph) -> None:
        """Keeps a graph, and drops the oldest ones beyond the bounds."""
        if graph.size > self.budget_bytes:
            return
        self._graphs = [kept for kept in self._graphs if (kept.owner, kept.key) != (graph.owner, graph.key)]
        own = [kept for kept in self._graphs if kept.owner == graph.owner]
        if len(own) >= GRAPHS_PER_MODEL:
            self._graphs.remove(own[0])
        while self._graphs and self.size + graph.size > self.budget_bytes:
            self._graphs.pop(0)
        self._graphs.append(graph)

    def take(self, owner: str, key: bytes) -> KeptGraph | None:
        """Removes and returns a graph for its backward pass, or None."""
        for graph in self._graphs:
            if (graph.owner, graph.key) == (owner, key):
                self._graphs.remove(graph)
                return graph
        return None

    def drop(self, owner: str) -> None:
        """Drops the graphs of a model, whose weights have changed or which is unloaded."""
        self._graphs = [graph for graph in self._graphs if graph.owner != owner]
