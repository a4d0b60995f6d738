"""The raw client and the engine bench of the service's own tests."""

from tests.client.conftest import local_bench
from tests.local.conftest import bench, bench_with, client, kit, one_compute_thread, run_service

__all__ = ["bench", "bench_with", "client", "kit", "local_bench", "one_compute_thread", "run_service"]
