"""Runs terms: one task each, under a semaphore, with a timeout; sync ones in worker threads. No gradients here."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from tinkex_py import telemetry
from tinkex_py.errors import InPlaceMutation, InvalidTermResult, RegularizerError, RegularizerTimeout
from tinkex_py.losses.grad_mode import with_own_grad_mode
from tinkex_py.losses.gradients import Evaluation, evaluate
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.spec import (
    BASE_LOSS_NAME,
    OnError,
    PerDatum,
    RegularizerSpec,
    Term,
    is_async_term,
    term_function,
)
from tinkex_py.losses.threads import Slot, Slots, SlotsAbandoned, TermThreads, run_released
from tinkex_py.types import Datum

# Below this a backward pass is cheaper than the way to a thread and back.
SMALL_LOGPROBS = 4096
# How long a term without a timeout waits when abandoned terms hold every thread, in seconds.
DEFAULT_PATIENCE = 60.0


@dataclass(frozen=True)
class PreparedTerm:
    """A term, ready to run.

    Attributes:
        name: in errors, events and task names.
        function: what is called, as `function(data, logprobs, **options)`.
        options: its keyword arguments.
        is_async: True: called on the loop; False: called in a thread, must not return an awaitable; None: called
            in a thread, an awaitable it returns is awaited on the loop.
        per_datum: wants a list with one tensor per datum.
        timeout: seconds, None for no limit.
        weight: None for the base loss, which has none and emits no events of its own.
        on_error: whether a failure fails the step.
        needs_gradient: whether its gradient enters the total.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    is_async: bool | None
    per_datum: bool
    timeout: float | None
    weight: float | None = None
    on_error: OnError = "raise"
    needs_gradient: bool = True


def prepare_base_loss(base_loss: Term, timeout: float | None) -> PreparedTerm:
    """The base loss as a term."""
    return PreparedTerm(
        name=BASE_LOSS_NAME,
        function=term_function(base_loss),
        options={},
        is_async=True if is_async_term(base_loss) else None,
        per_datum=isinstance(base_loss, PerDatum),
        timeout=_limit(timeout),
    )


def prepare_regularizer(spec: RegularizerSpec, timeout: float | None) -> PreparedTerm:
    """A regularizer as a term; the spec's own timeout wins over `timeout`."""
    detected = True if is_async_term(spec.fn) else None
    return PreparedTerm(
        name=spec.name,
        function=term_function(spec.fn),
        options=spec.options,
        is_async=detected if spec.is_async is None else spec.is_async,
        per_datum=isinstance(spec.fn, PerDatum),
        timeout=_limit(timeout if spec.timeout is None else spec.timeout),
        weight=spec.weight,
        on_error=spec.on_error,
        needs_gradient=spec.weight > 0,
    )


def _limit(timeout: float | None) -> float | None:
    return None if timeout is None or math.isinf(timeout) else timeout


