"""The notebook runs as a user would run it, its saved outputs are those of today, and its stop button works."""

import asyncio
import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.examples.notebook import NOTEBOOK, as_saved, kernel_for, read_notebook, run_cells, without_outputs

PNG = "image/png"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
# Of a folder of one machine, or of an object in memory.
PLACES = re.compile(r"(?<![\w<:/])/\w[\w.-]*/|[A-Z]:\\|0x[0-9a-f]{6,}")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: NotebookNode, name: str) -> str:
    """What a cell prints."""
    (cell,) = [cell for cell in notebook.cells if cell.id == name]
    return "".join(output.text for output in cell.outputs)


def shape(cell: NotebookNode) -> list[Any]:
    """What a cell shows, but for the numbers."""
    told: list[Any] = []
    for output in cell.outputs:
        texts = output.get("data", {"text/plain": output.get("text")})
        told.append(
            (output.output_type, {kind: "" if kind == PNG else NUMBER.sub("N", text) for kind, text in texts.items()})
        )
    return told


STUCK = """
async def ask(data, logprobs):
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    try:
        await reader.readline()
    finally:
        writer.close()
        await writer.wait_closed()

before = await training.forward_backward_custom(data, pipeline)
await training.optim_step(AdamParams(learning_rate=0.0))
stuck = RegularizerSpec(fn=ask, weight=1.0, name="ask", timeout=float("inf"))
await training.forward_backward_custom(data, pipeline.base_loss, regularizers=[stuck])
"""
AFTER = """
print(training.accumulated)
after = await training.forward_backward_custom(data, pipeline)
print(after.loss_total == before.loss_total)
await training.optim_step(AdamParams(learning_rate=1e-3))
print((await training.forward_backward_custom(data, pipeline)).loss_total < after.loss_total)
"""


async def stop_in_the_middle(client: NotebookClient, place: int) -> None:
    """Runs a cell whose term waits for a server, and presses the stop button once it does."""
    asked, ended = asyncio.Event(), asyncio.Event()

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()  # until the term is gone
        writer.close()
        ended.set()

    cell = client.nb.cells[place]
    async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as server:
        cell.source = STUCK.replace("PORT", str(server.sockets[0].getsockname()[1]))
        client.allow_errors = True
        running = asyncio.create_task(client.async_execute_cell(cell, place))
        waiting = asyncio.create_task(asked.wait())
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert not running.done(), cell.outputs
        await client.km.interrupt_kernel()
        await running
        await ended.wait()
    client.allow_errors = False


@pytest.mark.slow  # a kernel, which loads torch, and a short training
@pytest.mark.asyncio
async def test_the_notebook_shows_what_was_saved_and_its_client_outlives_the_stop_button(tmp_path: Path) -> None:
    now, saved = without_outputs(read_notebook()), read_notebook()
    stuck, after = nbformat.v4.new_code_cell(STUCK), nbformat.v4.new_code_cell(AFTER)
    now.cells[-1:-1] = [stuck, after]  # before the one that closes the service
    last = len(now.cells) - 1
    async with kernel_for(now, tmp_path) as client:
        process = client.km.provisioner.pid
        await run_cells(client, end=last - 2)
        await stop_in_the_middle(client, last - 2)
        await run_cells(client, start=last - 1)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    del now.cells[-3:-1]

    for before, cell in zip(code_cells(saved), code_cells(as_saved(now)), strict=True):
        assert shape(cell) == shape(before), f"cell {cell.id}: run `make notebook` after a change"
    # What the text says.
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed(now, "go-on"))]
    assert len(losses) == 3
    assert losses[-1] < 2.0
    assert printed(now, "cancel") == "cancelled; gradients at the service: 0\n"
    assert printed(now, "sample").count("Ahoy friend, it is ") == 3
    assert set(os.listdir(tmp_path)) == {".jupyter", "runs"}  # noqa: PTH208

    assert [output.ename for output in stuck.outputs] == ["CancelledError"]
    assert "".join(output.text for output in after.outputs) == "0\nTrue\nTrue\n"


def test_the_saved_notebook_is_whole_and_small() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 400_000
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    pictures = [
        base64.b64decode(output.data[PNG])
        for cell in code_cells(notebook)
        for output in cell.outputs
        if PNG in output.get("data", {})
    ]
    assert pictures
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    for cell in notebook.cells:
        assert cell.metadata == {}
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.get("name") != "stderr"
            texts = [str(content) for kind, content in output.get("data", {}).items() if kind != PNG]
            assert not PLACES.search("".join(texts) + output.get("text", ""))
    assert not PLACES.search(json.dumps(notebook.metadata))
