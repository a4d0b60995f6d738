"""What a user holds."""

from tinkex_py.client.custom_step import CustomStepOptions
from tinkex_py.client.rest import AsyncRestClient
from tinkex_py.client.sampling import AsyncSamplingClient
from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.client.training import AsyncTrainingClient

__all__ = [
    "AsyncRestClient",
    "AsyncSamplingClient",
    "AsyncServiceClient",
    "AsyncTrainingClient",
    "CustomStepOptions",
]
