"""`tinkex-py dashboard`: a page that follows the runs of a folder."""

from tinkex_py.dashboard.server import serve_dashboard

__all__ = ["serve_dashboard"]
