"""`tinkex-py dashboard`: a page that shows the runs of a folder, during and after training."""

from tinkex_py.dashboard.server import serve_dashboard

__all__ = ["serve_dashboard"]
