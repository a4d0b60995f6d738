"""Runs the example notebook in a kernel. `python -m tests.examples.notebook` saves it with its new outputs."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"

# What a progress bar leaves: it belongs to the kernel that drew it.
WIDGET = "application/vnd.jupyter.widget-view+json"


def read_notebook() -> NotebookNode:
    """The notebook as it lies in the repository."""
    return nbformat.read(NOTEBOOK, as_version=4)


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    """A copy that was never run."""
    cells = []
    for cell in notebook.cells:
        made = nbformat.v4.new_markdown_cell if cell.cell_type == "markdown" else nbformat.v4.new_code_cell
        cells.append(made(cell.source, id=cell.id))
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


@asynccontextmanager
async def kernel_for(notebook: NotebookNode, folder: Path) -> AsyncIterator[NotebookClient]:
    """A kernel in a folder, ready for the notebook's cells; it has ended when the block is left.

    Args:
        notebook: whose cells are run.
        folder: where they are run; all that Jupyter writes goes there too.
    """
    own = folder / ".jupyter"
    own.mkdir()
    # Sockets in a folder of one's own: no ports, and nobody else reads along.
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=str(own / "kernel.json"))
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=100,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(own), "JUPYTER_RUNTIME_DIR": str(own)}
    async with client.async_setup_kernel(cwd=str(folder), env=environment, cleanup_kc=True):
        yield client


async def run_cells(client: NotebookClient, *, start: int = 0, end: int | None = None) -> None:
    """Runs cells of the kernel's notebook one after the other.

    Args:
        client: of a kernel.
        start: place of the first cell.
        end: place after the last one; default all.

    Raises:
        CellExecutionError: a cell failed.
    """
    for place, cell in list(enumerate(client.nb.cells))[start:end]:
        await client.async_execute_cell(cell, place)


def as_saved(notebook: NotebookNode) -> NotebookNode:
    """Leaves out of the outputs what is of no use in a file: widgets, and the text of what is shown as a table."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.outputs:
            if "text/html" in output.get("data", {}):
                output.data.pop("text/plain", None)
    return notebook


async def run_and_save() -> None:
    """Runs the notebook and saves it."""
    notebook = without_outputs(read_notebook())
    with tempfile.TemporaryDirectory() as folder:
        async with kernel_for(notebook, Path(folder)) as client:
            await run_cells(client)
    nbformat.write(as_saved(notebook), NOTEBOOK)


if __name__ == "__main__":
    asyncio.run(run_and_save())
