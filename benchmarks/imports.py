"""(f) The cost of `import tinkex_py`, against `import tinker`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import ROOT, environment

IMPORTS = {
    "own": "import tinkex_py",
    "own_clients": "from tinkex_py import AsyncServiceClient, AsyncTrainingClient, Datum, ModelInput, TinkexConfig",
    "official": "import tinker",
}
_PROGRAM = """
import json, sys, time
before, wall, cpu = set(sys.modules), time.perf_counter(), time.process_time()
{statement}
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
found = set(sys.modules) - before
print(json.dumps([wall, cpu, len(found), sum(name.partition(".")[0] == "torch" for name in found)]))
"""


def run(settings: Settings) -> list[Result]:
    """Measures fresh processes, in turn. The first round may read files from the disk and does not count."""
    runs: dict[str, list[Sequence[float]]] = {name: [] for name in IMPORTS}
    for number in range(1 + settings.rounds):
        for name, statement in IMPORTS.items():
            taken = imported(statement)
            if number:
                runs[name].append(taken)
    wall = {name: median(taken[0] for taken in many) for name, many in runs.items()}
    cpu = {name: median(taken[1] for taken in many) for name, many in runs.items()}
    modules = {name: many[0][2] for name, many in runs.items()}
    facts = {f"{name}_wall_s": value for name, value in wall.items()}
    facts |= {f"{name}_cpu_s": value for name, value in cpu.items()}
    facts |= {f"{name}_modules": value for name, value in modules.items()}

    def ratio(what: str, name: str, times: dict[str, float], bound: float | None = None) -> Result:
        return Result(benchmark="f", what=what, measured=times[name] / times["official"], bound=bound, facts=facts)

    return [
        Result(
            benchmark="f",
            what="import tinkex_py: modules of torch",
            measured=max(taken[3] for taken in runs["own"]),
            unit="modules",
            bound=0,
        ),
        ratio("import tinkex_py / import tinker, time", "own", wall, 1 / 4),
        ratio("import tinkex_py / import tinker, CPU", "own", cpu),
        ratio("tinkex_py with its clients and datums / import tinker, time", "own_clients", wall),
        *(
            Result(
                benchmark="f",
                what=f"{IMPORTS[name].partition(' import ')[0]}: modules",
                measured=count,
                unit="modules",
                facts=facts,
            )
            for name, count in modules.items()
            if name != "own_clients"
        ),
    ]


def imported(statement: str) -> list[float]:
    """Returns the wall and CPU seconds of an import, the number of loaded modules, and how many of them are torch's."""
    command = [sys.executable, "-c", _PROGRAM.format(statement=statement)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment()).stdout
    return json.loads(printed)


BENCHMARK = Benchmark("f", "importing", run)
