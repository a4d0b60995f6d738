"""Draws from a model."""

import itertools
from collections.abc import Mapping
from typing import Any

from tinkex_py.client.connection import Connection, has_request_id, request_id_of, text_of
from tinkex_py.client.queue import QueueWatch
from tinkex_py.client.refusals import told_as_unsupported
from tinkex_py.client.sample_request import (
    asked_parts,
    check_counts,
    check_prompt,
    check_targets,
    missing_parts,
    params_as_json,
    with_the_first_score,
)
from tinkex_py.errors import ClientClosed, RateLimited, ResultLost, UnsupportedFeature
from tinkex_py.transport.request import encoded_json
from tinkex_py.transport.retry import is_retryable_status
from tinkex_py.transport.sample_codec import read_sample
from tinkex_py.transport.sample_gate import SampleGate
from tinkex_py.types import ModelInput, QueueState, SampleResponse, SamplingParams, TensorInput

# Estimated bytes of a prompt's token in a request (protocol: 5.3).
_BYTES_PER_TOKEN = 10
# A result that the service lost is asked for so many times more.
_MOST_LOST = 3
_PATH = "/api/v1/asample"


class AsyncSamplingClient:
    """Draws from one model or checkpoint. Made by a service or training client.

    Ask for many samples at once with `asyncio.gather`: as many are in flight as the service wants, and those that it
    turns away (429) wait and are submitted again.

    Args:
        connection: the service.
        sampling_session_id: the service's handle of the model.
    """

    def __init__(self, connection: Connection, sampling_session_id: str) -> None:
        self.sampling_session_id = sampling_session_id
        self._connection = connection
        self._numbers = itertools.count()
        self._queue = QueueWatch(sampling_session_id, connection.config.on_queue_state)
        self._gate = SampleGate(
            connection.sample_bytes,
            max_in_flight=connection.flags.sample_max_concurrent_requests,
            patience=connection.config.sampling_patience,
        )
        self._closed = False

    @property
    def queue_state(self) -> QueueState:
        """Whether the service works on this client's samples, as it said last."""
        return self._queue.state

    async def sample(
        self,
        prompt: ModelInput,
        *,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorInput | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> SampleResponse:
        """Draws sequences that continue a prompt of `N` tokens.

        Args:
            prompt: what the model reads.
            num_samples: how many sequences, >= 1.
            sampling_params: how to draw; default is temperature 1 up to the service's length limit.
            include_prompt_logprobs: also tell the log-probability of every prompt token (the first has none).
            topk_prompt_logprobs: also tell so many of the likeliest tokens at every prompt position.
            topk_sample_logprobs: also tell so many of the likeliest tokens at every drawn position.
            target_prompt_logprobs: token ids `[N - 1, K]`, dense or CSR, whose logprobs are wanted: row `i` is scored
                at prompt position `i + 1`; -1 asks for nothing.
            prompt_alt_tokens_k: also draw so many alternatives to every prompt token after the first.
            prompt_logprobs_last_n: score only so many tokens at the end of the prompt, 1 to `N - 1`.

        Raises:
            InvalidData: an empty prompt, or a value out of range.
            UnsupportedFeature: the service cannot do it, or left out what was asked for.
            RequestFailed: the service failed the request.
            RateLimited: the service took no sample of this client for `sampling_patience` seconds.
        """
        if self._closed:
            raise ClientClosed("this sampling client is closed; make a new one")
        check_prompt(prompt)
        counts = {
            "topk_prompt_logprobs": topk_prompt_logprobs,
            "topk_sample_logprobs": topk_sample_logprobs,
            "prompt_alt_tokens_k": prompt_alt_tokens_k,
        }
        check_counts(prompt, num_samples, counts, prompt_logprobs_last_n, scored=include_prompt_logprobs)
        body: dict[str, Any] = {
            "sampling_session_id": self.sampling_session_id,
            "num_samples": num_samples,
            "prompt": prompt.model_dump(),
            "sampling_params": params_as_json(sampling_params),
            "prompt_logprobs": include_prompt_logprobs,
            "type": "sample",
            # Asked for only where wanted: services that are strict and older do not know these fields.
            **{name: count for name, count in counts.items() if count},
        }
        if target_prompt_logprobs is not None:
            body["target_prompt_logprobs"] = check_targets(prompt, target_prompt_logprobs)
        if prompt_logprobs_last_n is not None:
            body["prompt_logprobs_last_n"] = prompt_logprobs_last_n
        encoded_json(body, _PATH)  # before a number is taken
        host = self._connection.http.host
        with told_as_unsupported(host, " with ".join(["sample", *asked_parts(body)])):
            response = await self._draw(body, cost=_BYTES_PER_TOKEN * prompt.length)
        missing = missing_parts(response, body)
        if missing:
            raise UnsupportedFeature(f"{host} cannot do this: the service left out {', '.join(missing)}")
        return with_the_first_score(response, prompt.length)

    async def compute_logprobs(self, prompt: ModelInput) -> list[float | None]:
        """Log-probability of every prompt token given those before it, `[N]`; the first is None.

        Raises:
            UnsupportedFeature: the service tells no logprobs of prompts.
        """
        response = await self.sample(prompt, sampling_params=SamplingParams(max_tokens=1), include_prompt_logprobs=True)
        return list(response.prompt_logprobs or [])

    async def _draw(self, body: Mapping[str, Any], cost: int) -> SampleResponse:
        """A result that the service lost is asked for again, under a new number."""
        async with self._gate.in_flight() as since:
            for lost in itertools.count(1):
                numbered = {**body, "seq_id": next(self._numbers)}
                answer = await self._submit(numbered, cost, since)
                request_id = request_id_of(answer, _PATH)
                try:
                    response = await self._connection.result(request_id, "Sample", read_sample, self._queue)
                except ResultLost:
                    if lost > _MOST_LOST or self._connection.flags.sample_no_retries:
                        raise
                    continue
                self._gate.progressed()
                return response.with_sequence_ids(_sequence_ids(answer, request_id, len(response.sequences)))
        raise AssertionError("the loop above ends by returning or raising")

    async def _submit(self, numbered: Mapping[str, Any], cost: int, since: float) -> dict[str, Any]:
        """The same request until the service takes it."""
        while True:
            try:
                async with self._gate.submission(cost):
                    answer = await self._connection.request(
                        "POST",
                        _PATH,
                        json=numbered,
                        headers={"X-Tinker-Sampling-Backpressure": "1"},
                        retry_statuses=lambda status: status != 429 and is_retryable_status(status),
                        check=has_request_id(_PATH),
                    )
            except RateLimited as error:
                await self._gate.turned_away(error, cost=cost, since=since)
            else:
                self._gate.progressed()
                return answer

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
    """Opens a sampling session for a base model or a checkpoint.

    Raises:
        UnsupportedFeature: the service cannot sample.
    """
    if base_model is None:
        await connection.models.check_any("sample")
    else:
        await connection.models.check(base_model, "sample")
    body: dict[str, Any] = {
        "session_id": connection.session_id,
        "sampling_session_seq_id": connection.next_sampler_number(),
        "type": "create_sampling_session",
    }
    if base_model is not None:
        body["base_model"] = base_model
    if model_path is not None:
        body["model_path"] = model_path
    path = "/api/v1/create_sampling_session"
    with told_as_unsupported(connection.http.host, "create_sampling_session"):
        answer = await connection.post(path, body)
        if "sampling_session_id" not in answer and "request_id" in answer:  # hatchery answers with a future
            answer = await connection.fields(request_id_of(answer, path), "CreateSamplingSession")
    return AsyncSamplingClient(connection, text_of(answer, "sampling_session_id", path))


def _sequence_ids(answer: Mapping[str, Any], request_id: str, count: int) -> list[str]:
    """The service's names of the sequences; older services give none."""
    told: object = answer.get("sample_sequence_ids")
    if isinstance(told, list) and len(told) == count and all(isinstance(name, str) for name in told):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return [str(name) for name in told]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return [f"{request_id}:{index}" for index in range(count)]
