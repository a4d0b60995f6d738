"""Terms on a Ray cluster: as tasks, or on a pool of actors that load a model once."""

import asyncio
import copy
import inspect
import itertools
import math
import operator
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch

from tinkex_py.arguments import as_number, check_choice, check_count, check_options, shown
from tinkex_py.errors import ConfigError, InvalidData, InvalidSpec, PipelineError, RegularizerError
from tinkex_py.integrations import imported
from tinkex_py.losses.datum_sums import metric_over_datums
from tinkex_py.losses.gradients import Evaluation
from tinkex_py.losses.in_worker import evaluated_alone
from tinkex_py.losses.known_gradient import Scored
from tinkex_py.losses.logprobs import Logprobs, bits_of, checked_data, split
from tinkex_py.losses.outcomes import PreparedTerm
from tinkex_py.losses.process_terms import CrossedTensor
from tinkex_py.losses.spec import PerDatum, is_async_term, term_function, term_name
from tinkex_py.losses.worker_pool import Limiter
from tinkex_py.types import Datum

__all__ = ["RayTerm"]

_TASK = "tinkex.regularizer."


@dataclass(frozen=True)
class _StoredStep:
    """What the terms of a step receive, in the object store: the datums, and the logprobs as one row."""

    data: list[Datum]
    row: CrossedTensor


