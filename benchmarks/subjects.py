"""Subjects seen from outside: each in a process of its own, run in turn so that what disturbs one disturbs all."""

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
    """A benchmark could not be run, or a subject computed something else than it should."""


def environment(**extra: str) -> dict[str, str]:
    """Of subjects and services: nothing that the caller set for another service, no telemetry."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    return {**kept, "TINKER_TELEMETRY": "0", "TINKER_API_KEY": "tml-benchmark", **extra}


@dataclass(frozen=True)
class Measured:
    """All runs of one subject.

    Attributes:
        resident: resident bytes before the first run, with its data ready.
        usages: what each run took, warm-up runs left out.
        told: what each run told of itself.
    """

    resident: int
    usages: Sequence[Usage]
    told: Sequence[Any]

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
        """Bytes by which the process grew over what it held before the first run, at the most."""
        return max(usage.peak for usage in self.usages) - self.resident

    def facts(self) -> dict[str, float]:
        """For the JSON."""
        return {"wall_s": self.wall, "cpu_s": self.cpu, "growth_bytes": self.growth, "resident_bytes": self.resident}


@dataclass(frozen=True)
class Subject:
    """One process that runs the work of `function` whenever it is told to."""

    process: "subprocess.Popen[str]"
    name: str

    def ready(self) -> int:
        """Waits until it has its data; gives the resident bytes of the process then. Once, before the first run."""
        return _told(self.process, self.name)["resident"]

    def run(self) -> tuple[Usage, Any]:
        """What one run took, and what it told."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        fields = _told(self.process, self.name)
        told = fields.pop("told")
        return Usage(**fields), told


@contextmanager
def subject(function: str, arguments: Mapping[str, Any], **extra: str) -> Iterator[Subject]:
    """A subject that is about to be ready, so that several make themselves ready at the same time.

    Args:
        function: `module:name` of what makes the work, see `subject_process`.
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


def _told(process: "subprocess.Popen[str]", name: str) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchmarkError(f"the process of {name} ended with status {process.wait()}; its last words are above")
    return json.loads(line)


def alternate(subjects: Mapping[str, Subject], *, rounds: int, warm_up: int = 1) -> dict[str, Measured]:
    """Runs all subjects in turn, for so many rounds; each round begins with another one, so that none is always behind
    the same one.

    Args:
        subjects: by name.
        rounds: runs of each that count.
        warm_up: runs of each before, which do not.
    """
    resident = {name: one.ready() for name, one in subjects.items()}
    usages: dict[str, list[Usage]] = {name: [] for name in subjects}
    told: dict[str, list[Any]] = {name: [] for name in subjects}
    names = deque(subjects)
    for number in range(warm_up + rounds):
        names.rotate(-1)
        for name in names:
            usage, words = subjects[name].run()
            if number >= warm_up:
                usages[name].append(usage)
                told[name].append(words)
    return {name: Measured(resident[name], usages[name], told[name]) for name in subjects}


@contextmanager
def served(module: str, *arguments: str, **extra: str) -> Iterator[str]:
    """The address of a service in a process of its own, that tells where it listens.

    Args:
        module: its program.
        arguments: of the program.
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
    """Subjects that each have a replay service to themselves, as their argument `base_url`.

    Args:
        functions: by the name of the subject, see `subject`.
        same: at the end, check that all of them have sent the same gradient.
        service_options: of the replay service.
        arguments: of all of them.
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
    """What a replay service got in the latest backward pass."""
    with urllib.request.urlopen(f"{url}/replay/gradient", timeout=60) as answer:
        return np.frombuffer(answer.read(), "<f4")


def sent_bytes(url: str) -> int:
    """How long the bodies of the latest backward pass were."""
    with urllib.request.urlopen(f"{url}/replay/bytes", timeout=60) as answer:
        return int(answer.read())


def check_equal(gradients: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Refuses gradients that are not the same numbers.

    Raises:
        BenchmarkError: naming the two.
    """
    (first, expected), *others = gradients.items()
    if expected.size == 0 or not np.isfinite(expected).all() or not expected.any():
        raise BenchmarkError(f"{first} sent no gradient")
    for name, gradient in others:
        if gradient.shape != expected.shape or not np.allclose(gradient, expected, rtol=1e-6, atol=1e-7):
            raise BenchmarkError(f"{name} sent another gradient than {first}: they do not compute the same")
