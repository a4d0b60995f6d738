"""A custom step: forward pass, terms, and the backward pass that carries their gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinkex_py.client.carrier import (
    Carrier,
    Surrogate,
    advantages_of,
    check_sequences,
    divisors,
    has_candidates,
    measuring_sample,
    measuring_weights,
)
from tinkex_py.client.model_requests import ModelRequests, or_break
from tinkex_py.client.steps import OptimizerSteps
from tinkex_py.client.submission import count_numbers, encode_custom_chunks, replace_by_advantages, write_weights
from tinkex_py.errors import (
    APIStatusError,
    InvalidResponse,
    PartialFailure,
    PipelineError,
    RequestFailed,
    ResultLost,
)
from tinkex_py.transport.codec import EncodedBatch
from tinkex_py.transport.place import Place
from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor
from tinkex_py.types.tensors import Array

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.pipeline import Pipeline
    from tinkex_py.losses.recording import RecordPath


@dataclass(frozen=True)
class CustomStep:
    """One custom step whose terms run on the client.

    Attributes:
        requests: of the training client.
        steps: its optimizer steps.
        place: the step's place in the lane.
        pipeline: the loss.
        surrogate: the service's loss that is to carry the gradient.
        sequences_per_step: datums of all calls up to the next optimizer step; None is this step's.
        overlap: the forward pass may go out while the step before this one still runs its terms.
        record: where to write what the terms see.
    """

    requests: ModelRequests
    steps: OptimizerSteps
    place: Place
    pipeline: "Pipeline"
    surrogate: Surrogate
    sequences_per_step: int | None
    overlap: bool
    record: "RecordPath | None"

    async def run(self, data: Sequence[Datum], handed_over: Callable[[], None]) -> "CustomLossOutput":
        """Runs it.

        Args:
            data: the datums.
            handed_over: called at the hand-over of the gradient, before anything else can run.
        """
        chunks = await self.requests.custom_chunks(data, self.place, early=self.overlap)
        count = sum(len(chunk.data) for chunk in chunks)
        sequences = await or_break(lambda: check_sequences(self.sequences_per_step, count))
        forward, carrier = await self._forward(chunks)
        await self.place.turn_of_terms()
        output, gradient = await self._evaluate(forward, chunks)
        carried = await self._carried(chunks, gradient, forward, carrier, sequences)

        def on_hand_over() -> None:
            self.steps.add(self.pipeline.controllers, output)
            handed_over()

        try:
            service_output = await self.requests.run_backward(
                self.place,
                carried,
                carrier.loss_fn,
                {},
                handed_over=on_hand_over,
                scaled_for=sequences if carrier.divides == "sequences" else None,
            )
        except (APIStatusError, RequestFailed) as error:
            if not isinstance(error, PartialFailure | ResultLost):  # of these the service may hold something
                self.steps.discard(self.pipeline.controllers, output)
            raise
        return output.with_service(service_output)

    async def _forward(self, chunks: Sequence[EncodedBatch]) -> tuple[ForwardBackwardOutput, Carrier]:
        """The forward pass, and the loss that is to carry the gradient back.

        Raises:
            UnsupportedFeature: no loss of the service carries the gradient of these datums.
        """
        # A step before this one may have learnt what the service does.
        await (self.place.early_turn() if self.overlap else self.place.turn())
        connection = self.requests.connection
        data = _data_of(chunks)
        carrier: Carrier | None = await or_break(lambda: connection.carrier.for_step(self.surrogate))
        if carrier is None and has_candidates(data):
            sample = await encode_custom_chunks(measuring_sample(data), connection)
            _, carrier = await self._forward(sample)
        if carrier is not None and carrier.loss_fn == "importance_sampling":
            await or_break(lambda: connection.carrier.check_targets(data))
        if carrier is not None:
            return await self._run_forward(chunks), carrier
        weights = measuring_weights(count_numbers(chunks))
        await write_weights(chunks, weights, connection.threads)
        forward = await self._run_forward(chunks)
        return forward, connection.carrier.learn(forward, _logprobs_of(forward, data), weights)

    async def _run_forward(self, chunks: Sequence[EncodedBatch]) -> ForwardBackwardOutput:
        return await self.requests.run_forward(self.place, chunks, of_step=True, early=self.overlap)

    async def _evaluate(
        self, forward: ForwardBackwardOutput, chunks: Sequence[EncodedBatch]
    ) -> "tuple[CustomLossOutput, Array]":
        from tinkex_py.losses.logprobs import Logprobs

        self.steps.check()
        # As they were sent: the caller's list may have changed since.
        data = _data_of(chunks)
        with self.place.running_terms():
            loss = await self.pipeline.evaluate(
                data,
                Logprobs.from_packed(_logprobs_of(forward, data)),
                step=self.steps.made,
                workers=self.requests.connection.threads,
                group=self.requests,
                record=self.record,
            )
        if not loss.differentiable:
            raise PipelineError(
                "no term depends on the logprobs, so there is nothing to train on; nothing was sent. A loss loses its "
                "path to the logprobs through detach(), numpy(), torch.no_grad() or torch.tensor(x)"
            )
        return loss.output, loss.gradient.reshape(-1).numpy()

    async def _carried(
        self,
        chunks: Sequence[EncodedBatch],
        gradient: Array,
        forward: ForwardBackwardOutput,
        carrier: Carrier,
        sequences: int,
    ) -> Sequence[EncodedBatch]:
        """The datums with the numbers that make the service arrive at the gradient."""
        threads = self.requests.connection.threads
        if carrier.loss_fn == "cross_entropy":
            await write_weights(chunks, -gradient, threads)
            return chunks
        logprobs = forward.packed["logprobs"]
        divided_by = divisors(carrier, [chunk.data for chunk in chunks], sequences)
        advantages = advantages_of(gradient, logprobs, divided_by)
        return await replace_by_advantages(chunks, logprobs.values, advantages, threads)


def _data_of(chunks: Sequence[EncodedBatch]) -> list[Datum]:
    return [datum for chunk in chunks for datum in chunk.data]


def _logprobs_of(forward: ForwardBackwardOutput, data: Sequence[Datum]) -> PackedTensor:
    """The logprobs of a forward pass, shaped like the targets.

    Raises:
        InvalidResponse: they are missing, or shaped otherwise.
    """
    packed = forward.packed.get("logprobs")
    if packed is None or len(packed) != len(data):
        raise InvalidResponse(f"the forward pass gave no logprobs for each of {len(data)} datums")
    if packed.dtype.kind != "f":
        raise InvalidResponse(f"the forward pass gave logprobs of dtype {packed.dtype}, not float32")
    expected = [datum.loss_fn_inputs["target_tokens"].shape for datum in data]
    if packed.shapes != expected:
        index = next(index for index, shape in enumerate(packed.shapes) if shape != expected[index])
        raise InvalidResponse(
            f"logprobs of datum {index} have shape {packed.shapes[index]}, its target_tokens {expected[index]}"
        )
    return packed
