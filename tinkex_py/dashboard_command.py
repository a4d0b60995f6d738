"""What `tinkex-py dashboard` does beside serving: check what is installed."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tinkex_py.errors import MissingExtra


async def dashboard(
    runs_dir: Path, host: str, port: int, *, allow_other_machines: bool, on_listening: Callable[[str], None]
) -> None:
    """Serves the dashboard until cancelled.

    Raises:
        ConfigError: the folder or the address cannot be used.
        MissingExtra: a library for it is not installed.
    """
    for library in ("fastapi.sse", "uvicorn"):
        try:
            import_module(library)
        except ModuleNotFoundError as error:
            raise MissingExtra(str(error.name), "dashboard") from error
    from tinkex_py.dashboard import serve_dashboard

    await serve_dashboard(runs_dir, host, port, allow_other_machines=allow_other_machines, on_listening=on_listening)