@dataclass(frozen=True)
class _Share:
    """What one call evaluates.

    Attributes:
        datums: first and last datum.
        positions: first and last element of the row.
        shape: of the packed logprobs; a list with the shape of each datum under `per_datum`.
    """

    datums: tuple[int, int]
    positions: tuple[int, int]
    shape: tuple[int, ...] | list[tuple[int, ...]]

    def shaped(self, row: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Returns the elements of the share as a term receives them."""
        if isinstance(self.shape, tuple):
            return row.reshape(self.shape)
        pieces = torch.split(row, [math.prod(shape) for shape in self.shape])
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.shape, strict=True)]


@dataclass(frozen=True)
class _Work:
    """How a Ray worker evaluates a share."""

    name: str
    options: Mapping[str, Any]
    share: _Share
    torch_threads: int
    default_dtype: torch.dtype


def _evaluated(fn: Any, step: _StoredStep, work: _Work) -> tuple[Evaluation, CrossedTensor | None]:
    """Evaluates a share of a step in a Ray worker."""
    if torch.get_num_threads() != work.torch_threads:
        torch.set_num_threads(work.torch_threads)
    torch.set_default_dtype(work.default_dtype)
    bits = step.row.bits[slice(*work.share.positions)].copy()  # what the object store returns cannot be written
    row = CrossedTensor(bits, step.row.dtype, bits.shape).tensor()
    data = step.data[slice(*work.share.datums)]
    logprobs = Logprobs.from_tensors(work.share.shaped(row), data)
    per_datum = isinstance(fn, PerDatum) or isinstance(work.share.shape, list)
    term = PreparedTerm(work.name, term_function(fn), work.options, False, per_datum, weight=1.0)
    return evaluated_alone(term, data, logprobs)


class _Replica:
    """A Ray actor: an object of the class of a term."""

    def __init__(self, make: Callable[..., Any], init: Mapping[str, Any], name: str) -> None:
        self._name = name  # Ray also shows an actor whose object cannot be made
        self._term = make(**init)

    def __repr__(self) -> str:
        return self._name

    def ready(self) -> None:
        """Returns when the object is made."""

    def evaluated(self, step: _StoredStep, work: _Work) -> tuple[Evaluation, CrossedTensor | None]:
        """Evaluates a share of a step."""
        return _evaluated(self._term, step, work)


@dataclass(frozen=True)
class _Stored:
    """A step in the object store of a connection, and what it was made of."""

    connection: str
    data: list[Datum]
    row: np.ndarray[Any, Any]
    reference: Any

    def is_of(self, connection: str, data: Sequence[Datum], row: np.ndarray[Any, Any]) -> bool:
        """Whether it was made of these."""
        is_same = connection == self.connection and len(data) == len(self.data)
        return is_same and all(map(operator.is_, data, self.data)) and np.array_equal(row, self.row)


class _StepStore:
    """Puts what terms receive into the object store of Ray, once for all terms of a step.

    All terms of a step get views of the same memory. The object lives as long as this memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stored: weakref.WeakKeyDictionary[torch.UntypedStorage, _Stored] = weakref.WeakKeyDictionary()

    def put(self, ray: Any, data: Sequence[Datum], parts: Sequence[torch.Tensor]) -> Any:
        """Returns the reference of a `_StoredStep`."""
        storage, connection = parts[0].untyped_storage(), _connection(ray)
        row = np.concatenate([bits_of(part.cpu()).numpy() for part in parts])
        with self._lock:
            stored = self._stored.get(storage)
            if stored is None or not stored.is_of(connection, data, row):
                step = _StoredStep(list(data), CrossedTensor(row, parts[0].dtype, row.shape))
                stored = self._stored[storage] = _Stored(connection, step.data, row, ray.put(step))
            return stored.reference


_STEPS = _StepStore()


class RayTerm:
    """A term that a Ray cluster evaluates: value, metrics and gradient come back.

    The program connects with `ray.init(...)`; this class starts no cluster. The workers need this package and what the
    function imports. Calls have the name of the term in Ray's dashboard. A timeout or cancellation of the term cancels
    its task, or kills its actor, which the next call replaces.

    Args:
        fn: a sync term, for a task per call; functions of `__main__` and closures cross by value. Or a class, whose
            objects are terms with `compute` or `__call__`, for a pool of actors that each make one object.
        init: keyword arguments of the class.
        num_cpus: CPUs of a task or actor, and torch threads if it is above 1; None is Ray's default.
        num_gpus: GPUs of a task or actor; None is Ray's default. The gradient returns to the device of the logprobs.
        replicas: number of actors, or of shards of a function.
        max_retries: how often a call is repeated whose node, worker or actor was lost. An exception of the term is
            never repeated; see `RegularizerSpec.retry`.
        shard: "datums" splits each step into as many shards as there are replicas, and adds values, metrics and
            gradients. Metrics whose name ends with ":mean" are averaged over the datums. Only for sums over datums.

    Raises:
        InvalidSpec: an argument is invalid, or `fn` or `init` cannot cross to another process.
        MissingExtra: Ray is not installed.
    """

    def __init__(
        self,
        fn: Any,
        *,
        init: Mapping[str, Any] | None = None,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        replicas: int = 1,
        max_retries: int = 3,
        shard: Literal["datums"] | None = None,
    ) -> None:
        self.fn = fn
        self.init = {} if init is None else check_options("init", init, error=InvalidSpec)
        self.replicas = check_count("replicas", replicas, least=1, error=InvalidSpec)
        self.max_retries = check_count("max_retries", max_retries, least=0, error=InvalidSpec)
        self.resources = {
            name: _amount(name, value)
            for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus))
            if value is not None
        }
        if shard is not None:
            check_choice("shard", shard, ("datums",), error=InvalidSpec)
        self.shard = shard
        self._check()
        ray = imported("ray", "ray")
        try:
            ray.cloudpickle.dumps((fn, self.init))
        except Exception as error:  # objects of the user
            raise InvalidSpec(
                f"RayTerm: fn or init cannot cross to another process ({type(error).__name__}: {error}): open files, "
                "locks and connections inside of fn"
            ) from error
        self._remote = ray.remote(_Replica if isinstance(fn, type) else _evaluated)
        self._limiter = Limiter(self.replicas)
        self._idle: list[tuple[str, Any]] = []

    def _check(self) -> None:
        if isinstance(self.fn, type):
            made: Any = self.fn
            function = _function_of(self.fn)
            if not callable(function) or inspect.iscoroutinefunction(function):
                raise InvalidSpec(f"RayTerm: fn is the class {made.__name__}, which needs a sync compute or __call__")
            try:
                inspect.signature(made).bind(**self.init)
            except (TypeError, ValueError) as error:
                raise InvalidSpec(f"RayTerm: init does not fit the class {made.__name__}: {error}") from None
            return
        if not callable(term_function(self.fn)) or is_async_term(self.fn):
            raise InvalidSpec(
                f"RayTerm: fn must be a sync function, an object with a sync compute, or a class, got {shown(self.fn)}"
            )
        if self.init:
            raise InvalidSpec(f"RayTerm: init={shown(self.init)} is for a class, and fn is none: use options=...")
        if self.replicas > 1 and self.shard is None:
            raise InvalidSpec(f"RayTerm: replicas={self.replicas} of a function need shard='datums', or pass a class")

    @property
    def name(self) -> str | None:
        """Name of the function or class."""
        return self.fn.__name__ if isinstance(self.fn, type) else term_name(self.fn)

    @property
    def shards(self) -> int:
        """Number of shards of a step."""
        return 1 if self.shard is None else self.replicas

    @property
    def unsharded(self) -> "RayTerm":
        """The same term on the same actors, without shards."""
        whole = copy.copy(self)
        whole.shard = None
        return whole

    async def ready(self) -> None:
        """Waits until every actor has made its object, so that this time is no part of the first step.

        Raises:
            ConfigError: the program is not connected with Ray.
            RegularizerError: an object could not be made.
        """
        ray = _connected()
        if isinstance(self.fn, type):
            await _together([self._on_actor(ray, self._task_name(), "ready") for _ in range(self.replicas)])

    async def compute(self, data: Sequence[Datum], logprobs: Any, **options: Any) -> Scored:
        """Evaluates the term; see `RegularizerSpec.fn`.

        Raises:
            ConfigError: the program is not connected with Ray.
            InvalidData: the datums cannot be sharded.
            RegularizerError: the work was lost in Ray, and so were its retries.
        """
        ray = _connected()
        data = checked_data(data)
        if not isinstance(logprobs, torch.Tensor | Sequence):
            raise PipelineError(f"logprobs must be a tensor or a list of tensors, got a {type(logprobs).__name__}")
        if not data and self.shards > 1:
            raise InvalidData("RayTerm: shard='datums' needs datums, but data is empty: pass the datums of the step")
        is_packed = isinstance(logprobs, torch.Tensor)
        if not is_packed and not logprobs:
            raise InvalidData("RayTerm: there are no logprobs, because data is empty: pass the datums of the step")
        parts = [logprobs] if is_packed else list(cast("Sequence[torch.Tensor]", logprobs))
        count = sum(part.numel() for part in parts)
        shape = tuple(logprobs.shape) if is_packed else [tuple(part.shape) for part in parts]
        whole = _Share((0, len(data)), (0, count), shape)
        shares = (
            [whole] if self.shards == 1 else _cut(whole, self.shards, split(data, logprobs) if is_packed else parts)
        )
        step = await asyncio.to_thread(_STEPS.put, ray, data, parts)
        name, dtype = self._task_name(), torch.get_default_dtype()
        threads = max(1, int(self.resources.get("num_cpus", 1)))
        works = [_Work(name.removeprefix(_TASK), options, share, threads, dtype) for share in shares]
        results = await _together([self._evaluated(ray, name, step, work) for work in works])
        return _composed(shares, results, whole)

    def _task_name(self) -> str:
        """Returns the name of the task of the pipeline, else one like it."""
        task = asyncio.current_task()
        name = "" if task is None else task.get_name()
        return name if name.startswith(_TASK) else f"{_TASK}{self.name or 'term'}"

    async def _evaluated(self, ray: Any, name: str, step: Any, work: _Work) -> tuple[Evaluation, CrossedTensor | None]:
        if isinstance(self.fn, type):
            return await self._on_actor(ray, name, "evaluated", step, work)
        task = self._remote.options(name=name, max_retries=self.max_retries, **self.resources)
        reference = task.remote(self.fn, step, work)
        try:
            return await _answer(ray, reference)
        except (asyncio.CancelledError, GeneratorExit):
            ray.cancel(reference, force=True)
            raise
        except ray.exceptions.RayError as error:
            raise _lost(name, error, self.max_retries) from error

    async def _on_actor(self, ray: Any, name: str, method: str, *arguments: Any) -> Any:
        for attempt in range(self.max_retries + 1):
            permit = await self._limiter.acquire(name)
            try:
                return await self._on_one_actor(ray, name, method, *arguments)
            except ray.exceptions.RayError as error:
                if attempt == self.max_retries or getattr(error, "actor_init_failed", False):
                    raise _lost(name, error, attempt) from error
            finally:
                permit.release()
        raise AssertionError("the last attempt returns or raises")

    async def _on_one_actor(self, ray: Any, name: str, method: str, *arguments: Any) -> Any:
        actor = self._idle_actor(ray) or self._remote.options(**self.resources).remote(
            self.fn, self.init, name.removeprefix(_TASK)
        )
        is_usable = True
        try:
            return await _answer(ray, getattr(actor, method).options(name=name).remote(*arguments))
        except (asyncio.CancelledError, GeneratorExit, ray.exceptions.RayError):
            is_usable = False
            ray.kill(actor)
            raise
        finally:
            if is_usable:
                self._idle.append((_connection(ray), actor))

    def _idle_actor(self, ray: Any) -> Any:
        """Returns an actor of this connection, or None; those of earlier ones are gone."""
        while self._idle:
            connection, actor = self._idle.pop()
            if connection == _connection(ray):
                return actor
        return None


