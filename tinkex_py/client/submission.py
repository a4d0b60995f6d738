"""What a turn hands over to the wire, and what became of it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from tinkex_py.client.accumulation import Accumulation, GradientCall
from tinkex_py.client.queue_state import QueueWatch
from tinkex_py.errors import InvalidResponse, RequestFailed
from tinkex_py.transport.api import Sent, ServiceApi
from tinkex_py.transport.decoding import Result
from tinkex_py.transport.encoding import PROTOBUF
from tinkex_py.transport.messages import encoded_json, request

Value_co = TypeVar("Value_co", covariant=True)


class Submission(Protocol[Value_co]):
    """What a turn hands over."""

    async def prepare(self) -> int:
        """Does all that may fail before a number is taken; gives how many consecutive numbers are needed."""
        ...

    def handed_over(self) -> None:
        """Called when the numbers are taken, before anything else can run."""
        ...

    async def submit(self, numbers: Sequence[int]) -> Sequence[Sent]:
        """Sends the same bytes under these numbers until there is a final response to each.

        Raises:
            APIStatusError, TransportError: it is unknown whether a number arrived.
        """
        ...

    def submitted(self, sent: Sequence[Sent]) -> None:
        """Called with the final responses, even where the caller has left."""
        ...

    async def result(self, sent: Sequence[Sent]) -> Value_co:
        """Waits for the result."""
        ...


class NumberedRequest:
    """A request without datums.

    Args:
        api: the service.
        model_id: the model.
        endpoint: where it goes.
        body: its fields.
        request_type: what the service calls its result.
        queue: gets what the service says about its queue.
    """

    def __init__(
        self,
        api: ServiceApi,
        model_id: str,
        endpoint: str,
        body: Mapping[str, Any],
        request_type: str,
        queue: QueueWatch,
    ) -> None:
        self._api = api
        self._path = f"/api/v1/{endpoint}"
        self._body = {"model_id": model_id, **body}
        self._request_type = request_type
        self._queue = queue

    async def prepare(self) -> int:
        """Checks the body and the key: what cannot be sent must not leave a gap."""
        encoded_json(self._body, self._path)
        await self._api.auth.current()
        return 1

    def handed_over(self) -> None:
        """Nothing follows from it."""

    async def submit(self, numbers: Sequence[int]) -> Sequence[Sent]:
        """See `Submission.submit`."""
        (number,) = numbers
        numbered = request("POST", self._path, json={**self._body, "seq_id": number})
        return [await self._api.submit(number, numbered)]

    def submitted(self, sent: Sequence[Sent]) -> None:
        """Nothing follows from it."""

    async def result(self, sent: Sequence[Sent]) -> Mapping[str, Any]:
        """The fields of the result.

        Raises:
            APIStatusError: the service refused the request.
            RequestFailed: it failed it.
        """
        (one,) = sent
        if one.refusal is not None:
            raise one.refusal
        return await json_result(self._api, one.request_id, self._request_type, self._queue)


class OptimizerRequest(NumberedRequest):
    """An optim_step: it uses up the gradients, unless the service refuses or fails it.

    Args:
        accumulation: the gradients.
    """

    def __init__(
        self, api: ServiceApi, model_id: str, body: Mapping[str, Any], queue: QueueWatch, accumulation: Accumulation
    ) -> None:
        super().__init__(api, model_id, "optim_step", body, "OptimStep", queue)
        self._accumulation = accumulation
        self._taken: list[GradientCall] = []

    async def prepare(self) -> int:
        """Checks that the gradients, which are all handed over by now, fit what the service divides by.

        Raises:
            SurrogateMismatch: they do not.
        """
        self._accumulation.check_divisor()
        return await super().prepare()

    def handed_over(self) -> None:
        """Takes the gradients."""
        self._taken = self._accumulation.take()

    def submitted(self, sent: Sequence[Sent]) -> None:
        """Moves the weights of regularizers, or gives the gradients back."""
        if sent[0].refusal is None:
            self._accumulation.end_step(self._taken)
        else:
            self._accumulation.put_back(self._taken)

    async def result(self, sent: Sequence[Sent]) -> Mapping[str, Any]:
        """As for every numbered request; a step that the service failed has applied nothing."""
        try:
            return await super().result(sent)
        except RequestFailed:
            self._accumulation.put_back(self._taken)
            raise


async def json_result(
    api: ServiceApi, request_id: str, request_type: str, queue: QueueWatch | None = None
) -> Mapping[str, Any]:
    """Waits for a future whose result is a JSON object."""

    def fields_of_result(result: Result) -> Mapping[str, Any]:
        if result.fields is None:
            raise InvalidResponse(f"the result of {request_type} must be JSON, but came as {PROTOBUF}")
        return result.fields

    fields = await api.result(request_id, request_type, fields_of_result, None if queue is None else queue.pending)
    if queue is not None:
        queue.done()
    return fields
