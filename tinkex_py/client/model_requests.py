"""Sends one model's requests in their order, and counts what the service holds of them."""

import asyncio
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tinkex_py import telemetry
from tinkex_py.client.carrier import HeldCall, HeldSequences
from tinkex_py.client.connection import Connection
from tinkex_py.client.queue import QueueWatch
from tinkex_py.client.submission import Batch, ChunkedPass, Sent, encode_custom_chunks, planned_chunks
from tinkex_py.client.training_data import check_data, check_finite, check_inputs, check_loss
from tinkex_py.errors import APIStatusError, PartialFailure, RequestFailed, ResultLost, TinkexError
from tinkex_py.transport.codec import EncodedBatch, LossConfig, PlannedBatch
from tinkex_py.transport.lane import Lane, is_undecided
from tinkex_py.transport.place import Kind, Place
from tinkex_py.transport.request import encoded_json
from tinkex_py.types import Datum, ForwardBackwardOutput

Value = TypeVar("Value")

# How the embedded service says that a number never came.
_GAP = re.compile(r"seq_id \d{1,18} waits for seq_id (\d{1,18})")


async def or_break(build: Callable[[], Value]) -> Value:
    """Runs a check of the input; requests that were started together with a bad one are to see its failure."""
    try:
        return build()
    except Exception:
        await asyncio.sleep(0)
        raise


