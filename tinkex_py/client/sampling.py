"""The sampling client: samples from one model."""

import itertools
from collections.abc import Mapping
from typing import Any

from tinkex_py.client.arguments import given
from tinkex_py.client.completions import SampleCompletions
from tinkex_py.client.queue_state import QueueWatch
from tinkex_py.client.sample_request import (
    asked_parts,
    check_counts,
    check_prompt,
    check_targets,
    missing_parts,
    params_as_json,
    with_the_first_score,
)
from tinkex_py.client.session import ClientSession
from tinkex_py.client.submission import json_result
from tinkex_py.client.unsupported import reported_as_unsupported
from tinkex_py.errors import ClientClosed, RateLimited, ResultLost, UnsupportedFeature
from tinkex_py.limits import running_loop
from tinkex_py.transport.api import is_retryable_status
from tinkex_py.transport.decoding import fields_of, read_sample, request_id_of, text_of
from tinkex_py.transport.messages import Response, encoded_json, request
from tinkex_py.transport.sample_gate import SampleGate
from tinkex_py.types import EncodedTextChunk, ModelInput, QueueState, SampleResponse, SamplingParams, TensorInput

# Estimated bytes of a prompt token in a request (protocol: 5.3).
_BYTES_PER_TOKEN = 10
# Number of repetitions after the service lost a result.
_MOST_LOST = 3
_PATH = "/api/v1/asample"


class AsyncSamplingClient:
    """Samples from one model or checkpoint. Created by a service or training client.

    Use `asyncio.gather` for many samples at once: the number in flight follows the limits of the service, and requests
    that it refuses with 429 are submitted again later.

    Args:
        session: the session with the service.
        sampling_session_id: id of the sampling session.
        record_stability_info: every sample asks the service to record what `stable_reinforce` needs.
    """

    def __init__(
        self, session: ClientSession, sampling_session_id: str, *, record_stability_info: bool = False
    ) -> None:
        self.sampling_session_id = sampling_session_id
        self._session = session
        self._always: dict[str, Any] = given(record_stability_info=record_stability_info or None)
        self._numbers = itertools.count()
        self._queue = QueueWatch(sampling_session_id, session.settings.on_queue_state)
        self._gate = SampleGate(
            session.sample_bytes,
            max_in_flight=session.config.sample_max_concurrent_requests,
            patience=session.settings.sampling_patience,
        )
        self._completions = SampleCompletions(session, sampling_session_id)
        self._closed = False

    @property
    def queue_state(self) -> QueueState:
        """The queue state that the service reported last."""
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
        """Samples sequences that continue a prompt of `N` tokens.

        Args:
            prompt: the prompt.
            num_samples: number of sequences, >= 1.
            sampling_params: sampling parameters; default is temperature 1 up to the length limit of the service.
            include_prompt_logprobs: return the logprob of every prompt token; the first has none.
            topk_prompt_logprobs: number of most likely tokens to return per prompt position.
            topk_sample_logprobs: number of most likely tokens to return per sampled position.
            target_prompt_logprobs: token ids `[N - 1, K]`, dense or CSR, to score: row `i` at prompt position `i + 1`;
                -1 is skipped.
            prompt_alt_tokens_k: number of alternatives to sample for every prompt token except the first.
            prompt_logprobs_last_n: score only this many tokens at the end of the prompt, 1 to `N - 1`.

        Raises:
            InvalidData: the prompt is empty, or a value is out of range.
            UnsupportedFeature: the service cannot do this, or its response lacks a requested part.
            RequestFailed: the request failed on the service.
            RateLimited: the service accepted no sample of this client for `sampling_patience` seconds.
        """
        if self._closed:
            raise ClientClosed("this sampling client is closed: create a new one")
        running_loop()
        check_prompt(prompt)
        counts = {
            "topk_prompt_logprobs": topk_prompt_logprobs,
            "topk_sample_logprobs": topk_sample_logprobs,
            "prompt_alt_tokens_k": prompt_alt_tokens_k,
        }
        numbers = check_counts(prompt, num_samples, counts, prompt_logprobs_last_n, scored=include_prompt_logprobs)
        body: dict[str, Any] = {
            "sampling_session_id": self.sampling_session_id,
            "prompt": prompt.model_dump(exclude_none=True),
            "sampling_params": params_as_json(sampling_params),
            "prompt_logprobs": include_prompt_logprobs,
            "type": "sample",
            **self._always,
            **numbers,
        }
        if target_prompt_logprobs is not None:
            body["target_prompt_logprobs"] = check_targets(prompt, target_prompt_logprobs)
        encoded_json(body, _PATH)  # before a number is taken
        host = self._session.api.host
        with reported_as_unsupported(host, " with ".join(["sampling", *asked_parts(body)])):
            response = await self._draw(body, cost=_cost(prompt))
        missing = missing_parts(response, body)
        if missing:
            raise UnsupportedFeature(f"{host} does not support all of this request: it omitted {', '.join(missing)}")
        return with_the_first_score(response, prompt.size.length)

    async def compute_logprobs(self, prompt: ModelInput) -> list[float | None]:
        """Returns the logprob of every prompt token given those before it, `[N]`; the first is None.

        Raises:
            UnsupportedFeature: the service returns no logprobs of prompts.
        """
        response = await self.sample(prompt, sampling_params=SamplingParams(max_tokens=1), include_prompt_logprobs=True)
        return list(response.prompt_logprobs or [])

    async def _draw(self, body: Mapping[str, Any], cost: int) -> SampleResponse:
        """Submits a request and waits for its result; repeats it under a new number if the result is lost."""
        async with self._gate.in_flight() as since:
            for lost in itertools.count(1):
                numbered = {**body, "seq_id": next(self._numbers)}
                request_id, accepted = await self._submit(numbered, cost, since)
                try:
                    async with self._completions.awaited(request_id):
                        response = await self._session.api.result(
                            request_id, "Sample", read_sample, self._queue.pending
                        )
                except ResultLost:
                    if lost > _MOST_LOST or self._session.config.sample_no_retries:
                        raise
                    continue
                self._queue.done()
                self._gate.progressed()
                return response.with_sequence_ids(_sequence_ids(accepted, request_id, len(response.sequences)))
        raise AssertionError("the loop above ends by returning or raising")

    async def _submit(self, numbered: Mapping[str, Any], cost: int, since: float) -> tuple[str, Mapping[str, Any]]:
        """Submits the same request until the service accepts it."""
        sent = request("POST", _PATH, json=numbered, headers={"X-Tinker-Sampling-Backpressure": "1"})
        while True:
            try:
                async with self._gate.submission(cost):
                    accepted = await self._session.api.send(sent, _accepted, retry_statuses=_is_retryable_sample)
            except RateLimited as error:
                await self._gate.turned_away(error, cost=cost, since=since)
            else:
                self._gate.progressed()
                return accepted

    async def aclose(self) -> None:
        """Makes the client unusable. Idempotent."""
        self._closed = True

    async def __aenter__(self) -> "AsyncSamplingClient":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()


