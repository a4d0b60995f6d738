"""Draws from a model."""

import itertools
from typing import Any

from tinkex_py.client.connection import Connection
from tinkex_py.errors import ClientClosed, InvalidData, InvalidResponse
from tinkex_py.transport.codec import read_sample
from tinkex_py.types import ModelInput, SampleResponse, SamplingParams


class AsyncSamplingClient:
    """Draws from one model or checkpoint. Made by a service or training client.

    Args:
        connection: the service.
        sampling_session_id: the service's handle of the model.
    """

    def __init__(self, connection: Connection, sampling_session_id: str) -> None:
        self.sampling_session_id = sampling_session_id
        self._connection = connection
        self._numbers = itertools.count()
        self._closed = False

    async def sample(
        self,
        prompt: ModelInput,
        *,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
    ) -> SampleResponse:
        """Draws sequences that continue a prompt.

        Args:
            prompt: what the model reads.
            num_samples: how many sequences, >= 1.
            sampling_params: how to draw; default is temperature 1 up to the service's length limit.
            include_prompt_logprobs: also tell the log-probability of every prompt token (the first has none).

        Raises:
            InvalidData: an empty prompt, or num_samples < 1.
            RequestFailed: the service failed the request.
        """
        if self._closed:
            raise ClientClosed("this sampling client is closed; make a new one")
        if not isinstance(prompt, ModelInput):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"prompt must be a ModelInput, got a {type(prompt).__name__}: see ModelInput.from_text")
        if prompt.length == 0:
            raise InvalidData("the prompt is empty; it needs at least one token")
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"num_samples must be an int >= 1, got {num_samples!r}")
        if sampling_params is not None and not isinstance(sampling_params, SamplingParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"sampling_params must be SamplingParams, got a {type(sampling_params).__name__}")
        params = sampling_params or SamplingParams()
        body: dict[str, Any] = {
            "sampling_session_id": self.sampling_session_id,
            "seq_id": next(self._numbers),
            "num_samples": num_samples,
            "prompt": prompt.model_dump(),
            "sampling_params": params.model_dump(exclude_none=True),
            "prompt_logprobs": include_prompt_logprobs,
            "type": "sample",
        }
        request_id = await self._connection.submit("/api/v1/asample", json=body)
        return await self._connection.result(request_id, "Sample", read_sample)

    async def compute_logprobs(self, prompt: ModelInput) -> list[float | None]:
        """Log-probability of every prompt token given those before it, `[N]`; the first is None."""
        response = await self.sample(prompt, sampling_params=SamplingParams(max_tokens=1), include_prompt_logprobs=True)
        return list(response.prompt_logprobs or [])

    async def aclose(self) -> None:
        """Makes the client unusable; closing twice is fine."""
        self._closed = True

    async def __aenter__(self) -> "AsyncSamplingClient":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()


async def new_sampling_client(
    connection: Connection, *, base_model: str | None = None, model_path: str | None = None
) -> AsyncSamplingClient:
    """Opens a sampling session for a base model or a checkpoint."""
    body: dict[str, Any] = {
        "session_id": connection.session_id,
        "sampling_session_seq_id": connection.next_sampler_number(),
        "type": "create_sampling_session",
    }
    if base_model is not None:
        body["base_model"] = base_model
    if model_path is not None:
        body["model_path"] = model_path
    answer = await connection.post("/api/v1/create_sampling_session", body)
    sampling_session_id = answer.get("sampling_session_id")
    if not isinstance(sampling_session_id, str):
        raise InvalidResponse("create_sampling_session was answered without a sampling_session_id")
    return AsyncSamplingClient(connection, sampling_session_id)
