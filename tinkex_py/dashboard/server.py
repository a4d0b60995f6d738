"""Serves the dashboard on a socket."""

from collections.abc import Callable
from pathlib import Path

from tinkex_py.arguments import check_flag, check_path, shown
from tinkex_py.dashboard.app import dashboard_app
from tinkex_py.dashboard.feed import INTERVAL, Feed
from tinkex_py.errors import ConfigError
from tinkex_py.limits import is_seconds, running_loop
from tinkex_py.serving import address_of, check_listening, is_loopback, listen, serve_app


async def serve_dashboard(
    runs_dir: Path | str,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    allow_other_machines: bool = False,
    interval: float = INTERVAL,
    on_listening: Callable[[str], None],
) -> None:
    """Serves until cancelled; the streams of open pages end at once. Installs no signal handlers.

    Args:
        runs_dir: the folder that contains the folders of the runs.
        host: address to listen on.
        port: TCP port; 0 selects a free one.
        allow_other_machines: permits a host that other machines can reach; they see every run, without a login.
        interval: seconds between two reads of the files while a page is open.
        on_listening: called once with the address of the page when connections are accepted.

    Raises:
        ConfigError: `runs_dir` is not a folder, others can reach the host and that is not permitted, or the address
            cannot be used.
    """
    running_loop()
    check_listening(host, port, on_listening)
    check_flag("allow_other_machines", allow_other_machines, error=ConfigError)
    folder = check_path("runs_dir", runs_dir, error=ConfigError)
    if not is_seconds(interval) or interval <= 0:
        raise ConfigError(f"interval must be a number of seconds > 0, got {shown(interval)}")
    if not is_loopback(host) and not allow_other_machines:
        raise ConfigError(
            f"other machines can reach host {host!r} and would see every run without a login: use 127.0.0.1, or "
            "permit it with allow_other_machines (--allow-other-machines)"
        )
    feed = Feed(folder, interval=interval)
    app = dashboard_app(feed, hosts=["*"]) if allow_other_machines else dashboard_app(feed)
    listener = listen(host, port)
    try:
        address = address_of(listener)
        await serve_app(
            app, listener, on_listening=lambda: on_listening(address), before_shutdown=feed.close, lifespan=True
        )
    finally:
        listener.close()
