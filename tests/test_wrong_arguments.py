"""Every public callable either accepts an argument or refuses it with an error of this package.

The callables are found, not listed. Each of their parameters gets every value of a grid of wrong ones, while the other
arguments are valid. A new parameter without a default needs an example in `tests/support/valid_arguments.py`.
"""

import asyncio
import inspect
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import ContextDecorator, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import pytest_asyncio
import torch

from tests.support.public_calls import PublicCall, public_calls
from tests.support.valid_arguments import Clients, ValidArguments, prepared
from tinkex_py import AsyncServiceClient, telemetry
from tinkex_py.arguments import shown
from tinkex_py.errors import (
    ConfigError,
    InvalidBaseLoss,
    InvalidData,
    InvalidSpec,
    PipelineError,
    RegularizerError,
    TinkexError,
)
from tinkex_py.runs import MetricSink

LISTENING = asyncio.Event()


class Wrong:
    """A class, which users pass instead of an object."""

    def __init__(self, *_args: object, **_options: object) -> None:
        LISTENING.set()


def function(*_args: object, **_options: object) -> None:
    """A function that returns nothing useful."""
    LISTENING.set()


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
    "whole float": 3.0,
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

# Raised before anything is sent; the message names the argument.
REFUSALS = (InvalidData, InvalidSpec, InvalidBaseLoss, ConfigError, PipelineError)

# Errors of Python that the API documents: for handlers of events, and for files.
DOCUMENTED: Mapping[str, tuple[type[Exception], ...]] = {
    "telemetry.handlers.attach": (TypeError,),
    "client.rest.AsyncRestClient.download_checkpoint": (OSError,),
}

# Words of messages that do not contain the name of the parameter.
ALIASES: Mapping[str, str] = {
    "client.training.AsyncTrainingClient.weight_space_diagnosis.pipeline": "base_loss",
    "client.service.AsyncServiceClient.get_tokenizer.name": "name|model",
    "local.service.LocalService.tokenizer_for.name": "name|model",
    "data.datums.chat_datum.messages": "message|conversation",
    "data.datums.preference_datums.prompt": "prompt|conversation|message",
    "data.datums.text_datum.text": "text|nothing to learn",
    "runs.report.write_report.folders": "folder",
    "runs.folder.RunFolder.keep_steps.last": "last|does not contain the steps",
    "runs.folder.read_run.folder": "folder|run.json",
    "runs.folder.read_steps.folder": "folder|run.json",
    "data.chat.ChatRenderer.prompt.messages": "message|conversation",
    "data.chat.ChatRenderer.render.messages": "message|conversation",
    "losses.logprobs.packed_field.name": "name|in loss_fn_inputs",
    "runs.loop.train.batches": "batch",
    "runs.loop.train.optimizer": "optimizer|learning_rate",
    "runs.loop.train.settings": "setting",
    "types.tensors.TensorData.data": "tensor",
    "types.tensors.TensorData.of.value": "tensor",
}

# Public names that only this package calls.
INTERNAL = (
    r"client\.(rest\.AsyncRestClient|sampling\.AsyncSamplingClient|training\.AsyncTrainingClient)$",  # made by clients
    r"\.(loss|loss_against|positions|selected|select_reference|target_tensor|check_sampled|invalid)$",  # of `compute`
    r"\.(counted|tokens|token_losses|measured|clipped|clipped_losses|factors)$",  # of `compute` too
    r"\.(with_options|check_options)$",  # settings, which the constructors and specs check too
    r"\.next_(weights|multiplier)$",  # part of `update` of a controller
    r"\.Pipeline\.evaluate$",  # part of `compute` of a pipeline
    r"\.EventStream\.__call__$",  # an ASGI application
    r"\.PackedTensor",  # made of decoded responses
    r"\.RayTerm\.(compute|ready)$",  # need a Ray: tests/integrations/test_ray.py
    r"\.EventStream|\.training_events$",  # need a server and a run: tests/integrations/test_fastapi_streams.py
)

# Arguments that are only read when the work has begun.
READ_LATER = ("runs.loop.train.batches",)

# A valid call takes too long.
ONLY_WRONG_CALLS = ("demo.run.run_demo",)


class Sent:
    """Counts the requests of a client, without its heartbeats."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: telemetry.Event) -> None:
        self.count += "heartbeat" not in event.metadata["path"]


@pytest_asyncio.fixture
async def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Clients]:
    """Clients of an embedded service. Relative paths of the grid are in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    for module in ("wandb", "mlflow", "trackio", "ray"):  # they start processes and need services
        monkeypatch.setitem(sys.modules, module, MagicMock(__spec__=ModuleSpec(module, None)))
    async with AsyncServiceClient.local(model="tiny", device="cpu") as service:
        training = await service.create_lora_training_client("tiny", rank=1)
        rest = service.create_rest_client()
        yield Clients(
            service=service,
            training=training,
            sampling=await service.create_sampling_client(base_model="tiny"),
            rest=rest,
            embedded=service._embedded,
            session_id=(await rest.sessions_page()).sessions[0],
            checkpoint=(await training.save_state("one")).path,
            on_listening=lambda _address: LISTENING.set(),
        )