def _function_of(cls: type) -> object:
    """Returns `compute` or `__call__` of a class; `getattr` would find the one that makes its objects."""
    own: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        own.update(vars(base))
    return own.get("compute", own.get("__call__"))


def _amount(name: str, value: object) -> float:
    number = as_number(value)
    if number is None or not 0 <= number < math.inf:
        raise InvalidSpec(f"RayTerm: {name} must be a number >= 0, got {shown(value)}")
    if name == "num_gpus" and number > 1 and not number.is_integer():
        raise InvalidSpec(f"RayTerm: num_gpus must be at most 1 or a whole number, got {shown(value)}")
    return number


def _connected() -> Any:
    ray = imported("ray", "ray")
    if not ray.is_initialized():
        raise ConfigError("RayTerm: this program is not connected with Ray: call ray.init(...) before the first step")
    return ray


def _connection(ray: Any) -> str:
    """Returns what differs between the connections of a program, one after another."""
    return ray.get_runtime_context().get_worker_id()


async def _answer(ray: Any, reference: Any) -> Any:
    """Waits for the result of a call. An exception of the code in the worker is raised as it was there."""
    try:
        return await reference
    except ray.exceptions.RayTaskError as error:
        failure = error
    cause: BaseException = failure.cause
    cause.add_note(f"In the Ray worker:\n{failure}")
    raise cause


