"""Reads the data of a run and tracks the position in it."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.runs.fingerprints import batch_fingerprint
from tinkex_py.threads import FileThread
from tinkex_py.types import Datum
from tinkex_py.types.datum import is_official, own_datums

Batch = Sequence[Datum]
BatchStream = Iterable[Batch] | AsyncIterable[Batch]
Batches = BatchStream | Callable[[int], BatchStream]


class BatchReader:
    """Reads batches in order, and compares those that are read again with what they were.

    Args:
        batches: an iterable, sync or async; or a function from the number of batches to skip to an iterable.
        files: thread that computes fingerprints.
        allow_changes: whether batches may differ from what they were.

    Raises:
        ConfigError: `batches` is neither.

    Attributes:
        position: number of batches read, those of earlier processes included.
        fingerprints: of the batches read so far, by position, those of earlier processes included.
        changed: positions of the batches that differed, if that is allowed.
    """

    def __init__(self, batches: Batches, files: FileThread, *, allow_changes: bool = False) -> None:
        if not _is_stream(batches) and not callable(batches):
            raise ConfigError(
                "batches must be an iterable of batches, or a function that is called with the number of batches to "
                f"skip, got a {type(batches).__name__}"
            )
        self._batches = batches
        self._files = files
        self._allow_changes = allow_changes
        self._current: Iterator[Batch] | AsyncIterator[Batch] | None = None
        self.position = 0
        self.fingerprints: dict[int, str] = {}
        self.changed: list[int] = []

    async def go_to(self, position: int) -> None:
        """Makes the batch after `position` batches the next one.

        Raises:
            ConfigError: the batches cannot be read again, or there are fewer.
        """
        if self._current is not None and not self.can_begin_again:
            raise ConfigError(
                "batches is an iterator, which cannot be read again: give a list, or a function that is called with "
                "the number of batches to skip"
            )
        await self.aclose()
        if _is_stream(self._batches):
            self._current = _iterator_of(cast("BatchStream", self._batches))
            self.position = 0
            while self.position < position:
                if not await self.take(1):
                    raise ConfigError(
                        f"batches ended after {self.position} batches, but the run has already read {position}: give "
                        "the data that the run was started with"
                    )
        else:
            stream = cast("Callable[[int], BatchStream]", self._batches)(position)
            if not _is_stream(stream):
                raise ConfigError(f"batches({position}) must return an iterable, got a {type(stream).__name__}")
            self._current = _iterator_of(stream)
            self.position = position

    @property
    def can_begin_again(self) -> bool:
        """False for an iterator, which can be read only once."""
        return not isinstance(self._batches, Iterator | AsyncIterator)

    async def take(self, count: int) -> list[Batch]:
        """Returns the next batches; fewer where they end."""
        taken: list[Batch] = []
        while len(taken) < count:
            try:
                batch = await self._next()
            except StopAsyncIteration:
                break
            batch = checked_batch(batch, self.position)
            await self._compare(batch)
            taken.append(batch)
            self.position += 1
        return taken

    def last(self, count: int) -> list[str]:
        """Returns the fingerprints of the batches read last."""
        return [self.fingerprints[position] for position in range(self.position - count, self.position)]

    async def take_unless(self, stop: asyncio.Event, count: int) -> list[Batch]:
        """Returns the next batches; none if `stop` is set while they are awaited, and then no more can be read.

        They are awaited in the caller's task, because the source may hold a cancel scope, which belongs to one task.
        """
        position = self.position
        scope = asyncio.timeout(None)

        async def end_when_stopped() -> None:
            await stop.wait()
            scope.reschedule(asyncio.get_running_loop().time())

        try:
            async with scope:
                stopping = asyncio.create_task(end_when_stopped(), name="tinkex.stop")
                try:
                    return await self.take(count)
                finally:
                    stopping.cancel()
                    await asyncio.wait([stopping])
        except TimeoutError:
            if not scope.expired():
                raise
            self.position = position
            return []

    async def _compare(self, batch: Batch) -> None:
        now = await self._files.run(lambda: batch_fingerprint(batch))
        before = self.fingerprints.setdefault(self.position, now)
        if before == now:
            return
        if not self._allow_changes:
            raise ConfigError(
                f"batch {self.position} is not the one that the run was trained on before: resume the run with the "
                "same data in the same order, allow the change with allow_changes=True, or use another folder"
            )
        self.fingerprints[self.position] = now
        self.changed.append(self.position)

    async def _next(self) -> Batch:
        assert self._current is not None, "go_to first"
        if isinstance(self._current, AsyncIterator):
            return await anext(self._current)
        for batch in self._current:
            return batch
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Closes the generators that were created here."""
        current: Any = self._current
        self._current = None
        if current is None or not self.can_begin_again:
            return
        if hasattr(current, "aclose"):
            await current.aclose()
        elif hasattr(current, "close"):
            current.close()


def checked_batch(batch: object, position: int) -> Batch:
    """Returns a batch with the datums of the official SDK converted; raises InvalidData for anything but datums."""
    given = f"a {type(batch).__name__}"
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        items = cast("Sequence[object]", batch)
        wrong = [item for item in items if not isinstance(item, Datum) and not is_official(item)]
        if not wrong:
            return own_datums(items) if any(map(is_official, items)) else cast("Batch", batch)
        given += f" with a {type(wrong[0]).__name__}"
    raise InvalidData(f"batch {position} must be a sequence of Datum, got {given}: pass lists of datums")


def _is_stream(batches: object) -> bool:
    return isinstance(batches, Iterable | AsyncIterable)


def _iterator_of(stream: BatchStream) -> Iterator[Batch] | AsyncIterator[Batch]:
    return aiter(stream) if isinstance(stream, AsyncIterable) else iter(stream)
