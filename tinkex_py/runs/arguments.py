"""Checks of the arguments of `train`, before anything is created or sent."""

import asyncio
import functools
import inspect
import json
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue

from tinkex_py.arguments import as_number, plain
from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import ConfigError, InvalidBaseLoss
from tinkex_py.runs.batches import checked_batch
from tinkex_py.runs.plan import Evaluation, Model, StepSettings
from tinkex_py.runs.settings import TrainSettings, optimizer_settings
from tinkex_py.threads import FileThread
from tinkex_py.types import AdamParams, OptimizerParams
from tinkex_py.user_coroutines import in_own_task

if TYPE_CHECKING:
    from tinkex_py.losses import Pipeline


def check_arguments(service: object, model: object, batches: object, stop: object) -> None:
    """Checks the arguments that are used as they are.

    Raises:
        ConfigError: naming the argument.
        InvalidData: a batch of a list is no sequence of datums.
    """
    if not isinstance(service, AsyncServiceClient):
        raise ConfigError(f"service must be an AsyncServiceClient, got {_kind(service)}")
    if not isinstance(model, AsyncTrainingClient):
        wanted = "model must be a training client or a function that creates one"
        _check_function(model, wanted, "model()")
    _check_batches(batches)
    if stop is not None and not isinstance(stop, asyncio.Event):
        raise ConfigError(f"stop must be an asyncio.Event, got {_kind(stop)}")


def checked_pipeline(given: object) -> "Pipeline":
    """Returns a pipeline; a term, or the name of one, becomes its base loss.

    Raises:
        ConfigError: it is none of these, or no base loss has this name.
    """
    from tinkex_py.losses import Pipeline
    from tinkex_py.losses.spec import Term, why_not_a_term

    if isinstance(given, Pipeline):
        return given
    if isinstance(given, str):
        try:
            return Pipeline(given)
        except InvalidBaseLoss as error:
            raise ConfigError(f"pipeline: {str(error).removeprefix('base_loss: ')}") from error
    problem = why_not_a_term(given, {})
    if problem is not None:
        raise ConfigError(f"pipeline must be a Pipeline or a base loss, got {_kind(given)}: {problem}")
    return Pipeline(cast("Term", given))


def checked_optimizer(given: object) -> AdamParams | OptimizerParams | Callable[[int], StepSettings]:
    """Returns the settings of the optimizer, or the function that returns them.

    Raises:
        ConfigError: it is neither.
        InvalidData: a learning rate is out of range.
    """
    if given is None:
        return AdamParams()
    if not callable(given):
        return optimizer_settings(given, "optimizer")
    _check_function(given, "optimizer must be a function of the number of steps made before", "optimizer(0)", 0)
    return cast("Callable[[int], StepSettings]", given)


def checked_settings(given: object) -> TrainSettings:
    """Returns the settings; a mapping becomes `TrainSettings`.

    Raises:
        ConfigError: naming the invalid setting.
    """
    if isinstance(given, TrainSettings):
        return given
    if given is None:
        return TrainSettings()
    if not isinstance(given, Mapping):
        raise ConfigError(f"settings must be TrainSettings or a dict of its settings, got {_kind(given)}")
    return TrainSettings(**{str(name): value for name, value in cast("Mapping[object, Any]", given).items()})


