"""Gives every test a clean process, and checks that it leaves nothing behind.

A test that leaves a task, a thread, a socket or a file open fails and names them. Objects that live
longer than one test belong to a fixture with a wider scope, which is set up before this check.
"""

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.support.left_behind import descriptors_left, open_descriptors, threads_left
from tinkex_py import telemetry
from tinkex_py.telemetry import handlers

# The models of the tests are too small for a second torch thread, in subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("tinkex", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tinkex")

_FAILED = pytest.StashKey[bool]()


class TasksLeft:
    """Collects the tasks that still run when their loop is about to close.

    `asyncio.Runner` cancels them silently, so a leaked task would not be noticed.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.expected = False

    def look(self, loop: asyncio.AbstractEventLoop) -> None:
        self.names += [f"{task.get_name()}: {task.get_coro()!r}" for task in asyncio.all_tasks(loop)]

    def take(self) -> list[str]:
        names, self.names = self.names, []
        expected, self.expected = self.expected, False
        return [] if expected else names


_TASKS_LEFT = TasksLeft()


def pytest_configure(config: pytest.Config) -> None:
    original: Any = vars(asyncio.runners)["_cancel_all_tasks"]

    def look_then_cancel(loop: asyncio.AbstractEventLoop) -> None:
        _TASKS_LEFT.look(loop)
        original(loop)

    patch = pytest.MonkeyPatch()
    patch.setattr(asyncio.runners, "_cancel_all_tasks", look_then_cancel)
    config.add_cleanup(patch.undo)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # with torch and its dependencies, every collection would take 0.2 s


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session", autouse=True)
def user_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what clients store for their user, such as certificates, away from the user who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(autouse=True)
def clean_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clean environment, logging and telemetry before the test; nothing left behind after it."""
    for name in [name for name in os.environ if name.startswith(("TINKER_", "TINKEX_"))]:
        monkeypatch.delenv(name)
    _reset_observers()
    _TASKS_LEFT.take()
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    yield
    _reset_observers()
    tasks = _TASKS_LEFT.take()
    if request.node.stash.get(_FAILED, False):
        return  # the traceback of a failed test keeps its objects alive, which would be a false alarm
    left = [f"task {name}" for name in tasks]
    left += [f"thread {thread.name}" for thread in threads_left(threads)]
    left += [f"descriptor {number} -> {target}" for number, target in descriptors_left(descriptors)]
    if "torch" in sys.modules and not sys.modules["torch"].is_grad_enabled():
        sys.modules["torch"].set_grad_enabled(True)
        left.append("torch's grad mode is off")
    if left:
        pytest.fail("the test left behind: " + "; ".join(left), pytrace=False)


@pytest.fixture
def tasks_may_be_left() -> None:
    """Allows a test to close a loop while tasks run."""
    _TASKS_LEFT.expected = True


def _reset_observers() -> None:
    for attachment in handlers._ATTACHMENTS.current:
        telemetry.detach(attachment.handler_id)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
