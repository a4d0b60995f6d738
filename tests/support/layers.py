"""The ASGI layers around the embedded service's app."""

from typing import Any


def innermost(app: Any) -> Any:
    """The app with the routes."""
    while hasattr(app, "_app"):
        app = app._app
    return app