def _lost(name: str, error: Exception, retries: int) -> RegularizerError:
    term = name.removeprefix(_TASK)
    lines = str(error).strip().splitlines() or [""]
    if getattr(error, "actor_init_failed", False):
        return RegularizerError(f"term {term!r}: its Ray actor could not make the object: {lines[-1]}", name=term)
    return RegularizerError(
        f"term {term!r} was lost in Ray after {retries} of its retries ({type(error).__name__}: {lines[0]}): look for "
        "lost nodes and memory limits, or increase max_retries",
        name=term,
    )


async def _together(calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Returns the results of all calls. The first failure cancels the others."""
    if len(calls) == 1:
        return [await calls[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _cut(whole: _Share, shards: int, parts: Sequence[torch.Tensor]) -> list[_Share]:
    """Cuts a step between datums, into shares with about the same number of positions."""
    shapes = [tuple(part.shape) for part in parts]
    ends = list(itertools.accumulate((math.prod(shape) for shape in shapes), initial=0))
    wanted = [ends[-1] * shard / shards for shard in range(1, shards)]
    cuts = [0, *(int(np.argmin(np.abs(np.array(ends) - target))) for target in wanted), len(shapes)]
    shares: list[_Share] = []
    for first, last in itertools.pairwise(cuts):
        own = shapes[first:last]
        if own:
            packed = (sum(shape[0] for shape in own), *own[0][1:]) if isinstance(whole.shape, tuple) else own
            shares.append(_Share((first, last), (ends[first], ends[last]), packed))
    return shares


def _composed(
    shares: Sequence[_Share], results: Sequence[tuple[Evaluation, CrossedTensor | None]], shape: _Share
) -> Scored:
    """Returns the sum of the shares, with the gradient in the shape of the whole."""
    values = [evaluation.value for evaluation, _ in results]
    metrics: dict[str, Any] = dict(results[0][0].metrics)
    if len(results) > 1:
        counts = [last - first for first, last in (share.datums for share in shares)]
        for name in metrics:
            each = [
                evaluation.metrics.get(name, 0.0) * (count if name.endswith(":mean") else 1)
                for (evaluation, _), count in zip(results, counts, strict=True)
            ]
            metrics[name] = metric_over_datums(name, sum(each), sum(counts))
    gradient = None
    if any(crossed is not None for _, crossed in results):
        rows = [_row(share, crossed) for share, (_, crossed) in zip(shares, results, strict=True)]
        gradient = shape.shaped(torch.cat(rows))
    return Scored(sum(values[1:], values[0]), gradient, metrics)


def _row(share: _Share, crossed: CrossedTensor | None) -> torch.Tensor:
    first, last = share.positions
    if crossed is None:
        return torch.zeros(last - first)
    bits = crossed.bits.copy()  # what the object store returns cannot be written
    return CrossedTensor(bits, crossed.dtype, bits.shape).tensor()
