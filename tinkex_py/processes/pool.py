"""A pool of worker processes. Each call has one worker to itself, and can be killed at any time.

A thread of the pool starts a worker, waits for its answers and reaps it, so that the pool works with every event loop.
The number of these threads bounds the number of processes.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tinkex_py.errors import ClientClosed
from tinkex_py.processes.crossing import Channel, read_file, unpickled
from tinkex_py.processes.worker import MOST_LOADED

Result = TypeVar("Result")


class WorkerDied(Exception):
    """A worker process ended during a call.

    Attributes:
        status: how it ended.
    """

    def __init__(self, status: str) -> None:
        super().__init__(f"its worker process {status}")
        self.status = status


class CannotCross(Exception):
    """Replaces an exception of a worker whose own class cannot cross."""


class Worker:
    """One worker process. Its methods block, except `kill`.

    Args:
        entry: `module:function` that answers calls: `function(loaded, argument, descriptor)`.
    """

    def __init__(self, entry: str) -> None:
        self.loaded: set[bytes] = set()
        self._entry = entry
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._killed = False
        self._owner = os.getpid()
        self._reaping = threading.Lock()

    @property
    def is_alive(self) -> bool:
        """Whether it can be used. The system may have killed it while it was idle."""
        with self._reaping:
            return not self._killed and self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process, and waits until it is ready.

        Raises:
            WorkerDied: it ended, or was killed.
            OSError: the system starts no process.
        """
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        command = [sys.executable, "-P", "-m", "tinkex_py.processes.worker"]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109
        try:
            if self._killed:
                raise WorkerDied("was killed before its start")
            self._process = subprocess.Popen(  # noqa: S603
                [*command, str(theirs.fileno()), str(os.getpid()), self._entry],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # so that Ctrl-C does not end it, and its own children are killed with it
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if self._killed:  # meanwhile
            self.kill()
        self._answer(None)

    def load(self, key: bytes, pickled: bytes) -> None:
        """Loads a function, unless it is loaded.

        Raises:
            WorkerDied: the process ended.
            Exception: the function could not be loaded.
        """
        if key in self.loaded:
            return
        if len(self.loaded) >= MOST_LOADED:
            self.loaded.clear()
        self._answer(("load", key, pickled))
        self.loaded.add(key)

    def call(self, key: bytes, argument: object, file: int) -> tuple[Any, bool]:
        """Returns `function(loaded, argument, file)` of the process, and whether it may still read a file.

        Raises:
            WorkerDied: the process ended.
            Exception: what the function raised.
        """
        return self._answer(("call", key, argument), file)

    def _answer(self, request: object, file: int | None = None) -> tuple[Any, bool]:
        assert self._channel is not None, "the worker was started"
        try:
            if request is not None:
                self._channel.send(request, file)
            (kind, detail), answer = self._channel.receive()
        except (EOFError, OSError):
            raise WorkerDied(self.end()) from None
        if answer is not None:
            try:
                return read_file(answer)[0], detail
            finally:
                os.close(answer)
        if kind == "failed":
            raise _raised_there(*detail)
        return None, detail

    def kill(self) -> None:
        """Kills the process and its children, from any thread; a call that waits for it ends with WorkerDied."""
        self._killed = True
        process = self._process
        if process is None or self._owner != os.getpid():  # this is a fork
            return
        with self._reaping:
            if process.returncode is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it ended, and its group with it
                    return

    def end(self) -> str:
        """Kills and reaps the process, and returns how it ended."""
        self.kill()
        process = self._process
        if process is None or self._owner != os.getpid():
            return "was killed before its start"
        with self._reaping:
            code = process.wait()
        if self._channel is not None:
            self._channel.close()
        if code >= 0:
            return f"ended with exit status {code}"
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"


def _raised_there(pickled: bytes | None, message: str, text: str) -> BaseException:
    error: BaseException = CannotCross(message)
    if pickled is not None:
        try:
            error = unpickled(pickled)
        except Exception as broken:  # noqa: BLE001  # a class of the user
            error = CannotCross(f"{message} ({type(broken).__name__} when it was read)")
    error.add_note(f"In the worker process:\n{text}")
    return error


class ProcessPool:
    """Worker processes. They start when they are needed, and end with the pool.

    Args:
        limit: maximum number of processes.
        entry: see `Worker`.
    """

    def __init__(self, limit: int, entry: str) -> None:
        self._entry = entry
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._closed = False
        # The kernel kills a worker when the thread that started it ends; these threads end with the pool.
        self._threads = ThreadPoolExecutor(limit, "tinkex-process")
        self._spare: list[int] = []
        self._at_end = weakref.finalize(self, _end_all, self._all, self._spare)

    async def worker_with(self, key: bytes, pickled: bytes) -> Worker:
        """Returns an idle worker that has loaded a function, or starts one. Give it back with `give_back`.

        Raises:
            ClientClosed: the pool is closed.
            WorkerDied: the process ended.
            Exception: the function could not be loaded.
        """
        self._idle = [worker for worker in self._idle if worker.is_alive]
        usable = [worker for worker in self._idle if key in worker.loaded] or self._idle
        is_new = not usable
        if not is_new:
            worker = usable[-1]
            self._idle.remove(worker)
        else:
            worker = Worker(self._entry)
            self._all.add(worker)
        if key in worker.loaded:
            return worker

        def prepare() -> None:
            if is_new:
                worker.start()
            worker.load(key, pickled)

        try:
            await self._run(worker, prepare)
        except BaseException:
            self._discard(worker)
            raise
        return worker

    def spare_file(self) -> int | None:
        """Returns the descriptor of a file that no process reads, if there is one. The caller owns it."""
        return self._spare.pop() if self._spare else None

    def keep_file(self, file: int) -> None:
        """Keeps a file that no process reads for `spare_file`, or closes it."""
        if self._spare or self._closed:
            os.close(file)
        else:
            self._spare.append(file)

    async def call(self, worker: Worker, key: bytes, argument: object, file: int) -> tuple[Any, bool]:
        """Returns what a worker answers to a call, see `Worker.call`. A cancelled caller kills the worker.

        Raises:
            ClientClosed: the pool is closed.
            WorkerDied: the process ended.
            Exception: what the function raised.
        """
        own = os.dup(file)
        try:
            return await self._run(worker, lambda: worker.call(key, argument, own), lambda _: os.close(own))
        except WorkerDied:
            self._discard(worker)
            raise

    def give_back(self, worker: Worker) -> None:
        """Makes a worker idle, unless it was killed."""
        if worker.is_alive and not self._closed:
            self._idle.append(worker)
        else:
            self._discard(worker)

    def close(self) -> None:
        """Kills and reaps all processes."""
        self._closed = True
        self._idle.clear()
        for worker in list(self._all):
            worker.kill()
        self._threads.shutdown(wait=True)
        self._at_end()

    def _discard(self, worker: Worker) -> None:
        """Kills a worker, and reaps it in a thread."""
        worker.kill()

        def reap() -> None:
            worker.end()
            self._all.discard(worker)

        try:
            self._threads.submit(reap)
        except RuntimeError:  # the pool is closed, and reaps all
            return

    async def _run(
        self, worker: Worker, work: Callable[[], Result], at_end: "Callable[[Future[Any]], None] | None" = None
    ) -> Result:
        try:
            future = self._threads.submit(_outcome, work)
        except RuntimeError as error:
            raise ClientClosed(f"the pool of worker processes is closed ({error}): create a new client") from error
        if at_end is not None:
            future.add_done_callback(at_end)
        try:
            result, failure = await asyncio.wrap_future(future)
        except BaseException:
            worker.kill()
            raise
        if failure is None:
            return result  # type: ignore[return-value]
        try:
            raise failure
        finally:
            del failure, future  # the traceback of the error references this frame


def _outcome(work: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    """Returns result and exception, because asyncio translates some exceptions of futures and rejects others."""
    try:
        return work(), None
    except BaseException as error:  # noqa: BLE001  # raised where the result is awaited
        return None, error


def _end_all(workers: set[Worker], files: list[int]) -> None:
    for worker in list(workers):
        worker.end()
    while files:
        os.close(files.pop())
