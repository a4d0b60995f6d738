"""What runs need: a service with a recorder in front, and one torch thread."""

from tests.client.conftest import bench, local_bench, one_torch_thread  # noqa: F401
