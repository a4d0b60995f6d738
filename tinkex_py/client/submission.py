"""Submissions without datums: optimizer steps, checkpoints and other numbered requests."""

from collections.abc import Mapping, Sequence
from typing import Any

from tinkex_py.client.accumulation import Accumulation, GradientCall
from tinkex_py.client.ordering import Submission
from tinkex_py.client.queue_state import QueueWatch
from tinkex_py.errors import InvalidResponse, RequestFailed
from tinkex_py.transport.api import Sent, ServiceApi
from tinkex_py.transport.decoding import Result
from tinkex_py.transport.encoding import PROTOBUF
from tinkex_py.transport.messages import encoded_json, request


class NumberedRequest(Submission[Mapping[str, Any]]):
    """A request without datums; its result is the fields of a JSON object.

    Args:
        api: the service.
        model_id: id of the model.
        endpoint: last part of the request's path, which is also its type.
        body: fields of the request besides model, type and number.
        queue: receives the queue states that the service reports.
    """

    def __init__(
        self, api: ServiceApi, model_id: str, endpoint: str, body: Mapping[str, Any], queue: QueueWatch
    ) -> None:
        self._api = api
        self._path = f"/api/v1/{endpoint}"
        self._body = {"model_id": model_id, "type": endpoint, **body}
        self._request_type = endpoint.title().replace("_", "")  # such as SaveWeights
        self._queue = queue

    async def prepare(self) -> int:
        """Checks the body and the key: a request that cannot be sent must not leave a gap in the numbers."""
        encoded_json(self._body, self._path)
        await self._api.auth.current()
        return 1

    async def submit(self, numbers: Sequence[int]) -> Sequence[Sent]:
        """Sends the request under its number."""
        (number,) = numbers
        numbered = request("POST", self._path, json={**self._body, "seq_id": number})
        return [await self._api.submit(number, numbered)]

    async def result(self, sent: Sequence[Sent]) -> Mapping[str, Any]:
        """Returns the fields of the result.

        Raises:
            APIStatusError: the service refused the request.
            RequestFailed: the request failed on the service.
        """
        (one,) = sent
        if one.refusal is not None:
            raise one.refusal
        return await json_result(self._api, one.request_id, self._request_type, self._queue)


class OptimizerRequest(NumberedRequest):
    """An optim_step: it consumes the accumulated gradients unless the service refuses it or it fails there."""

    def __init__(
        self, api: ServiceApi, model_id: str, body: Mapping[str, Any], queue: QueueWatch, accumulation: Accumulation
    ) -> None:
        super().__init__(api, model_id, "optim_step", body, queue)
        self._accumulation = accumulation
        self._taken: list[GradientCall] = []

    async def prepare(self) -> int:
        """Checks the scale of the gradients, all of which are handed over by now.

        Raises:
            SurrogateMismatch: they are scaled for another number of datums than the service holds.
        """
        self._accumulation.check_divisor()
        return await super().prepare()

    def handed_over(self) -> None:
        """Takes the accumulated gradients."""
        self._taken = self._accumulation.take()

    def submitted(self, sent: Sequence[Sent]) -> None:
        """Updates the weights of regularizers, or gives the gradients back."""
        if sent[0].refusal is None:
            self._accumulation.end_step(self._taken)
        else:
            self._accumulation.put_back(self._taken)

    async def result(self, sent: Sequence[Sent]) -> Mapping[str, Any]:
        """Returns the fields of the result; gives the gradients back if the step failed on the service."""
        try:
            return await super().result(sent)
        except RequestFailed:
            self._accumulation.undo_step(self._taken)
            raise


async def json_result(
    api: ServiceApi, request_id: str, request_type: str, queue: QueueWatch | None = None
) -> Mapping[str, Any]:
    """Waits for a future whose result is a JSON object."""

    def fields_of_result(result: Result) -> Mapping[str, Any]:
        if result.fields is None:
            raise InvalidResponse(f"the result of {request_type} must be JSON, got {PROTOBUF}")
        return result.fields

    fields = await api.result(request_id, request_type, fields_of_result, None if queue is None else queue.pending)
    if queue is not None:
        queue.done()
    return fields
