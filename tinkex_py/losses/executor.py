"""Runs terms: one task each, under a semaphore, with a timeout; sync ones in worker threads. No gradients here."""

import asyncio
import inspect
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from tenacity import RetryError

from tinkex_py import telemetry
from tinkex_py.errors import InPlaceMutation, InvalidTermResult, RegularizerError, RegularizerTimeout
from tinkex_py.losses.grad_mode import autograd_on, with_own_grad_mode
from tinkex_py.losses.gradients import Evaluation, evaluate
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.repetition import repeated
from tinkex_py.losses.slots import Slot, Slots, SlotsAbandoned
from tinkex_py.losses.terms import Outcome, PreparedTerm, described, failed_with
from tinkex_py.losses.threads import TermThreads, run_released
from tinkex_py.types import Datum

# Below this a backward pass is cheaper than the way to a thread and back.
SMALL_LOGPROBS = 4096
# How long a term without a timeout waits when abandoned terms hold every thread, in seconds.
DEFAULT_PATIENCE = 60.0


@dataclass(frozen=True)
class _Returned:
    """What a term gave in the thread, where it turned out to be an awaitable."""

    awaitable: Awaitable[object]


@dataclass
class TermRun:
    """One run of several terms over the same logprobs.

    Args:
        data: the datums, handed to every term.
        logprobs: the shared buffer.
        threads: where sync terms run.
        max_concurrency: terms in flight at once.
        track_grad_norms: whether norms are computed.
        max_threads: most live term threads of this group; None leaves it to `threads`.
        thread_group: whose runs share the bounds `max_concurrency` and `max_threads` on live term threads.
    """

    data: Sequence[Datum]
    logprobs: Logprobs
    threads: TermThreads
    max_concurrency: int
    track_grad_norms: bool
    max_threads: int | None = None
    thread_group: object = None
    _permits: Slots = field(init=False)
    _stopping: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._permits = Slots(self.max_concurrency)
        self._thread_limit = min(self.max_concurrency, self.max_threads or self.max_concurrency)

    async def all(self, terms: Sequence[PreparedTerm], *, parallel: bool) -> list[Outcome]:
        """Runs the terms; outcomes in the order of `terms`.

        The first failure cancels the rest and is raised, with further failures as its notes. If the caller is
        cancelled, that wins, and the failures become notes of the cancellation.

        Raises:
            RegularizerError: the first failure.
        """
        failures: list[Outcome] = []
        tasks: list[asyncio.Task[Outcome]] = []

        async def run(term: PreparedTerm) -> Outcome:
            outcome = await self._outcome(term)
            if outcome.fails_step:
                failures.append(outcome)
                self._stop(task for task in tasks if task is not asyncio.current_task())
            return outcome

        try:
            async with asyncio.TaskGroup() as group:
                for term in terms:
                    tasks.append(group.create_task(run(term), name=f"tinkex.regularizer.{term.name}"))
                    if not parallel:
                        await self._wait(tasks)
                        if failures:
                            break
                await self._wait(tasks)
        except asyncio.CancelledError as cancelled:
            for failure in failures:
                cancelled.add_note(described(failure.exception))
            raise
        if not self._stopping:
            started = zip(terms, tasks, strict=True)
            failures += [_cancelled_from_outside(term) for term, task in started if task.cancelled()]
        if failures:
            raise self._first_of(failures)
        return [task.result() for task in tasks]

    def _stop(self, others: Iterable[asyncio.Task[Outcome]]) -> None:
        if self._stopping:  # a second cancellation would interrupt the clean-up that the first one started
            return
        self._stopping = True
        for task in others:
            task.cancel()

    async def _wait(self, tasks: Sequence[asyncio.Task[Outcome]]) -> None:
        if not tasks:
            return
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            self._stopping = True
            raise

    def _first_of(self, failures: Sequence[Outcome]) -> BaseException:
        """KeyboardInterrupt and its like win, then a write into the shared logprobs, then the first error."""
        errors = [failure.exception for failure in failures if failure.fatal is not None]
        try:
            # A term that failed may be the victim of another one that wrote into the shared logprobs.
            self.logprobs.check_unchanged()
        except InPlaceMutation as mutation:
            errors.append(mutation)
        errors += [failure.exception for failure in failures if failure.fatal is None]
        first, *others = errors
        for other in others:
            if described(other) != described(first):
                first.add_note(described(other))
        return first

    async def _outcome(self, term: PreparedTerm) -> Outcome:
        try:
            return Outcome(term, evaluation=await self._one(term))
        except asyncio.CancelledError as error:
            if self._stopping:
                raise
            return _cancelled_from_outside(term, error)
        except RegularizerError as error:
            if error.name == term.name:
                return Outcome(term, error=error)
            return Outcome(term, error=failed_with(term, error))
        except Exception as error:  # noqa: BLE001  # a term may raise anything; it is reported under the term's name
            return Outcome(term, error=failed_with(term, error))
        except BaseException as fatal:  # noqa: BLE001
            # Raised inside a task, KeyboardInterrupt and its like would stop the loop before the siblings.
            return Outcome(term, fatal=fatal)

    async def _one(self, term: PreparedTerm) -> Evaluation:
        slot: Slot | None = None
        permit: Slot | None = None
        try:
            if term.is_async is not True:
                slot = await self._turn(self.threads.terms.slots, term, self._thread_limit)
            permit = await self._turn(self._permits, term, self.max_concurrency)
            with _events(term) as measurements:
                evaluation = await self._within_timeout(term, slot, permit)
                if term.weight is not None:
                    measurements["value"] = evaluation.value
                    measurements["contribution"] = term.weight * evaluation.value
                    measurements["grad_norm"] = evaluation.grad_norm
                return evaluation
        finally:
            if slot is not None and slot.abandoned:
                telemetry.emit("tinkex.regularizer.abandoned", {}, {"regularizer_name": term.name})
                if permit is not None:
                    self._permits.abandon(permit)
            else:
                for held in (permit, slot):
                    if held is not None:
                        held.release()

    async def _turn(self, slots: Slots, term: PreparedTerm, limit: int) -> Slot:
        patience = DEFAULT_PATIENCE if term.timeout is None else term.timeout
        try:
            return await slots.acquire(term.name, group=self.thread_group, group_limit=limit, patience=patience)
        except SlotsAbandoned as error:
            with _events(term):  # it never ran, but whoever watches the events is to see it fail
                raise RegularizerTimeout(
                    f"term {term.name!r} did not get to run within {patience} s: every place is held by abandoned "
                    f"terms ({', '.join(error.holders)}), which cannot be stopped. Give them a way to end, or raise "
                    "max_threads",
                    name=term.name,
                    timeout=patience,
                ) from None

    async def _within_timeout(self, term: PreparedTerm, slot: Slot | None, permit: Slot) -> Evaluation:
        expired: BaseException | None = None
        scope = asyncio.timeout(term.timeout)
        try:
            async with scope:
                evaluation = await self._evaluate(term, slot, permit)
            if not scope.expired():
                return evaluation
        except Exception as error:
            if not scope.expired():
                raise
            expired = error if not isinstance(error, TimeoutError) else None
        timeout = cast("float", term.timeout)
        raise RegularizerTimeout(
            f"term {term.name!r} did not end within its timeout of {timeout} s", name=term.name, timeout=timeout
        ) from expired

    async def _evaluate(self, term: PreparedTerm, slot: Slot | None, permit: Slot) -> Evaluation:
        leaf = self.logprobs.leaf(term.name)
        try:
            return await self._call_and_differentiate(term, leaf, slot, permit)
        except Exception:
            # Torch notices some in-place changes itself, in words that do not name the term.
            self.logprobs.check_leaf(leaf)
            raise

    async def _call_and_differentiate(
        self, term: PreparedTerm, leaf: torch.Tensor, slot: Slot | None, permit: Slot
    ) -> Evaluation:
        if slot is None:
            result, attempts = await with_own_grad_mode(self._attempts(term, leaf))
            return replace(await self._gradient(term, result, leaf), attempts=attempts)

        def release() -> None:
            permit.release()
            slot.release()

        returned = await self.threads.terms.run(
            lambda: self._in_thread(term, leaf), slot=slot, release=release, discard=_close_coroutine
        )
        if isinstance(returned, Evaluation):
            return returned
        slot.release()
        result = await with_own_grad_mode(returned.awaitable)
        return await self._gradient(term, result, leaf)

    async def _attempts(self, term: PreparedTerm, leaf: torch.Tensor) -> tuple[object, int]:
        """The term's result, and how often it was called for it."""
        attempts = 0

        async def call() -> object:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                telemetry.emit("tinkex.regularizer.retry", {"attempt": attempts}, {"regularizer_name": term.name})
            try:
                return await self._awaitable(term, leaf)
            except Exception:
                self.logprobs.check_leaf(leaf)
                raise

        if term.retry is None:
            return await call(), attempts
        try:
            return await repeated(term.retry, call), attempts
        except RetryError as error:
            failure = error.last_attempt.exception() or error
            failure.add_note(f"attempts: {attempts}")
            raise failure from None

    async def _awaitable(self, term: PreparedTerm, leaf: torch.Tensor) -> object:
        result = self._call(term, leaf)
        if not inspect.isawaitable(result):
            raise InvalidTermResult(
                f"term {term.name!r} has is_async=True but returned a {type(result).__name__}, not an awaitable",
                name=term.name,
            )
        return await result

    def _in_thread(self, term: PreparedTerm, leaf: torch.Tensor) -> Evaluation | _Returned:
        with autograd_on():
            try:
                result = self._call(term, leaf)
            except StopIteration as error:  # it would end the coroutine that waits for this thread
                raise failed_with(term, error) from error
            if not inspect.isawaitable(result):
                return self._arithmetic(term, result, leaf)
            if term.is_async is None:
                return _Returned(result)
            if inspect.iscoroutine(result):
                result.close()
            raise InvalidTermResult(
                f"term {term.name!r} has is_async=False but returned an awaitable; pass is_async=True", name=term.name
            )

    def _call(self, term: PreparedTerm, leaf: torch.Tensor) -> object:
        return term.function(self.data, self._input(term, leaf), **term.options)

    def _input(self, term: PreparedTerm, leaf: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        if term.per_datum:
            return self.logprobs.views(leaf, self.data)
        self.logprobs.check_packable(term.name)
        return leaf

    async def _gradient(self, term: PreparedTerm, result: object, leaf: torch.Tensor) -> Evaluation:
        if leaf.numel() <= SMALL_LOGPROBS:
            return self._arithmetic(term, result, leaf)
        return await run_released(self.threads.backward, term.name, lambda: self._arithmetic(term, result, leaf))

    def _arithmetic(self, term: PreparedTerm, result: object, leaf: torch.Tensor) -> Evaluation:
        with autograd_on():
            evaluation = evaluate(
                result,
                leaf,
                name=term.name,
                needs_gradient=term.needs_gradient,
                needs_norm=self.track_grad_norms or term.max_grad_norm is not None,
            )
        self.logprobs.check_leaf(leaf)
        return evaluation


def _events(term: PreparedTerm) -> AbstractContextManager[dict[str, Any]]:
    if term.weight is None:
        return nullcontext({})
    metadata = {"regularizer_name": term.name, "weight": term.weight, "is_async": term.is_async is True}
    return telemetry.lifecycle("tinkex.regularizer.compute", metadata)


def _close_coroutine(returned: Evaluation | _Returned) -> None:
    if isinstance(returned, _Returned) and inspect.iscoroutine(returned.awaitable):
        returned.awaitable.close()


def _cancelled_from_outside(term: PreparedTerm, cause: asyncio.CancelledError | None = None) -> Outcome:
    error = RegularizerError(f"term {term.name!r} ended in a cancellation nobody asked for", name=term.name)
    error.__cause__ = cause
    return Outcome(term, error=error)
