"""The raw client of the service's own tests."""

from tests.local.conftest import client, kit, one_compute_thread, run_service

__all__ = ["client", "kit", "one_compute_thread", "run_service"]