async def new_sampling_client(
    session: ClientSession,
    base_model: str | None = None,
    model_path: str | None = None,
    *,
    record_stability_info: bool = False,
) -> AsyncSamplingClient:
    """Opens a sampling session on a checkpoint, or a base model, by default the only one.

    Raises:
        UnsupportedFeature: the service cannot sample.
        ConfigError: neither is given, and the service does not have exactly one model.
    """
    if model_path is not None:
        await session.models.check_any("sample")
    else:
        base_model = base_model or await session.models.only("sample")
        await session.models.check(base_model, "sample")
    body: dict[str, Any] = {
        "session_id": session.session_id,
        "sampling_session_seq_id": next(session.sampler_numbers),
        "type": "create_sampling_session",
        **given(base_model=base_model, model_path=model_path),
    }
    path = "/api/v1/create_sampling_session"
    with reported_as_unsupported(session.api.host, "create_sampling_session"):
        fields: Mapping[str, Any] = await session.api.send(request("POST", path, json=body), fields_of)
        if "sampling_session_id" not in fields and "request_id" in fields:  # hatchery returns a future
            fields = await json_result(session.api, str(fields["request_id"]), "CreateSamplingSession")
    sampling_session_id = text_of(fields, "sampling_session_id", path)
    return AsyncSamplingClient(session, sampling_session_id, record_stability_info=record_stability_info)


def _cost(prompt: ModelInput) -> int:
    """Returns the estimated bytes of a prompt."""
    return sum(
        _BYTES_PER_TOKEN * chunk.length if isinstance(chunk, EncodedTextChunk) else chunk.stored_bytes
        for chunk in prompt.chunks
    )


def _is_retryable_sample(status: int) -> bool:
    # Samples that the service refuses with 429 wait in the gate.
    return status != 429 and is_retryable_status(status)


def _accepted(response: Response) -> tuple[str, Mapping[str, Any]]:
    return request_id_of(response), fields_of(response)


def _sequence_ids(accepted: Mapping[str, Any], request_id: str, count: int) -> list[str]:
    """Returns the service's ids of the sequences; older services have none."""
    given: object = accepted.get("sample_sequence_ids")
    if isinstance(given, list) and len(given) == count and all(isinstance(name, str) for name in given):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return [str(name) for name in given]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return [f"{request_id}:{index}" for index in range(count)]
