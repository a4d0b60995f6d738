"""Results of the benchmarks: one `Result` per row of the table, and a `Report` of a whole run as JSON."""

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("tinkex-py", "tinker", "torch", "numpy", "protobuf", "httpx", "pydantic", "peft", "transformers")
_THREADS = ("OMP_", "GOMP_", "MKL_")

Unit = Literal["x", "ms", "us", "s", "MB", "modules"]
Target = Literal["at most", "at least"]


class Result(BaseModel):
    """One measured number.

    Attributes:
        benchmark: letter or name of the benchmark.
        what: what was measured.
        measured: the number.
        unit: "x" is a ratio.
        bound: the target; None if there is none.
        target: the side of the bound that passes.
        facts: the underlying numbers: medians of seconds, bytes and so on.
    """

    model_config = ConfigDict(frozen=True)

    benchmark: str
    what: str
    measured: float
    unit: Unit = "x"
    bound: float | None = None
    target: Target = "at most"
    facts: Mapping[str, float] = Field(default_factory=dict[str, float])

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        if self.bound is None:
            return None
        return self.measured <= self.bound if self.target == "at most" else self.measured >= self.bound

    @property
    def target_text(self) -> str:
        """Text for tables."""
        return "" if self.bound is None else f"{'<=' if self.target == 'at most' else '>='} {self._text(self.bound)}"

    @property
    def measured_text(self) -> str:
        """Text for tables."""
        return self._text(self.measured)

    @property
    def verdict(self) -> str:
        """Text for tables."""
        return {True: "pass", False: "miss", None: "-"}[self.passed]

    def _text(self, number: float) -> str:
        if self.unit == "modules":
            return f"{number:,.0f} modules"
        digits = 3 if abs(number) < 0.1 else 2 if abs(number) < 10 else 1 if abs(number) < 100 else 0
        return f"{number:,.{digits}f} {self.unit}"


class Machine(BaseModel):
    """The machine and the package versions of a run."""

    model_config = ConfigDict(frozen=True)

    cores: int
    processor: str
    system: str
    python: str
    versions: Mapping[str, str]
    threads: Mapping[str, str] = Field(description="environment variables that control the threads of torch")
    load: float = Field(description="load average of the minute before the run")


class Report(BaseModel):
    """One run of `python -m benchmarks`.

    Attributes:
        quick: whether sizes were small, to try the benchmarks; targets are not judged.
    """

    model_config = ConfigDict(frozen=True)

    made: datetime
    rounds: int
    quick: bool
    machine: Machine
    results: Sequence[Result]

    @property
    def missed(self) -> list[Result]:
        """Results that did not reach their target; none in a quick run."""
        return [] if self.quick else [result for result in self.results if result.passed is False]


def usable_cores() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def this_machine() -> Machine:
    """Describes this machine and the relevant packages."""
    return Machine(
        cores=usable_cores(),
        processor=_processor(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={name: found for name in _PACKAGES if (found := _version(name)) is not None},
        threads={name: value for name, value in os.environ.items() if name.startswith(_THREADS)},
        load=os.getloadavg()[0],
    )


def report(results: Sequence[Result], machine: Machine, *, rounds: int, quick: bool) -> Report:
    """Makes the report of a finished run."""
    made = datetime.now(UTC).replace(microsecond=0)
    return Report(made=made, rounds=rounds, quick=quick, machine=machine, results=results)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
