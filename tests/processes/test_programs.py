"""Worker processes of whole programs: scripts, notebooks and web servers."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest

from tests.examples.notebook import kernel_for, run_cells
from tests.losses.support import until

SCRIPT = """
import asyncio, os, sys, torch
print("imported", flush=True)
from tinkex_py import Pipeline, RegularizerSpec
FACTOR = 3.0
def of_main(data, logprobs):
    return logprobs.sum() * FACTOR
def hangs(data, logprobs):
    import re
    print("pid", os.getpid(), flush=True)
    re.match(r"(a+)+$", "a" * 64 + "b")
async def main():
    spec = RegularizerSpec(globals()[sys.argv[1]], 1.0, runs_in="process", timeout=600.0)
    print("value", (await Pipeline(of_main, [spec]).compute([], torch.ones(4))).loss_total, flush=True)
asyncio.run(main())
"""

SERVER = """
import os, torch
from fastapi import FastAPI
from tinkex_py import Pipeline, RegularizerSpec
app = FastAPI()
def squares(data, logprobs):
    return logprobs.square().sum(), {"pid": os.getpid()}
pipeline = Pipeline(squares, [RegularizerSpec(squares, 1.0, runs_in="process", timeout=600.0)])
@app.get("/")
async def value() -> dict[str, float]:
    own = (await pipeline.compute([], torch.full((4,), 3.0))).regularizers["squares"]
    return {"value": own.value, "pid": own.custom_metrics["pid"]}
"""

CELLS = (
    "import torch\nfrom tinkex_py import Pipeline, RegularizerSpec\nFACTOR = 2.0",
    "def of_cell(data, logprobs):\n    return logprobs.sum() * FACTOR",
    "pipeline = Pipeline(of_cell, [RegularizerSpec(of_cell, 1.0, runs_in='process')])",
    "print((await pipeline.compute([], torch.ones(4))).regularizers['of_cell'].value)",
)


def program(folder: Path, text: str, *arguments: str) -> "subprocess.Popen[str]":
    (folder / "program.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def is_gone(worker: psutil.Process) -> bool:
    """Whether a process has ended; the system may not have reaped one whose parent ended before."""
    return not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_functions_of_main_cross_and_it_is_not_imported(tmp_path: Path):
    with program(tmp_path, SCRIPT, "program.py", "of_main") as process:
        assert process.stdout is not None
        assert process.stdout.read().split("\n") == ["imported", "value 24.0", ""]
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_worker_that_holds_the_lock_dies_with_its_parent(tmp_path: Path):
    with program(tmp_path, SCRIPT, "program.py", "hangs") as process:
        assert process.stdout is not None
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
        worker = psutil.Process(pid)
        assert worker.is_running()
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # until the worker, which has the same stdout, is gone
    asyncio.run(until(lambda: is_gone(worker)))


def test_a_server_with_fastapi_and_uvloop(tmp_path: Path):
    pytest.importorskip("uvloop")
    server = ("-m", "uvicorn", "program:app", "--port", "0", "--loop", "uvloop")
    with program(tmp_path, SERVER, *server) as process:
        assert process.stdout is not None
        (url,) = next(found for line in process.stdout if (found := re.findall(r"running on (\S+)", line)))
        with urllib.request.urlopen(url, timeout=60) as answer:
            found = answer.read().decode()
        value, pid = map(float, re.findall(r"[\d.]+", found))
        assert value == 4 * 3.0**2
        worker = psutil.Process(int(pid))
        assert worker.ppid() == process.pid
        process.terminate()
        process.stdout.read()
    asyncio.run(until(lambda: is_gone(worker)))


@pytest.mark.asyncio
async def test_functions_of_a_notebook_cross(tmp_path: Path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    async with kernel_for(notebook, tmp_path) as client:
        await run_cells(client)
    assert [output.text for output in notebook.cells[-1].outputs] == ["8.0\n"]