class ModelRequests:
    """The requests of one training client.

    Args:
        connection: the service.
        model_id: the model.

    Attributes:
        lane: their order.
        queue: what the service says about its queue.
        held: the gradient calls since the last optimizer step.
    """

    def __init__(self, connection: Connection, model_id: str) -> None:
        self.connection = connection
        self.model_id = model_id
        self.lane = Lane()
        self.held = HeldSequences()
        self.queue = QueueWatch(model_id, connection.config.on_queue_state, self._check_gap)
        connection.lanes.add(self.lane)

    def _check_gap(self, reason: str) -> None:
        gap = _GAP.search(reason)
        if gap is not None:
            self.lane.check_gap(int(gap[1]))

    @contextmanager
    def request(self, kind: Kind, operation: str, *, forward_only: bool = False) -> Generator[Place]:
        """A place in the lane around one request; its errors tell what the service already holds."""
        place = self.lane.enter(kind, forward_only=forward_only)
        try:
            with telemetry.lifecycle("tinkex.training", {"operation": operation, "model_id": self.model_id}):
                yield place
        except TinkexError as error:
            if kind is not Kind.READ:
                error.accumulated = self.lane.accumulated
            if isinstance(error, ResultLost):
                place.forgotten()
            if isinstance(error, RequestFailed) and kind is not Kind.READ:
                error.handed_over = tuple(place.fail_on_service())
                if error.handed_over:
                    error.add_note(
                        f"requests {list(error.handed_over)} had been handed over already and may be executed"
                    )
            raise
        finally:
            place.leave()

    async def chunks(self, data: Sequence[Datum], loss_fn: str, config: LossConfig) -> list[PlannedBatch]:
        """Checked datums in the chunks that the service takes.

        Raises:
            InvalidData: they cannot be used.
        """
        return planned_chunks(await self._checked(data, loss_fn, config, fields=None), self.connection)

    async def custom_chunks(self, data: Sequence[Datum], place: Place, *, early: bool) -> list[EncodedBatch]:
        """Checked datums of a custom step, laid out when it can go out: of steps that wait there are no bytes yet.

        Args:
            data: the datums.
            place: the step's.
            early: as for `run_forward`.

        Raises:
            InvalidData: they cannot be used.
        """
        datums = await self._checked(data, "cross_entropy", {}, fields=("weights",))
        await (place.early_turn() if early else place.turn())
        return await encode_custom_chunks(datums, self.connection)

    async def _checked(
        self, data: Sequence[Datum], loss_fn: str, config: LossConfig, *, fields: Sequence[str] | None
    ) -> Sequence[Datum]:

        def checked() -> Sequence[Datum]:
            datums = check_data(data)
            check_loss(loss_fn, config)
            check_inputs(datums, loss_fn)
            return datums

        datums = await or_break(checked)
        dialect = await self.connection.dialect()
        if not dialect.holds_any_number:
            await or_break(lambda: check_finite(datums, config, fields=fields))
        return datums

    async def run_forward(
        self,
        place: Place,
        chunks: Sequence[Batch],
        loss_fn: str = "cross_entropy",
        config: LossConfig | None = None,
        *,
        of_step: bool = False,
        early: bool = False,
    ) -> ForwardBackwardOutput:
        """A pass that changes nothing.

        Args:
            place: the request's.
            chunks: its datums.
            loss_fn: the service's loss.
            config: its settings.
            of_step: a backward pass of this request will follow.
            early: it may go out while the step before this one still runs, see `Place.early_turn`.
        """
        chunked = await self._chunked_pass(place, chunks, loss_fn, config or {}, forward_only=True, keep_graph=of_step)
        sent = await place.submit(len(chunks), chunked.send, last=not of_step, early=early)
        return await chunked.result(sent)

    async def run_backward(
        self,
        place: Place,
        chunks: Sequence[Batch],
        loss_fn: str,
        config: LossConfig,
        *,
        handed_over: Callable[[], None] | None = None,
        scaled_for: int | None = None,
    ) -> ForwardBackwardOutput:
        """A pass that adds a gradient.

        Args:
            place: the request's.
            chunks: its datums.
            loss_fn: the service's loss.
            config: its settings.
            handed_over: called at hand-over, before anything else can run.
            scaled_for: see `HeldCall.promised`.
        """
        chunked = await self._chunked_pass(place, chunks, loss_fn, config, forward_only=False, keep_graph=False)
        held = HeldCall(sum(len(chunk.data) for chunk in chunks), scaled_for)

        def on_hand_over() -> None:
            self.lane.accumulated += 1
            self.held.calls.append(held)
            if handed_over is not None:
                handed_over()

        async def send(numbers: Sequence[int]) -> list[Sent]:
            try:
                sent = await chunked.send(numbers)
            except APIStatusError as error:
                if not is_undecided(error):
                    self.lane.accumulated -= 1
                    held.datums = 0
                raise
            held.datums = _accepted(chunks, sent)
            return sent

        sent = await place.submit(len(chunks), send, handed_over=on_hand_over)
        try:
            return await chunked.result(sent)
        except (RequestFailed, APIStatusError) as error:
            if not isinstance(error, ResultLost):  # a lost one may have taken effect
                applied = error.applied if isinstance(error, PartialFailure) else ()
                held.datums = sum(stop - start for start, stop in applied)
            raise

    async def _chunked_pass(
        self,
        place: Place,
        chunks: Sequence[Batch],
        loss_fn: str,
        config: LossConfig,
        *,
        forward_only: bool,
        keep_graph: bool,
    ) -> ChunkedPass:
        dialect = await self.connection.dialect()
        # Before a number is taken: a key that has ended must not leave a gap.
        await self.connection.keys.current()
        return ChunkedPass(
            connection=self.connection,
            model_id=self.model_id,
            chunks=chunks,
            dialect=dialect,
            loss_fn=loss_fn,
            config=config,
            forward_only=forward_only,
            keep_graph=keep_graph,
            refused=place.refused,
            stuck=place.stuck,
            queue=self.queue,
        )

    async def run_numbered(
        self,
        place: Place,
        endpoint: str,
        body: Mapping[str, Any],
        request_type: str,
        *,
        handed_over: Callable[[], None] | None = None,
        accepted: Callable[[], None] | None = None,
        refused: Callable[[], None] | None = None,
    ) -> Mapping[str, Any]:
        """A request without datums.

        Args:
            place: the request's.
            endpoint: where it goes.
            body: its fields.
            request_type: what the service calls its result.
            handed_over: called at hand-over, before anything else can run.
            accepted: called when the service has taken it.
            refused: called when the service has refused it.

        Returns:
            The fields of the result.
        """
        # Before a number is taken: what cannot be sent must not leave a gap.
        await or_break(lambda: encoded_json(body, endpoint))
        await self.connection.keys.current()

        async def send(numbers: Sequence[int]) -> str:
            numbered = {"model_id": self.model_id, "seq_id": numbers[0], **body}
            try:
                request_id = await self.connection.submit(f"/api/v1/{endpoint}", numbered)
            except APIStatusError:
                if refused is not None:
                    refused()
                raise
            if accepted is not None:
                accepted()
            return request_id

        request_id = await place.submit(1, send, handed_over=handed_over)
        return await self.connection.fields(request_id, request_type, self.queue)

    async def run_optim_step(
        self, place: Place, body: Mapping[str, Any], *, accepted: Callable[[], None]
    ) -> Mapping[str, Any]:
        """The request that uses up the gradients.

        Args:
            place: the request's.
            body: its fields.
            accepted: called when the service has taken it.

        Returns:
            The fields of the result.

        Raises:
            SurrogateMismatch: gradients were scaled for another number of datums than the service holds; not sent.
        """
        await place.turn()  # all gradients before it are handed over
        self.held.check()
        cleared, held = 0, self.held

        def clear() -> None:
            nonlocal cleared
            cleared, self.lane.accumulated = self.lane.accumulated, 0
            self.held = HeldSequences()

        def keep() -> None:
            self.lane.accumulated += cleared
            self.held.calls[:0] = held.calls

        try:
            return await self.run_numbered(
                place, "optim_step", body, "OptimStep", handed_over=clear, accepted=accepted, refused=keep
            )
        except RequestFailed:
            keep()  # a step that the service failed has applied nothing
            raise


def _accepted(chunks: Sequence[Batch], sent: Sequence[Sent]) -> int:
    """Datums in the chunks that the service took."""
    return sum(
        len(chunk.data) for chunk, outcome in zip(chunks, sent, strict=True) if not isinstance(outcome, APIStatusError)
    )