def checked_config(given: object) -> dict[str, JsonValue]:
    """Returns the plain values for `run.json`; numpy scalars become Python's.

    Raises:
        ConfigError: a value is not JSON.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config must be a mapping of names to plain values, got {_kind(given)}")
    try:
        return json.loads(json.dumps(dict(cast("Mapping[str, Any]", given)), default=_python_scalar))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"config must contain plain JSON values only, for run.json: {error}") from None


def checked_evaluate(
    given: object, *, grace: float
) -> Callable[[AsyncTrainingClient, int], Awaitable[Evaluation]] | None:
    """Returns the evaluation hook as a coroutine function whose result is checked.

    A function that is not async runs in a worker thread; if it returns an awaitable, that is awaited. Once it is
    cancelled, it is awaited for at most `grace` seconds.

    Raises:
        ConfigError: it cannot be called with two arguments.
    """
    if given is None:
        return None
    _check_function(given, "evaluate must be a function", "evaluate(training, step)", None, 0)
    hook = cast("Callable[[AsyncTrainingClient, int], object]", given)

    async def evaluate(training: AsyncTrainingClient, step: int) -> Evaluation:
        if is_async(hook):
            result = hook(training, step)
        else:
            async with FileThread("tinkex-evaluate") as thread:
                result = await thread.run(lambda: hook(training, step))
        return evaluation_of(await _awaited(result, grace, "evaluate"))

    return evaluate


def evaluation_of(result: object) -> Evaluation:
    """Returns the result of an evaluation hook, with its numbers as floats.

    Raises:
        ConfigError: it is no mapping of names to numbers or texts, or contains texts, but no number.
    """
    wanted = "evaluate must return a mapping of names to numbers"
    if not isinstance(result, Mapping):
        raise ConfigError(f"{wanted}, got {_kind(result)}")
    checked: dict[str, float | str] = {}
    for name, value in cast("Mapping[object, object]", result).items():
        given = float(bool(value)) if isinstance(plain(value), bool) else as_number(value)
        if isinstance(value, str):
            checked[str(name)] = value
        elif not isinstance(name, str) or given is None:
            raise ConfigError(f"{wanted} or texts, got {name!r} with {_kind(value)}: return a float, or leave it out")
        else:
            checked[name] = given
    if checked and all(isinstance(value, str) for value in checked.values()):
        raise ConfigError(f"{wanted}, beside which it may return texts, but {next(iter(checked))!r} is a text")
    return checked


async def created_model(model: Model, *, grace: float) -> AsyncTrainingClient:
    """Returns the training client of a new run. Once it is cancelled, `model` is awaited for at most `grace` seconds.

    Raises:
        ConfigError: the function returned something else.
    """
    made = model if isinstance(model, AsyncTrainingClient) else model()
    training = await _awaited(made, grace, "model")
    if not isinstance(training, AsyncTrainingClient):
        raise ConfigError(f"model() must return a training client, got {_kind(training)}")
    return training


async def _awaited(result: object, grace: float, name: str) -> object:
    if not inspect.isawaitable(result):
        return result
    return await in_own_task(cast("Awaitable[object]", result), grace=grace, name=name)


def _check_function(given: object, wanted: str, call: str, *arguments: object) -> None:
    if not callable(given):
        raise ConfigError(f"{wanted}, got {_kind(given)}")
    try:
        inspect.signature(given).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{wanted}, called as {call}: {error}") from None
    except ValueError:  # a builtin without a signature; a wrong one fails when it is called
        return


def check_lag(lag: int, batches: object) -> None:
    """Raises ConfigError if batches that the model does not sample shall be sampled ahead."""
    if lag and not is_async(batches):
        raise ConfigError(f"settings.lag={lag} needs an async function batches, which samples with the model")


def _check_batches(batches: object) -> None:
    if isinstance(batches, str | bytes | Mapping):
        raise ConfigError(f"batches must be lists of datums, got {_kind(cast('object', batches))}")
    if isinstance(batches, list | tuple):
        for number, batch in enumerate(cast("Sequence[object]", batches)):
            checked_batch(batch, number)
    elif is_async(batches):
        _check_function(batches, "batches must be an async function of a Rollout", "batches(run)", None)
    elif callable(batches) and not isinstance(batches, Iterable | AsyncIterable):
        _check_function(batches, "batches must be a function of the number of batches to skip", "batches(0)", 0)


def is_async(hook: object) -> bool:
    """Returns whether calling it gives a coroutine."""
    while isinstance(hook, functools.partial):
        hook = cast("object", hook.func)
    return inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(getattr(hook, "__call__", None))  # noqa: B004


def _python_scalar(value: object) -> object:
    scalar = plain(value)
    if scalar is value:
        raise TypeError(f"{_kind(value)} is not JSON")
    return scalar


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
