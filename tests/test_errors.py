"""Row 115 of the guide: one tree of errors that pickle with their fields."""

import builtins
import copy
import inspect
import pickle
from typing import Any

import pytest

import tinkex_py
from tinkex_py import errors
from tinkex_py.errors import TinkexError, status_error_class

STATUS_FIELDS = {
    "status": 429,
    "code": "slow_down",
    "request_id": "r-1",
    "body": {"detail": [1, "two"]},
    "retry_after": 1.5,
    "attempts": 3,
}

# Every class with arguments of its own; all others take one message.
ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "MissingExtra": (("rich", "cli"), {}),
    "RequestFailed": (("no",), {"category": "user", "request_id": "f-1", "handed_over": (3, 4)}),
    "PartialFailure": (
        ("part",),
        {"applied": [(0, 2)], "missing": [(2, 3)], "category": "server", "request_id": "f-2"},
    ),
    "DuplicateRegularizerNames": ((["a", "b"],), {}),
    "RegularizerTimeout": (("slow",), {"name": "kl", "timeout": 0.5}),
    **{
        name: (("failed",), {"name": "kl"})
        for name in ("RegularizerError", "NonFiniteLoss", "InPlaceMutation", "InvalidTermResult")
    },
}


def all_errors() -> list[type[TinkexError]]:
    found = inspect.getmembers(errors, lambda value: isinstance(value, type) and issubclass(value, TinkexError))
    return [cls for _, cls in found]


def made(cls: type[TinkexError]) -> TinkexError:
    positional, keywords = ARGUMENTS.get(cls.__name__, (("what was wrong",), {}))
    if issubclass(cls, errors.APIStatusError):
        keywords = STATUS_FIELDS
    return cls(*positional, **keywords)


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_row_115_pickle_keeps_message_and_fields(cls: type[TinkexError], protocol: int):
    error = made(cls)
    error.accumulated = 2
    error.was_sent = True
    error.add_note("a note")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is cls
    assert str(again) == str(error)
    assert again.args == error.args
    assert vars(again) == vars(error)
    assert again.accumulated == 2
    assert again.__notes__ == ["a note"]
    assert str(copy.copy(error)) == str(error)


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_all_are_importable_from_the_package_and_documented(cls: type[TinkexError]):
    assert cls.__doc__
    if cls is not TinkexError or hasattr(tinkex_py, "TinkexError"):
        assert getattr(tinkex_py, cls.__name__) is cls
    assert cls.__name__ in dir(tinkex_py)


@pytest.mark.parametrize(
    ("name", "parent", "stdlib"),
    [
        ("ConfigError", "TinkexError", "ValueError"),
        ("InvalidData", "TinkexError", "ValueError"),
        ("MissingExtra", "TinkexError", "ImportError"),
        ("ConnectionFailed", "TransportError", "ConnectionError"),
        ("TimeoutExceeded", "TransportError", "TimeoutError"),
        ("PermissionDenied", "APIStatusError", "PermissionError"),
        ("NotFound", "APIStatusError", "LookupError"),
        ("MissingEndpoint", "NotFound", "LookupError"),
        ("MissingEndpoint", "UnsupportedFeature", "LookupError"),
        ("DuplicateRegularizerNames", "PipelineError", "ValueError"),
        ("InvalidSpec", "PipelineError", "ValueError"),
        ("InvalidBaseLoss", "PipelineError", "TypeError"),
        ("RegularizerError", "PipelineError", "Exception"),
        ("RegularizerTimeout", "RegularizerError", "TimeoutError"),
        ("NonFiniteLoss", "RegularizerError", "ArithmeticError"),
        ("InPlaceMutation", "RegularizerError", "Exception"),
        ("InvalidTermResult", "RegularizerError", "TypeError"),
        ("PrecedingRequestFailed", "TinkexError", "Exception"),
        ("RequestInsideStep", "TinkexError", "RuntimeError"),
        ("SequenceLost", "TinkexError", "Exception"),
        ("SurrogateMismatch", "TinkexError", "Exception"),
    ],
)
def test_the_tree(name: str, parent: str, stdlib: str):
    cls = getattr(errors, name)
    assert issubclass(cls, getattr(errors, parent))
    assert issubclass(cls, getattr(builtins, stdlib))


def test_none_is_a_cancellation():
    import asyncio

    assert not any(issubclass(cls, asyncio.CancelledError) for cls in all_errors())


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (400, "BadRequest"),
        (401, "Authentication"),
        (402, "BillingRequired"),
        (403, "PermissionDenied"),
        (404, "NotFound"),
        (409, "Conflict"),
        (422, "Unprocessable"),
        (429, "RateLimited"),
        (500, "ServerError"),
        (503, "ServerError"),
        (599, "ServerError"),
        (418, "APIStatusError"),
        (302, "APIStatusError"),
    ],
)
def test_the_class_of_a_status(status: int, name: str):
    assert status_error_class(status).__name__ == name


def test_a_missing_extra_names_the_command():
    error = errors.MissingExtra("rich", "cli")
    assert "pip install 'tinkex-py[cli]'" in str(error)
    assert (error.package, error.extra) == ("rich", "cli")


def test_an_incomplete_accumulation_is_reported():
    error = errors.RegularizerError("term 'kl' failed", name="kl")
    assert str(error) == "term 'kl' failed"
    error.accumulated = 3
    assert str(error) == "term 'kl' failed"  # refused before anything was sent
    error.was_sent = True
    assert "3 backward" in str(error)
    assert "only the missing micro-batches" in str(error)


def test_duplicate_names_read_as_in_the_guide():
    error = errors.DuplicateRegularizerNames(["dup"])
    assert str(error).startswith("Duplicate regularizer names: ['dup']")
    assert error.names == ("dup",)
