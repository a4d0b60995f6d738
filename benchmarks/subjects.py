"""Runs subjects, each in its own process, in turn, so that a disturbance affects all of them."""

import json
import os
import subprocess
import sys
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.usage import Usage

ROOT = Path(__file__).parents[1]
LISTENING = "Listening on "


class BenchmarkError(Exception):
    """A benchmark could not run, or a subject computed a wrong result."""


def environment(**extra: str) -> dict[str, str]:
    """Returns the environment of subjects and services: no TINKER_ variables of the caller, no telemetry."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    return {**kept, "TINKER_TELEMETRY": "0", "TINKER_API_KEY": "tml-benchmark", **extra}


@dataclass(frozen=True)
class Measured:
    """All runs of one subject.

    Attributes:
        resident: resident bytes before the first run, with its data loaded.
        usages: the usage of each run, without warm-up runs.
        returned: the result of each run.
    """

    resident: int
    usages: Sequence[Usage]
    returned: Sequence[Any]

    @property
    def wall(self) -> float:
        """Median, seconds."""
        return median(usage.wall for usage in self.usages)

    @property
    def cpu(self) -> float:
        """Median, seconds."""
        return median(usage.cpu for usage in self.usages)

    @property
    def growth(self) -> int:
        """The most bytes by which the process grew since before the first run."""
        return max(usage.peak for usage in self.usages) - self.resident

    def facts(self) -> dict[str, float]:
        """For the JSON."""
        return {"wall_s": self.wall, "cpu_s": self.cpu, "growth_bytes": self.growth, "resident_bytes": self.resident}


@dataclass(frozen=True)
class Subject:
    """A process that runs the work of a function on request."""

    process: "subprocess.Popen[str]"
    name: str

    def ready(self) -> int:
        """Waits until the data is loaded; returns the resident bytes. Call it once, before the first run."""
        return _next_line(self.process, self.name)["resident"]

    def run(self) -> tuple[Usage, Any]:
        """Runs once; returns the usage and the result."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        fields = _next_line(self.process, self.name)
        returned = fields.pop("returned")
        return Usage(**fields), returned


@contextmanager
def subject(function: str, arguments: Mapping[str, Any], **extra: str) -> Iterator[Subject]:
    """Starts a subject without waiting for its data, so that several load at the same time.

    Args:
        function: `module:name` of the function that prepares the work; see `subject_process`.
        arguments: its arguments.
        extra: more environment variables.
    """
    command = [sys.executable, "-m", "benchmarks.subject_process", function, json.dumps(arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(**extra)
    ) as process:
        try:
            yield Subject(process, function)
            assert process.stdin is not None
            process.stdin.close()
            if process.wait(timeout=60):
                raise BenchmarkError(f"the process of {function} ended with status {process.returncode}")
        finally:
            process.kill()


def _next_line(process: "subprocess.Popen[str]", name: str) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchmarkError(f"the process of {name} ended with status {process.wait()}; its output is above")
    return json.loads(line)


def alternate(subjects: Mapping[str, Subject], *, rounds: int, warm_up: int = 1) -> dict[str, Measured]:
    """Runs all subjects in turn. Each round starts with another one, so that none always follows the same one.

    Args:
        subjects: by name.
        rounds: measured runs of each.
        warm_up: runs of each before, which are not measured.
    """
    resident = {name: one.ready() for name, one in subjects.items()}
    usages: dict[str, list[Usage]] = {name: [] for name in subjects}
    returned: dict[str, list[Any]] = {name: [] for name in subjects}
    names = deque(subjects)
    for number in range(warm_up + rounds):
        names.rotate(-1)
        for name in names:
            usage, result = subjects[name].run()
            if number >= warm_up:
                usages[name].append(usage)
                returned[name].append(result)
    return {name: Measured(resident[name], usages[name], returned[name]) for name in subjects}


@contextmanager
def served(module: str, *arguments: str, **extra: str) -> Iterator[str]:
    """Yields the address of a service in its own process, which prints where it listens.

    Args:
        module: its program.
        arguments: arguments of the program.
        extra: more environment variables.
    """
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(**extra)) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(LISTENING):
                raise BenchmarkError(f"{module} did not start: {line!r}")
            yield line.removeprefix(LISTENING).strip()
        finally:
            process.terminate()


@dataclass(frozen=True)
class Replayed:
    """Subjects and the addresses of their replay services, by name."""

    subjects: Mapping[str, Subject]
    urls: Mapping[str, str]


@contextmanager
def replayed(
    functions: Mapping[str, str], *, same: bool, service_options: Sequence[str] = (), **arguments: Any
) -> Iterator[Replayed]:
    """Starts subjects that each have their own replay service, as their argument `base_url`.

    Args:
        functions: functions by the name of the subject; see `subject`.
        same: whether to check at the end that all of them sent the same gradient.
        service_options: options of the replay service.
        arguments: arguments of all subjects.
    """
    with ExitStack() as stack:
        urls = {name: stack.enter_context(served("benchmarks.replay_service", *service_options)) for name in functions}
        subjects = {
            name: stack.enter_context(subject(function, {"base_url": urls[name], **arguments}))
            for name, function in functions.items()
        }
        yield Replayed(subjects, urls)
        if same:
            check_equal({name: sent_gradient(url) for name, url in urls.items()})


def sent_gradient(url: str) -> npt.NDArray[np.float32]:
    """Returns the gradient that a replay service received in the latest backward pass."""
    with urllib.request.urlopen(f"{url}/replay/gradient", timeout=60) as answer:
        return np.frombuffer(answer.read(), "<f4")


def sent_bytes(url: str) -> int:
    """Returns the total length of the bodies of the latest backward pass."""
    with urllib.request.urlopen(f"{url}/replay/bytes", timeout=60) as answer:
        return int(answer.read())


def check_equal(gradients: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Checks that all gradients are the same numbers.

    Raises:
        BenchmarkError: two differ; the message names them.
    """
    (first, expected), *others = gradients.items()
    if expected.size == 0 or not np.isfinite(expected).all() or not expected.any():
        raise BenchmarkError(f"{first} sent no gradient")
    for name, gradient in others:
        if gradient.shape != expected.shape or not np.allclose(gradient, expected, rtol=1e-6, atol=1e-7):
            raise BenchmarkError(f"{name} sent another gradient than {first}: they do not compute the same")
