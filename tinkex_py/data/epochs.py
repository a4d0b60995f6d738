"""Shuffled batches, epoch after epoch, that can begin anywhere."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tinkex_py.arguments import as_integer, check_count, check_items, shown
from tinkex_py.errors import InvalidData

Item = TypeVar("Item")


def batches(data: Sequence[Item], size: int, seed: int = 0) -> Callable[[int], Iterator[list[Item]]]:
    """Returns a function from a number of batches to skip to the batches after them, as `train` takes it.

    Each epoch shuffles the items again, and the batches do not end. An incomplete batch at the end of an epoch
    is left out, unless all items together are fewer than a batch. The same arguments give the same batches, so that a
    resumed run continues with the next one.

    Args:
        data: datums, prompts or anything else, at least one.
        size: items per batch.
        seed: of the order.

    Raises:
        InvalidData: an argument is not valid.
    """
    items, count, number = list(check_items("data", data)), check_count("size", size, least=1), as_integer(seed)
    if not items:
        raise InvalidData("data is empty: pass at least one item")
    if number is None:
        raise InvalidData(f"seed must be an int, got {shown(seed)}")

    def from_batch(start: int) -> Iterator[list[Item]]:
        return _from_batch(items, count, number, check_count("start", start, least=0))

    return from_batch


def _from_batch(items: Sequence[Item], size: int, seed: int, start: int) -> Iterator[list[Item]]:
    order, generator = list(items), random.Random(seed)  # noqa: S311  # shuffling, not cryptography
    firsts = range(0, len(order) - size + 1, size) or range(1)
    epochs, skipped = divmod(start, len(firsts))
    for _ in range(epochs):
        generator.shuffle(order)
    while True:
        generator.shuffle(order)
        for first in firsts[skipped:]:
            yield order[first : first + size]
        skipped = 0
