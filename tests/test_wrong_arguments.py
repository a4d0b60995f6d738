"""Every public callable refuses wrong arguments with an error of this package, or accepts them."""

import asyncio
import inspect
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import ContextDecorator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import pytest_asyncio
import torch

from tests.support.public_calls import PublicCall, public_calls
from tests.support.valid_arguments import Clients, ValidArguments
from tinkex_py import AsyncServiceClient, telemetry
from tinkex_py.errors import (
    ConfigError,
    InvalidBaseLoss,
    InvalidData,
    InvalidSpec,
    PipelineError,
    RegularizerError,
    TinkexError,
)

CALLS = {call.name: call for call in public_calls()}


class Wrong:
    """A class, which users pass instead of an object."""

    def __init__(self, *args: object, **options: object) -> None: ...


def function(*args: object, **options: object) -> None:
    """A function that fits no callback but breaks none."""
    LISTENING.set()


LISTENING = asyncio.Event()

WRONG: Mapping[str, Any] = {
    "None": None,
    "text": "x",
    "empty text": "",
    "two lines": "a\nb",
    "half a character": "\ud800",
    "bytes": b"x",
    "negative": -1,
    "zero": 0,
    "fraction": 1.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "bool": True,
    "large": 2**70,
    "too large to print": 10**5000,
    "numpy integer": np.int64(3),
    "numpy float": np.float32(1.5),
    "array": np.zeros((2, 3)),
    "tensor": torch.zeros(2, 3),
    "list": [],
    "list of None": [None],
    "dict": {},
    "dict of objects": {"x": object()},
    "dict of numbers": {1: 2},
    "object": object(),
    "function": function,
    "class": Wrong,
    "path": Path("x"),
}

# Refusals by this package: nothing was sent, and the message names the argument.
REFUSALS = (InvalidData, InvalidSpec, InvalidBaseLoss, ConfigError, PipelineError)

# Errors of Python that the API documents: handlers of events, and files that cannot be read or written.
DOCUMENTED: Mapping[str, tuple[type[Exception], ...]] = {
    "telemetry.handlers.attach": (TypeError, ValueError),
    "client.rest.AsyncRestClient.download_checkpoint": (OSError,),
}

# Words of messages, where these are not the name of the parameter.
ALIASES: Mapping[str, str] = {
    "client.service.AsyncServiceClient.get_tokenizer.name": "model",
    "local.service.LocalService.tokenizer_for.name": "model",
    "losses.logprobs.packed_field.name": "in loss_fn_inputs",
    "types.tensors.TensorData.data": "tensor",
    "types.tensors.TensorData.of.value": "tensor",
}

# Public classes whose constructor or method only this package calls.
NOT_CALLED_BY_USERS = (
    r"client\.(rest\.AsyncRestClient|sampling\.AsyncSamplingClient|training\.AsyncTrainingClient)$",  # made by a client
    r"\.(loss|loss_against|positions|selected|target_tensor|check_sampled|invalid|with_options|check_options)$",  # parts of `compute` of a term
    r"\.next_weights$",  # part of `update` of a controller
    r"\.Pipeline\.evaluate$",  # part of `compute` of a pipeline
    r"\.PackedTensor",  # decoded responses
)


class Sent:
    """Counts the requests of a client, without its heartbeats."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: telemetry.Event) -> None:
        self.count += "heartbeat" not in event.metadata["path"]


async def outcome_of(call: PublicCall, valid: ValidArguments, arguments: Mapping[str, Any]) -> Exception | None:
    """Makes a call to its end, and returns its error."""
    given = dict(arguments)
    parameters = [parameter for parameter in call.parameters if parameter.name in given]
    positional = [
        given.pop(parameter.name)
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL)
    ]
    owner = [] if call.owner is None else [valid.instance(call.owner)]
    LISTENING.clear()
    try:
        result = call.function(*owner, *positional, **given)
        async with asyncio.timeout(20):
            await _ended(result)
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001
        return error
    return None


async def _ended(result: Any) -> None:
    if inspect.isasyncgen(result):
        async for _ in result:
            break
        await result.aclose()
    elif inspect.iscoroutine(result):
        running = asyncio.ensure_future(result)
        listening = asyncio.ensure_future(LISTENING.wait())
        await asyncio.wait((running, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        running.cancel()
        await asyncio.wait((running,))
        if not running.cancelled():
            running.result()
    elif isinstance(result, ContextDecorator):
        with result:
            pass


@pytest_asyncio.fixture
async def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Clients]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    for tracker in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, tracker, MagicMock(__spec__=ModuleSpec(tracker, None)))
    async with AsyncServiceClient.local(model="tiny", device="cpu") as service:
        training = await service.create_lora_training_client("tiny", rank=1)
        saved = await training.save_state("one")
        sampling = await service.create_sampling_client(base_model="tiny")
        rest = service.create_rest_client()
        session = (await rest.sessions_page()).sessions[0]
        yield Clients(
            service, training, sampling, rest, service._embedded, session, saved.path, lambda _: LISTENING.set()
        )


def problem_of(call: PublicCall, parameter: str, error: Exception | None) -> str | None:
    if error is None:
        return None
    if not isinstance(error, TinkexError):
        return None if isinstance(error, DOCUMENTED.get(call.name, ())) else f"{type(error).__name__}: {error}"
    message = str(error)
    if "pydantic.dev" in message or "\n" in message:
        return f"the message has several lines or a link of pydantic: {message}"
    if isinstance(error, REFUSALS) and not isinstance(error, RegularizerError):
        words = ALIASES.get(f"{call.name}.{parameter}") or parameter.replace("_", "[ _-]")
        if not re.search(rf"\b{words}", message, re.IGNORECASE):
            return f"the message does not name it: {message}"
    return None


@pytest.mark.asyncio
async def test_wrong_arguments(clients: Clients, tmp_path: Path) -> None:
    import os
    import time

    only = os.environ.get("ONLY", "")
    valid = ValidArguments(clients, tmp_path)
    sent = Sent()
    telemetry.attach(sent, events="tinkex.http.request.start", handler_id="sent")
    problems = []
    spent = []
    for call in CALLS.values():
        if any(re.search(pattern, call.name) for pattern in NOT_CALLED_BY_USERS) or not re.search(only, call.name):
            continue
        t = time.perf_counter()
        try:
            required = valid.required(call)
            error = await outcome_of(call, valid, required)
        except LookupError as error:
            problems.append(str(error))
            continue
        if isinstance(error, REFUSALS) or (error is not None and not isinstance(error, TinkexError)):
            problems.append(f"{call.name}: the valid call fails: {type(error).__name__}: {error}")
            continue
        for parameter in call.parameters:
            for kind, value in WRONG.items():
                before = sent.count
                error = await outcome_of(call, valid, {**required, parameter.name: value})
                problem = problem_of(call, parameter.name, error)
                if isinstance(error, REFUSALS) and sent.count > before:
                    problem = f"{sent.count - before} requests were sent: {error}"
                if problem:
                    problems.append(f"{call.name}({parameter.name}=<{kind}>): {problem}"[:300])
        spent.append((time.perf_counter() - t, call.name))
    telemetry.detach("sent")
    for s in sorted(spent)[-15:]:
        print(s)
    Path("/tmp/grid/problems.txt").write_text("\n".join(problems))
    assert not problems, f"{len(problems)} problems"