@pytest.mark.asyncio
async def test_wrong_arguments_are_refused_with_an_error_that_names_them(clients: Clients, tmp_path: Path) -> None:
    valid = await prepared(clients, tmp_path)
    sent = Sent()
    telemetry.attach(sent, events="tinkex.http.request.start", handler_id="sent")
    problems: list[str] = []
    for call in public_calls():
        if not any(re.search(pattern, call.name) for pattern in INTERNAL):
            problems += [problem async for problem in problems_of(call, valid, sent)]
    assert not problems, "\n".join([f"{len(problems)} problems", *problems[:500]])


async def problems_of(call: PublicCall, valid: ValidArguments, sent: Sent) -> AsyncIterator[str]:
    """Yields what is wrong with the answers of a callable to wrong arguments."""
    try:
        required = valid.required(call)
    except LookupError as error:
        yield str(error)
        return
    if call.name not in ONLY_WRONG_CALLS:
        error = await error_of(call, valid, required)
        if isinstance(error, REFUSALS) or not isinstance(error, TinkexError | None):
            yield f"{call.name}: the valid call fails with {error!r}"
            return
    for parameter in call.parameters:
        for kind, value in WRONG.items():
            before = sent.count
            error = await error_of(call, valid, {**required, parameter.name: value})
            problem = problem_of(call, parameter.name, error)
            is_early = f"{call.name}.{parameter.name}" not in READ_LATER
            if is_early and isinstance(error, REFUSALS) and sent.count > before:
                problem = f"{sent.count - before} requests were sent before {error}"
            if problem:
                yield f"{call.name}({parameter.name}=<{kind}>): {problem}"


def problem_of(call: PublicCall, parameter: str, error: Exception | None) -> str | None:
    """Returns what is wrong with the error of a call, or None."""
    if error is None or isinstance(error, DOCUMENTED.get(call.name, ())):
        return None
    if not isinstance(error, TinkexError):
        return shown(error)
    message = str(error)
    if "pydantic" in message or "\n" in message:
        return f"the message mentions pydantic or has several lines: {message}"
    words = ALIASES.get(f"{call.name}.{parameter}", parameter.replace("_", "[ _-]"))
    is_refusal = isinstance(error, REFUSALS) and not isinstance(error, RegularizerError)
    if is_refusal and not re.search(rf"\b({words})", message, re.IGNORECASE):
        return f"the message does not name it: {message}"
    return None


async def error_of(call: PublicCall, valid: ValidArguments, arguments: Mapping[str, Any]) -> Exception | None:
    """Makes a call to its end, and returns its error."""
    given = dict(arguments)
    positional = [
        given.pop(parameter.name)
        for parameter in call.parameters
        if parameter.name in given and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL)
    ]
    owner = [] if call.owner is None else [valid.instance(call.owner)]
    LISTENING.clear()
    try:
        async with asyncio.timeout(30):
            result = call.function(*owner, *positional, **given)
            if call.name.startswith("telemetry.handlers.attach"):
                telemetry.detach(result)
            await completed(result)
    except Exception as error:  # noqa: BLE001  (any error is an answer)
        return error
    finally:
        for sink in owner:
            if isinstance(sink, MetricSink):
                with suppress(ConfigError):  # it is finished
                    sink.finish("finished")
    return None


async def completed(result: Any) -> None:
    """Awaits a coroutine, or until it serves; reads the first item of an iterator; enters a context."""
    if inspect.isasyncgen(result):
        async for _ in result:
            break
        await result.aclose()
    elif inspect.iscoroutine(result):
        running, listening = asyncio.ensure_future(result), asyncio.ensure_future(LISTENING.wait())
        await asyncio.wait((running, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        running.cancel()
        await asyncio.wait((running, listening))
        if not running.cancelled():
            running.result()
    elif isinstance(result, ContextDecorator):
        with result:
            pass


def test_the_public_callables_are_found() -> None:
    names = {call.name for call in public_calls()}
    assert len(names) > 200
    assert names >= {
        "client.training.AsyncTrainingClient.forward_backward_custom",
        "client.training.AsyncTrainingClient.step",
        "losses.direct.execute",
        "losses.schedules.WarmUp",
        "base_losses.preference.DPO.compute",
        "types.datum.ModelInput.from_text",
        "telemetry.handlers.attach",
    }


def test_a_parameter_without_an_example_is_reported() -> None:
    parameter = inspect.Parameter("colour", inspect.Parameter.KEYWORD_ONLY, annotation=complex)
    call = PublicCall("losses.paint", None, print, (parameter,))
    valid = ValidArguments(MagicMock(), Path("folder"))
    with pytest.raises(LookupError, match=r"losses\.paint: add a valid `colour` .*complex.* in valid_arguments\.py"):
        valid.required(call)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "None"),
        ("a\nb", r"'a\nb'"),
        (np.zeros((2, 2)), "array([[0., 0.], [0., 0.]])"),
        ("x" * 300, "'" + "x" * 199 + "..."),
        (10**5000, "a int that cannot be printed"),
    ],
    ids=["None", "text", "array", "long", "unprintable"],
)
def test_values_in_messages_are_short_and_on_one_line(value: object, expected: str) -> None:
    assert shown(value) == expected
