"""How far a download is, on stderr, where somebody looks."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tinkex_py.types.rest import DownloadProgress


@contextmanager
def download_progress(title: str) -> Generator[Callable[[DownloadProgress], None] | None]:
    """What to tell the progress to; None where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def told(state: DownloadProgress) -> None:
            progress.update(task, completed=state.received_bytes, total=state.total_bytes)

        yield told