@dataclass(frozen=True)
class Outcome:
    """How a term ended: with an evaluation, or with an error."""

    term: PreparedTerm
    evaluation: Evaluation | None = None
    error: RegularizerError | None = None
    fatal: BaseException | None = None  # KeyboardInterrupt, SystemExit and the like: raised unchanged

    @property
    def fails_step(self) -> bool:
        """Whether the step cannot go on. A change of the shared logprobs can never be skipped."""
        if self.error is None:
            return self.fatal is not None
        return self.term.on_error == "raise" or isinstance(self.error, InPlaceMutation)


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
        max_threads: most live term threads as far as this run is concerned; None leaves it to `threads`.
    """

    data: Sequence[Datum]
    logprobs: Logprobs
    threads: TermThreads
    max_concurrency: int
    track_grad_norms: bool
    max_threads: int | None = None
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
                self._stopping = True
                for task in tasks:
                    if task is not asyncio.current_task():
                        task.cancel()
            return outcome

        try:
            async with asyncio.TaskGroup() as group:
                for term in terms:
                    task = group.create_task(run(term), name=f"tinkex.regularizer.{term.name}")
                    tasks.append(task)
                    if not parallel:
                        await self._wait([task])
                        if failures:
                            break
                if tasks:
                    await self._wait(tasks)
        except asyncio.CancelledError as cancelled:
            for failure in failures:
                cancelled.add_note(f"{type(failure.error or failure.fatal).__name__}: {failure.error or failure.fatal}")
            raise
        if failures:
            raise self._first_of(failures)
        return [task.result() for task in tasks]

    async def _wait(self, tasks: Sequence[asyncio.Task[Outcome]]) -> None:
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            self._stopping = True
            raise

    def _first_of(self, failures: Sequence[Outcome]) -> BaseException:
        errors = [failure.error or failure.fatal for failure in failures]
        try:
            # A term that failed may be the victim of another one that wrote into the shared logprobs.
            self.logprobs.check_unchanged()
        except InPlaceMutation as mutation:
            errors.insert(0, mutation)
        first, *others = [error for error in errors if error is not None]
        for other in others:
            if type(other) is not type(first) or str(other) != str(first):
                first.add_note(f"{type(other).__name__}: {other}")
        return first

    async def _outcome(self, term: PreparedTerm) -> Outcome:
        try:
            return Outcome(term, evaluation=await self._one(term))
        except asyncio.CancelledError as error:
            if self._stopping:
                raise
            wrapped = RegularizerError(f"term {term.name!r} ended in a cancellation nobody asked for", name=term.name)
            return Outcome(term, error=_caused_by(wrapped, error))
        except RegularizerError as error:
            if error.name == term.name:
                return Outcome(term, error=error)
            return Outcome(term, error=_wrapped(error, term))
        except Exception as error:  # noqa: BLE001  # a term may raise anything; it is reported under the term's name
            return Outcome(term, error=_wrapped(error, term))
        except BaseException as fatal:  # noqa: BLE001
            # Raised inside a task, KeyboardInterrupt and its like would stop the loop before the siblings.
            return Outcome(term, fatal=fatal)

    async def _one(self, term: PreparedTerm) -> Evaluation:
        slot: Slot | None = None
        permit: Slot | None = None
        try:
            if term.is_async is not True:
                slot = await self._turn(self.threads.terms.slots, term, limit=self._thread_limit)
            permit = await self._turn(self._permits, term)
            with _events(term) as measurements:
                evaluation = await self._within_timeout(term, slot, permit)
                if term.weight is not None:
                    measurements["value"] = evaluation.value
                    measurements["contribution"] = term.weight * evaluation.value
                    measurements["grad_norm"] = evaluation.grad_norm
                return evaluation
        finally:
            if slot is not None and slot.abandoned:
                if permit is not None:
                    self._permits.abandon(permit)
            else:
                for held in (permit, slot):
                    if held is not None:
                        held.release()

    async def _turn(self, slots: Slots, term: PreparedTerm, *, limit: int | None = None) -> Slot:
        patience = DEFAULT_PATIENCE if term.timeout is None else term.timeout
        try:
            return await slots.acquire(term.name, limit=limit, patience=patience)
        except SlotsAbandoned as error:
            raise RegularizerTimeout(
                f"term {term.name!r} did not get to run within {patience} s: every place is held by abandoned terms "
                f"({', '.join(error.holders)}), which cannot be stopped. Give them a way to end, or raise max_threads",
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
        if slot is not None and slot.abandoned:
            telemetry.emit("tinkex.regularizer.abandoned", {}, {"regularizer_name": term.name})
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
            result = await with_own_grad_mode(self._awaitable(term, leaf))
            return await self._gradient(term, result, leaf)

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

    async def _awaitable(self, term: PreparedTerm, leaf: torch.Tensor) -> object:
        result = self._call(term, leaf)
        if not inspect.isawaitable(result):
            raise InvalidTermResult(
                f"term {term.name!r} has is_async=True but returned a {type(result).__name__}, not an awaitable",
                name=term.name,
            )
        return await result

    def _in_thread(self, term: PreparedTerm, leaf: torch.Tensor) -> Evaluation | _Returned:
        with torch.inference_mode(False), torch.enable_grad():
            try:
                result = self._call(term, leaf)
            except StopIteration as error:  # it would end the coroutine that waits for this thread
                raise _wrapped(error, term) from error
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
        with torch.inference_mode(False), torch.enable_grad():
            evaluation = evaluate(
                result,
                leaf,
                name=term.name,
                needs_gradient=term.needs_gradient,
                needs_norm=self.track_grad_norms,
            )
        self.logprobs.check_leaf(leaf)
        return evaluation


@contextmanager
def _events(term: PreparedTerm) -> Generator[dict[str, Any]]:
    if term.weight is None:
        yield {}
        return
    metadata = {"regularizer_name": term.name, "weight": term.weight, "is_async": term.is_async is True}
    with telemetry.lifecycle("tinkex.regularizer.compute", metadata) as measurements:
        yield measurements


def _close_coroutine(returned: Evaluation | _Returned) -> None:
    if isinstance(returned, _Returned) and inspect.iscoroutine(returned.awaitable):
        returned.awaitable.close()


def _wrapped(error: Exception, term: PreparedTerm) -> RegularizerError:
    wrapped = RegularizerError(f"term {term.name!r} failed with {type(error).__name__}: {error}", name=term.name)
    return _caused_by(wrapped, error)


def _caused_by(error: RegularizerError, cause: BaseException) -> RegularizerError:
    error.__cause__ = cause
    return error
