"""Services that normalize, made of the embedded service, which sums.

SkyRL's JAX backend divides each sequence's loss by the sum of its weights (by its length where it has none), and the
gradient by the number of sequences since the last optimizer step. The layer does the first in the passes on their way
in, and the second in the optimizer step: with an eps far above every gradient Adam's step is proportional to learning
rate times gradient, so dividing the learning rate is dividing the gradient.

hatchery-core divides the loss of each request by the sum of its weights (by its tokens where it has none), if that is
above 1.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.client.recorder import PASS_PATH, Arrival, Fault, Recorder, Send, Serve
from tinkex_py import AdamParams
from tinkex_py.transport import wire

# The gradients of these tests are below 1e3.
LINEAR = AdamParams(learning_rate=300.0, eps=1e6)


def divide(numbers: wire.Tensor, divisor: float) -> None:
    values = np.frombuffer(numbers.dense, "<f4").astype(np.float64)
    numbers.dense = (values / divisor).astype("<f4").tobytes()


@dataclass
class Normalizing:
    """The layer.

    Attributes:
        app: the embedded service.
        sequences: datums of the backward passes since the last optimizer step, by model.
    """

    app: Any
    sequences: Counter[str] = field(default_factory=Counter[str])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        change = {PASS_PATH: self.normalized_pass, "/api/v1/optim_step": self.normalized_step}.get(scope["path"])
        if change is None:
            await self.app(scope, receive, send)
            return
        event = await receive()
        body = change(event["body"])
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        events = [{"type": "http.request", "body": body, "more_body": False}]
        await self.app(scope, lambda: give(events, receive), send)

    def normalized_pass(self, body: bytes) -> bytes:
        message = wire.ForwardBackwardRequest.FromString(body)
        if message.forward_only:
            return body
        self.sequences[message.model_id] += len(message.data)
        for datum in message.data:
            inputs = datum.loss_fn_inputs
            if "weights" in inputs:
                total = np.frombuffer(inputs["weights"].dense, "<f4").sum()
                divide(inputs["weights"], max(float(total), 1e-9))
            else:
                divide(inputs["advantages"], len(inputs["advantages"].dense) // 4)
        return message.SerializeToString()

    def normalized_step(self, body: bytes) -> bytes:
        fields = json.loads(body)
        if "adam_params" in fields:
            fields["adam_params"]["learning_rate"] /= max(self.sequences.pop(fields["model_id"], 0), 1)
        return json.dumps(fields).encode()


class NormalizingByRequest(Normalizing):
    """The layer for hatchery-core."""

    def normalized_pass(self, body: bytes) -> bytes:
        message = wire.ForwardBackwardRequest.FromString(body)
        if message.forward_only:
            return body
        name = "advantages" if message.loss_fn == "importance_sampling" else "weights"
        numbers = [datum.loss_fn_inputs[name] for datum in message.data]
        values = np.concatenate([np.frombuffer(item.dense, "<f4") for item in numbers])
        for item in numbers:
            divide(item, max(float(values.sum()) if name == "weights" else values.size, 1.0))
        return message.SerializeToString()

    def normalized_step(self, body: bytes) -> bytes:
        return body


async def give(events: list[Any], receive: Any) -> Any:
    return events.pop() if events else await receive()


def rewriting(change: Callable[[wire.ForwardBackwardOutput], None]) -> Fault:
    """Changes the results of passes on their way out."""

    async def fault(arrival: Arrival, serve: Serve, send: Send) -> None:
        events: list[Any] = []

        async def hold(event: Any) -> None:
            events.append(event)

        await serve(hold)
        headers = dict(events[0]["headers"])
        if headers[b"content-type"] == b"application/x-protobuf":
            message = wire.ForwardBackwardOutput.FromString(b"".join(event["body"] for event in events[1:]))
            change(message)
            body = message.SerializeToString()
            headers[b"content-length"] = str(len(body)).encode()
            events = [{**events[0], "headers": list(headers.items())}, {"type": "http.response.body", "body": body}]
        arrival.status = events[0]["status"]
        for event in events:
            await send(event)

    return fault


def as_skyrl(message: wire.ForwardBackwardOutput) -> None:
    """No metrics, and an elementwise loss beside the logprobs."""
    message.loss_fn_output_type = "scalar"
    message.metrics.clear()
    for record in message.loss_fn_outputs:
        kept = {"logprobs", "elementwise_loss"}
        record.fields["elementwise_loss"].CopyFrom(record.fields["logprobs"])
        for name in set(record.fields) - kept:
            del record.fields[name]


def as_hatchery(message: wire.ForwardBackwardOutput) -> None:
    """A forward pass knows no loss. That of a backward pass plays no role here."""
    message.metrics.update({"loss:sum": 0.0, "loss:mean": 0.0, "num_tokens:sum": 0.0, "accum_steps:mean": 0.0})


def answers_like_hatchery(recorder: Recorder) -> None:
    """The same for hatchery-core."""
    recorder.app = NormalizingByRequest(recorder.app)
    recorder.always["retrieve_future"] = rewriting(as_hatchery)


def answers_like_skyrl(recorder: Recorder) -> None:
    """Makes the service behind a recorder normalize, and answer so that it is recognised."""
    recorder.app = Normalizing(recorder.app)
    recorder.always["retrieve_future"] = rewriting(as_skyrl)
