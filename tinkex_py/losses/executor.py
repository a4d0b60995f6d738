"""Runs terms: one task each, under a limiter, with a timeout. Sync terms run in worker threads."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from tenacity import AsyncRetrying, RetryCallState, RetryError

from tinkex_py import telemetry
from tinkex_py.errors import InPlaceMutation, InvalidTermResult, RegularizerError, RegularizerTimeout
from tinkex_py.limits import RetryPolicy, time_limit, with_retries
from tinkex_py.losses.gradients import Evaluation, evaluate
from tinkex_py.losses.known_gradient import Scored, as_loss
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.options import DEFAULTS
from tinkex_py.losses.outcomes import Outcome, PreparedTerm, constraint_measurements, described, failed_with
from tinkex_py.losses.process_terms import StepFile, evaluated_in, ready_worker
from tinkex_py.losses.torch_modes import OwnModes, autograd_on, changed_since, defaults_before
from tinkex_py.losses.worker_pool import Limiter, Permit, WorkerPool
from tinkex_py.processes.pool import Worker
from tinkex_py.types import Datum
from tinkex_py.user_coroutines import UserCoroutine

Result = TypeVar("Result")

# Up to this size a backward pass is cheaper than a switch to a thread and back.
SMALL_LOGPROBS = 4096
# Seconds that a term without a timeout waits while abandoned terms hold every thread.
DEFAULT_PATIENCE = 60.0
# A retry would fail again, or run on modified logprobs.
_NEVER_REPEATED = (InPlaceMutation, InvalidTermResult)


@dataclass
class TermRun:
    """One run of several terms over the same logprobs.

    Attributes:
        timeout: seconds for a term without a timeout of its own; None means no limit.
        max_threads: maximum number of live term threads of the group; None leaves it to `workers`.
        group: runs of the same group share the limits on live term threads.
        cancel_grace: seconds for which a coroutine may go on after its cancellation.
        keep_gradients: whether the gradient of every term is part of the result.
    """

    data: Sequence[Datum]
    logprobs: Logprobs
    workers: WorkerPool
    max_concurrency: int
    track_grad_norms: bool
    timeout: float | None = None
    max_threads: int | None = None
    group: object = None
    cancel_grace: float = DEFAULTS["cancel_grace"]
    keep_gradients: bool = False
    _permits: Limiter = field(init=False)
    _tasks: list[asyncio.Task[Outcome]] = field(init=False, default_factory=list[asyncio.Task[Outcome]])
    _failures: list[Outcome] = field(init=False, default_factory=list[Outcome])
    _stopping: bool = field(init=False, default=False)
    _caller: "asyncio.Task[Any] | None" = field(init=False, default=None)
    _cancelled_before: int = field(init=False, default=0)
    _file: StepFile | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._permits = Limiter(self.max_concurrency)
        self._most_threads = min(self.max_concurrency, self.max_threads or self.max_concurrency)

    async def all(self, terms: Sequence[PreparedTerm], *, parallel: bool) -> list[Outcome]:
        """Runs the terms once and returns the outcomes in the order of `terms`.

        The first failure cancels the other terms and is raised, with further failures as notes. If the caller is
        cancelled, CancelledError is raised, with the failures as notes.

        Raises:
            RegularizerError: the first failure.
        """
        self._caller = asyncio.current_task()
        assert self._caller is not None, "a coroutine runs in a task"
        self._cancelled_before = self._caller.cancelling()
        try:
            if any(term.crossing is not None for term in terms):
                self._file = StepFile(self.data, self.logprobs, self.workers)
            async with asyncio.TaskGroup() as group:
                for term in terms:
                    task = group.create_task(self._run(term), name=f"tinkex.regularizer.{term.name}")
                    self._tasks.append(task)
                    if not parallel:
                        await asyncio.wait([task])
                        if self._failures:
                            break
            if not self._stopping:
                started = zip(terms, self._tasks, strict=True)
                self._failures += [_cancelled_from_outside(term) for term, task in started if task.cancelled()]
            if self._failures:
                raise self._first_failure()
            return [task.result() for task in self._tasks]
        except asyncio.CancelledError as cancelled:
            for failure in self._failures:
                cancelled.add_note(described(failure.exception))
            raise
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
            # An abandoned thread references this run. It must not keep the results of other terms alive.
            self._caller = None
            self._tasks.clear()
            self._failures.clear()

    def _must_stop(self) -> bool:
        """Whether a cancellation of a term comes from this run: another term failed, or the caller is cancelled."""
        return self._stopping or (self._caller is not None and self._caller.cancelling() > self._cancelled_before)

    async def _run(self, term: PreparedTerm) -> Outcome:
        try:
            return Outcome(term, evaluation=await self._admitted(term))
        except asyncio.CancelledError as error:
            if self._must_stop():
                raise
            outcome = _cancelled_from_outside(term, error)
        except RegularizerError as error:
            outcome = Outcome(term, error=error if error.name == term.name else failed_with(term, error))
        except Exception as error:  # noqa: BLE001  # a term may raise anything
            outcome = Outcome(term, error=failed_with(term, error))
        except BaseException as fatal:  # noqa: BLE001
            # KeyboardInterrupt or SystemExit raised in a task would stop the loop before the other terms end.
            outcome = Outcome(term, fatal=fatal)
        if outcome.fails_step:
            self._failures.append(outcome)
            self._stop_others()
        return outcome

    def _stop_others(self) -> None:
        if self._stopping:  # a second cancellation would interrupt clean-up code that runs after the first
            return
        self._stopping = True
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _first_failure(self) -> BaseException:
        """Returns KeyboardInterrupt or SystemExit, else a write into the shared logprobs, else the first error."""
        errors = [failure.exception for failure in self._failures if failure.fatal is not None]
        try:
            # A term may have failed because another one wrote into the shared logprobs.
            self.logprobs.check_unchanged()
        except InPlaceMutation as mutation:
            errors.append(mutation)
        errors += [failure.exception for failure in self._failures if failure.fatal is None]
        first, *others = errors
        for other in others:
            if described(other) != described(first):
                first.add_note(described(other))
        return first

    async def _admitted(self, term: PreparedTerm) -> Evaluation:
        """Runs a term once it has its permits: for a thread if it needs one, then for `max_concurrency`."""
        timeout = self.timeout if term.timeout is None else term.timeout
        thread: Permit | None = None
        permit: Permit | None = None
        left: list[str] = []
        try:
            if term.crossing is not None:
                thread = await self._permit(self.workers.process_limiter, term, self.max_concurrency, timeout)
            elif term.is_async is not True:
                thread = await self._permit(self.workers.limiter, term, self._most_threads, timeout)
            permit = await self._permit(self._permits, term, self.max_concurrency, timeout)
            with _events(term) as measurements:
                worker = None
                if self._file is not None and term.crossing is not None:
                    await self._file.written()
                    worker = await ready_worker(self.workers, term)
                async with time_limit(timeout, lambda: _timed_out(term, timeout, left)) as limit:
                    if worker is None:
                        evaluation = await self._evaluated(term, thread, permit, limit, left)
                    else:
                        evaluation = await self._evaluated_in(worker, term)
                    if limit.expired():  # the term suppressed the cancellation
                        raise TimeoutError
                if term.weight is not None:
                    measurements["value"] = evaluation.value
                    measurements["contribution"] = term.contribution(evaluation.value)
                    measurements["grad_norm"] = evaluation.grad_norm
                    if term.constraint is not None:
                        measurements.update(constraint_measurements(term, evaluation))
                return evaluation
        finally:
            if thread is not None and thread.abandoned:
                _emit_abandoned(term)
            else:
                for held in (permit, thread):
                    if held is not None:
                        held.release()

    async def _permit(self, limiter: Limiter, term: PreparedTerm, limit: int, timeout: float | None) -> Permit:
        patience = DEFAULT_PATIENCE if timeout is None else timeout
        try:
            return await limiter.acquire(term.name, group=self.group, group_limit=limit, patience=patience)
        except TimeoutError:
            with _events(term):  # the term did not start, but its failure is an event
                raise RegularizerTimeout(
                    f"term {term.name!r} did not start within {patience} s: every thread is held by a term that timed "
                    f"out but still runs ({', '.join(limiter.holders())}). Add a timeout inside these terms, or "
                    "increase max_threads",
                    name=term.name,
                    timeout=patience,
                ) from None

    async def _evaluated_in(self, worker: Worker, term: PreparedTerm) -> Evaluation:
        assert self._file is not None, "it is written before the terms run"
        try:
            track = self.track_grad_norms
            return await evaluated_in(worker, self.workers, term, self._file, track_grad_norms=track)
        finally:
            self.workers.processes.give_back(worker)

    async def _evaluated(
        self, term: PreparedTerm, thread: Permit | None, permit: Permit, limit: asyncio.Timeout, left: list[str]
    ) -> Evaluation:
        leaf = self.logprobs.leaf(term.name, packed=not term.per_datum)

        async def awaited(awaitable: Awaitable[Result]) -> Result:
            modes = OwnModes()
            code = UserCoroutine(self.cancel_grace, lambda: self._must_stop() or limit.expired(), modes)
            try:
                result = await code.run(awaitable)
                if modes.changed is not None:
                    raise _changed_defaults(term, modes.changed)
                return result
            except BaseException:
                left.append(code.what_is_left())
                if code.abandoned:
                    _emit_abandoned(term, code.tasks_left())
                raise

        if thread is None:
            result, attempts = await awaited(self._attempts(term, leaf))
        else:
            returned = await self.workers.call_term(term.name, lambda: self.evaluate_here(term, leaf), thread, permit)
            if isinstance(returned, Evaluation):
                return returned
            thread.release()
            result, attempts = await awaited(returned), 1
        if leaf.numel() <= SMALL_LOGPROBS:
            evaluation = self._arithmetic(term, result, leaf)
        else:
            evaluation = await self.workers.call_unbounded(term.name, lambda: self._arithmetic(term, result, leaf))
        return replace(evaluation, attempts=attempts)

    async def _attempts(self, term: PreparedTerm, leaf: torch.Tensor) -> tuple[object, int]:
        """Returns the result of an async term and the number of calls."""
        attempts = 0

        async def call() -> object:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                telemetry.emit("tinkex.regularizer.retry", {"attempt": attempts}, {"regularizer_name": term.name})
            try:
                return await self._called_on_the_loop(term, leaf)
            except Exception:
                self.logprobs.check_unchanged()  # no retry on modified logprobs
                raise

        if term.retry is None:
            return await call(), attempts
        try:
            return await _repeated(term.retry, call), attempts
        except Exception as error:  # noqa: BLE001  # raised again, RetryError as its cause
            last = error.last_attempt.exception() if isinstance(error, RetryError) else None
            failure = last or error
            failure.add_note(f"attempts: {attempts}")
            raise failure from None

    async def _called_on_the_loop(self, term: PreparedTerm, leaf: torch.Tensor) -> object:
        result = self._called(term, leaf)
        if not inspect.isawaitable(result):
            raise InvalidTermResult(
                f"term {term.name!r} has is_async=True but returned a {type(result).__name__}, not an awaitable: "
                "remove is_async, or make fn async",
                name=term.name,
            )
        return await result

    def evaluate_here(self, term: PreparedTerm, leaf: torch.Tensor) -> Evaluation | Awaitable[object]:
        """Calls the function of a sync term in this thread. Returns its evaluation, or an awaitable that it returned.

        Raises:
            InvalidTermResult: it returned something else, or changed torch's defaults.
        """
        with autograd_on():
            changed: str | None = None
            before = defaults_before()
            try:
                result = self._called(term, leaf)
            except StopIteration as error:  # it would end the coroutine that awaits this thread
                raise failed_with(term, error) from error
            finally:
                changed = changed_since(before)
            if changed is not None:
                _close(result)
                raise _changed_defaults(term, changed)
            if not inspect.isawaitable(result):
                return self._arithmetic(term, result, leaf)
            if term.is_async is None:
                return result
            _close(result)
            raise InvalidTermResult(
                f"term {term.name!r} has is_async=False but returned an awaitable: pass is_async=True", name=term.name
            )

    def _called(self, term: PreparedTerm, leaf: torch.Tensor) -> object:
        return term.function(self.data, self._given(term, leaf), **term.options)

    def _given(self, term: PreparedTerm, leaf: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        return self.logprobs.views(leaf, self.data) if term.per_datum else leaf

    def _arithmetic(self, term: PreparedTerm, result: object, leaf: torch.Tensor) -> Evaluation:
        with autograd_on():
            if isinstance(result, Scored):
                result = as_loss(result, self._given(term, leaf), term.name)
            return evaluate(
                result,
                leaf,
                name=term.name,
                needs_gradient=term.weight != 0,
                needs_norm=self.track_grad_norms or term.max_grad_norm is not None,
            )


def _events(term: PreparedTerm) -> AbstractContextManager[dict[str, Any]]:
    if term.weight is None:
        return nullcontext({})
    metadata = {"regularizer_name": term.name, "weight": term.weight, "is_async": term.is_async is True}
    return telemetry.lifecycle("tinkex.regularizer.compute", metadata)


def _close(result: object) -> None:
    if inspect.iscoroutine(result):
        result.close()


def _changed_defaults(term: PreparedTerm, change: str) -> InvalidTermResult:
    return InvalidTermResult(
        f"term {term.name!r} changed {change}, which are those of other code, too; they are restored, and nothing was "
        "sent. Pass dtype=... and device=... to the functions that create tensors",
        name=term.name,
    )


def _emit_abandoned(term: PreparedTerm, tasks: Sequence[str] = ()) -> None:
    metadata = {"regularizer_name": term.name, "task_names": ", ".join(tasks)}
    telemetry.emit("tinkex.regularizer.abandoned", {"tasks_left": len(tasks)}, metadata)


def _timed_out(term: PreparedTerm, timeout: float | None, left: Sequence[str]) -> RegularizerTimeout:
    assert timeout is not None, "a term without a limit does not time out"
    return RegularizerTimeout(
        f"term {term.name!r} did not finish within its timeout of {timeout} s: increase timeout or make it faster"
        + "".join(left),
        name=term.name,
        timeout=timeout,
    )


def _cancelled_from_outside(term: PreparedTerm, cause: asyncio.CancelledError | None = None) -> Outcome:
    error = RegularizerError(f"term {term.name!r} was cancelled from outside the pipeline", name=term.name)
    error.__cause__ = cause
    return Outcome(term, error=error)


async def _repeated(policy: RetryPolicy | AsyncRetrying, call: Callable[[], Awaitable[object]]) -> object:
    """Returns the result of the first call that the policy accepts.

    A policy object of the user is copied, because several terms may share it. No policy retries after a cancellation
    or KeyboardInterrupt.

    Raises:
        RetryError: the policy of the user gave up; it contains the last attempt.
    """
    if isinstance(policy, RetryPolicy):
        return await with_retries(policy, lambda _: call(), _may_be_repeated)
    should_retry = cast("Callable[[RetryCallState], bool | Awaitable[bool]]", policy.retry)

    async def again(state: RetryCallState) -> bool:
        failure = state.outcome.exception() if state.outcome is not None else None
        if failure is not None and not _may_be_repeated(failure):
            return False
        decision = should_retry(state)
        return await decision if inspect.isawaitable(decision) else decision

    return await policy.copy(retry=again)(call)


def _may_be_repeated(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, _NEVER_REPEATED)
