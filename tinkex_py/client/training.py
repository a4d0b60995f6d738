"""Trains one model."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from tinkex_py import telemetry
from tinkex_py.client.carrier import (
    Carrier,
    HeldCall,
    HeldSequences,
    Surrogate,
    advantages_of,
    check_one_dimensional,
    check_sequences,
    check_surrogate,
    has_candidates,
    measuring_sample,
    measuring_weights,
)
from tinkex_py.client.connection import Connection
from tinkex_py.client.custom_step import check_deadline, logprobs_of, pipeline_of, until_handed_over
from tinkex_py.client.queue import QueueWatch
from tinkex_py.client.refusals import told_as_unsupported, was_not_counted
from tinkex_py.client.sampling import AsyncSamplingClient, new_sampling_client
from tinkex_py.client.server_execution import Execution, check_execution, server_step
from tinkex_py.client.steps import OptimizerSteps
from tinkex_py.client.submission import (
    ChunkedPass,
    Sent,
    count_numbers,
    encode_chunks,
    replace_by_advantages,
    replace_weights,
)
from tinkex_py.client.training_data import check_data, check_finite, check_inputs, check_loss, check_name, check_targets
from tinkex_py.errors import (
    APIStatusError,
    ClientClosed,
    InvalidData,
    InvalidResponse,
    PartialFailure,
    PipelineError,
    RequestFailed,
    ResultLost,
    TinkexError,
    UnsupportedFeature,
)
from tinkex_py.transport.codec import EncodedBatch, LossConfig
from tinkex_py.transport.lane import Kind, Lane, Place, is_undecided
from tinkex_py.transport.request import encoded_json
from tinkex_py.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    OptimizerParams,
    OptimStepResponse,
    QueueState,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    Tokenizer,
)
from tinkex_py.types.tensors import Array

if TYPE_CHECKING:
    from tinkex_py.losses.combine import Combine
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.pipeline import Pipeline
    from tinkex_py.losses.recording import RecordPath
    from tinkex_py.losses.spec import RegularizerSpec, Term


# How the embedded service says that a number never came.
_GAP = re.compile(r"seq_id \d{1,18} waits for seq_id (\d{1,18})")


class AsyncTrainingClient:
    """Trains one model on the service. Made by `AsyncServiceClient`.

    Requests take effect in the order in which they are made, which is the order of their first steps: with
    `asyncio.gather(a, b)` that is a before b. A request whose predecessor did not take effect is not sent.

    Args:
        connection: the service.
        model_id: the service's id of the model.
        load_tokenizer: gives the tokenizer of a model name.
    """

    def __init__(
        self,
        connection: Connection,
        model_id: str,
        *,
        load_tokenizer: "Callable[[str], Awaitable[Tokenizer]]",
    ) -> None:
        self.model_id = model_id
        self._connection = connection
        self._load_tokenizer = load_tokenizer
        self._lane = Lane()
        self._steps = OptimizerSteps()
        self._held = HeldSequences()
        connection.lanes.add(self._lane)
        self._queue = QueueWatch(model_id, connection.config.on_queue_state, self._check_gap)
        self._info: GetInfoResponse | None = None

    @property
    def accumulated(self) -> int:
        """Backward passes handed over since the last optimizer step; the service cannot take them back."""
        return self._lane.accumulated

    @property
    def step(self) -> int:
        """Optimizer steps that the service took so far; what a schedule of a regularizer's weight is called with.

        Set it where a run is resumed, to the number of steps that were made before.
        """
        return self._steps.made

    @step.setter
    def step(self, made: int) -> None:
        if isinstance(made, bool) or not isinstance(made, int) or made < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"step must be an int >= 0, got {made!r}")
        self._steps.made = made

    @property
    def queue_state(self) -> QueueState:
        """Whether the service works on this client's requests, as it said last."""
        return self._queue.state

    def _check_gap(self, reason: str) -> None:
        gap = _GAP.search(reason)
        if gap is not None:
            self._lane.check_gap(int(gap[1]))

    # Passes over data

    async def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", *, loss_fn_config: LossConfig | None = None
    ) -> ForwardBackwardOutput:
        """Logprobs and loss of the datums; nothing is changed.

        A term of a custom step may call this too: it then runs inside that step's turn.

        Args:
            data: the datums.
            loss_fn: one of the service's losses.
            loss_fn_config: its settings.

        Raises:
            InvalidData: the datums cannot be used.
            RequestFailed: the service failed the request.
        """
        with self._request(Kind.READ, "forward", forward_only=True) as place:
            config: LossConfig = {} if loss_fn_config is None else loss_fn_config
            chunks = await self._encoded(data, loss_fn, config)
            return await self._pass(place, chunks, loss_fn, config, forward_only=True)

    async def forward_backward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", *, loss_fn_config: LossConfig | None = None
    ) -> ForwardBackwardOutput:
        """Adds the gradient of one of the service's own losses to what the next optimizer step uses.

        Args:
            data: the datums.
            loss_fn: one of the service's losses.
            loss_fn_config: its settings.

        Raises:
            InvalidData: the datums cannot be used.
            PrecedingRequestFailed: an earlier request did not take effect, so this was not sent.
            RequestFailed: the service failed the request.
        """
        with self._request(Kind.GRADIENT, "forward_backward") as place:
            config: LossConfig = {} if loss_fn_config is None else loss_fn_config
            chunks = await self._encoded(data, loss_fn, config)
            return await self._pass(place, chunks, loss_fn, config, forward_only=False)

    async def forward_backward_custom(
        self,
        data: Sequence[Datum],
        base_loss: "Term | Pipeline",
        *,
        regularizers: "Sequence[RegularizerSpec]" = (),
        track_grad_norms: bool = False,
        parallel: bool = True,
        timeout: float | None = 30.0,
        max_concurrency: int = 32,
        max_threads: int | None = None,
        combine: "Combine" = "sum",
        deadline: float | None = None,
        record: "RecordPath | None" = None,
        execution: Execution = "client",
        surrogate: Surrogate = "auto",
        sequences_per_step: int | None = None,
    ) -> "CustomLossOutput":
        """Adds the gradient of a composed loss to what the next optimizer step uses.

        The service's forward pass gives logprobs; the terms run here; the gradient of
        `base_loss + sum(weight_i * regularizer_i)` goes back. Only `target_tokens` and `weights` are sent; all other
        loss inputs stay here, for the terms.

        Args:
            data: the datums, each with `target_tokens` of `[T]` or `[T, K]`.
            base_loss: a term, or a ready Pipeline (then no other option of it may be given).
            regularizers: specs with unique names.
            track_grad_norms: compute gradient norms.
            parallel: False runs the terms one after another.
            timeout: seconds per term; None is no limit.
            max_concurrency: terms in flight at once.
            max_threads: sync terms of this call in threads at once; the service client's threads bound it too.
            combine: "sum" or "pcgrad", see `Pipeline`.
            deadline: seconds for everything up to the hand-over of the gradient; after that it never cancels.
            record: a folder to write what the terms see to, for `tinkex_py.losses.replay`.
            execution: where the terms run. "client": here. "server": the loss is traced, uploaded where it is new, and
                the service does the whole step in one round trip, with the same gradient; terms emit no events of their
                own, and their timeouts do not apply. "auto": on the service where that is possible.
            surrogate: the service's loss that carries the gradient. "auto": the one that carries it unchanged, by a
                table of known services or by what the forward pass reports.
            sequences_per_step: datums of all calls up to the next optim_step; default is this call's. Where the
                service divides by that number ("importance_sampling"), the gradient is scaled for it.

        Raises:
            UnsupportedFeature: `execution="server"`, and the step cannot run there; or no loss of the service carries
                the gradient of this step unchanged. The message says why.
            RegularizerError: a term failed; nothing was sent, and the client stays usable.
            PipelineError: the loss cannot be composed, or no term depends on the logprobs.
            InvalidData: the datums cannot be used.
            TimeoutExceeded: the deadline passed.
            PrecedingRequestFailed: an earlier request did not take effect, so this was not sent.
            RequestFailed: the service failed the request.
        """
        with self._request(Kind.GRADIENT, "forward_backward_custom") as place:
            options: dict[str, Any] = {
                "track_grad_norms": track_grad_norms,
                "parallel": parallel,
                "max_concurrency": max_concurrency,
                "max_threads": max_threads,
                "timeout": timeout,
                "combine": combine,
            }
            await self._or_break(lambda: check_deadline(deadline))
            pipeline = await self._or_break(lambda: pipeline_of(base_loss, regularizers, options))
            await self._or_break(lambda: check_execution(execution))
            await self._or_break(lambda: check_surrogate(surrogate, sequences_per_step, execution))
            if execution != "client":
                served = await self._on_service(place, data, pipeline, execution, deadline, recorded=record is not None)
                if served is not None:
                    return served
            async with until_handed_over(deadline) as handed_over:
                chunks = await self._encoded(data, "cross_entropy", {}, custom=True)
                count = sum(len(chunk.data) for chunk in chunks)
                sequences = await self._or_break(lambda: check_sequences(sequences_per_step, count))
                forward, carrier = await self._forward_of_step(place, chunks, surrogate)
                output, gradient = await self._evaluate(place, forward, pipeline, chunks, record)
                carried = await self._carried(chunks, gradient, forward, carrier, sequences)

                def on_hand_over() -> None:
                    self._steps.add(pipeline.controllers, output)
                    handed_over()

                service_output = await self._pass(
                    place,
                    carried,
                    carrier,
                    {},
                    forward_only=False,
                    handed_over=on_hand_over,
                    scaled_for=sequences if carrier == "importance_sampling" else None,
                )
            return output.model_copy(update={"service_output": service_output})

    async def _on_service(
        self,
        place: Place,
        data: Sequence[Datum],
        pipeline: "Pipeline",
        execution: Execution,
        deadline: float | None,
        *,
        recorded: bool,
    ) -> "CustomLossOutput | None":
        """A custom step in one round trip; None if it has to run on the client."""
        datums = await self._or_break(lambda: check_data(data))
        await self._or_break(lambda: check_targets(datums))
        async with until_handed_over(deadline) as handed_over:
            step = await server_step(self._connection, pipeline, datums, execution, recorded=recorded)
            if step is None:
                return None
            await place.quiet_turn()  # the weights are those after the optimizer steps before this one
            count = sum(spec.enabled for spec in pipeline.regularizers)
            with telemetry.lifecycle(
                "tinkex.custom_loss", {"regularizer_count": count, "track_grad_norms": False}
            ) as measurements:
                weights = step.traced.weights(self._steps.made)
                config: LossConfig = {"loss_id": step.loss_id}
                chunks = await self._encoded(step.traced.datums(datums, weights), "custom", config)
                result = await self._pass(place, chunks, "custom", config, forward_only=False, handed_over=handed_over)
                output = step.traced.output(result, weights)
                measurements["loss_total"] = output.loss_total
                measurements["regularizer_total"] = output.regularizer_total
            return output

    async def _forward_of_step(
        self, place: Place, chunks: Sequence[EncodedBatch], surrogate: Surrogate
    ) -> tuple[ForwardBackwardOutput, Carrier]:
        """The forward pass of a custom step, and the loss that is to carry the gradient back.

        Raises:
            UnsupportedFeature: no loss of the service carries the gradient of these datums.
        """
        await place.turn()  # a step before this one may have learnt what the service does
        service = self._connection.carrier
        data = _data_of(chunks)
        carrier: Carrier | None = await self._or_break(lambda: service.for_step(surrogate))
        if carrier is None and has_candidates(data):
            sample = await encode_chunks(measuring_sample(data), self._connection, custom=True)
            _, carrier = await self._forward_of_step(place, sample, surrogate)
        if carrier == "importance_sampling":
            await self._or_break(lambda: check_one_dimensional(data))
        if carrier is not None:
            forward = await self._pass(place, chunks, "cross_entropy", {}, forward_only=True, last=False)
            return forward, carrier
        weights = measuring_weights(count_numbers(chunks))
        weighted = await replace_weights(chunks, weights, self._connection.threads)
        forward = await self._pass(place, weighted, "cross_entropy", {}, forward_only=True, last=False)
        return forward, service.learn(forward, logprobs_of(forward, data), weights)

    async def _carried(
        self,
        chunks: Sequence[EncodedBatch],
        gradient: Array,
        forward: ForwardBackwardOutput,
        carrier: Carrier,
        sequences: int,
    ) -> list[EncodedBatch]:
        """The datums of a custom step with the numbers that make the service arrive at the gradient."""
        threads = self._connection.threads
        if carrier == "cross_entropy":
            return await replace_weights(chunks, -gradient, threads)
        logprobs = forward.packed["logprobs"]
        advantages = advantages_of(gradient, logprobs, sequences)
        return await replace_by_advantages(chunks, logprobs.values, advantages, threads)

    async def _evaluate(
        self,
        place: Place,
        forward: ForwardBackwardOutput,
        pipeline: "Pipeline",
        chunks: Sequence[EncodedBatch],
        record: "RecordPath | None",
    ) -> "tuple[CustomLossOutput, Array]":
        from tinkex_py.losses.logprobs import Logprobs

        self._steps.check()
        # As they were sent: the caller's list may have changed since.
        data = _data_of(chunks)
        with place.running_terms():
            loss = await pipeline.evaluate(
                data,
                Logprobs.from_packed(logprobs_of(forward, data)),
                step=self._steps.made,
                threads=self._connection.threads,
                thread_group=self,
                record=record,
            )
        if not loss.differentiable:
            raise PipelineError(
                "no term depends on the logprobs, so there is nothing to train on; nothing was sent. A loss loses its "
                "path to the logprobs through detach(), numpy(), torch.no_grad() or torch.tensor(x)"
            )
        return loss.output, loss.gradient.reshape(-1).numpy()

    # Changes of the model

    async def optim_step(self, params: AdamParams | OptimizerParams | None = None) -> OptimStepResponse:
        """Applies the accumulated gradient, and clears it.

        Args:
            params: step size and the like of AdamW, or of the optimizer that the model was made with; default
                `AdamParams()`.

        Raises:
            SurrogateMismatch: gradients were scaled for another number of datums than the service holds; not sent.
            PrecedingRequestFailed: an earlier gradient did not take effect, so this was not sent.
            RequestFailed: the service failed the request.
        """
        with self._request(Kind.UPDATE, "optim_step") as place:
            if params is not None and not isinstance(params, AdamParams | OptimizerParams):  # pyright: ignore[reportUnnecessaryIsInstance]
                await asyncio.sleep(0)
                raise InvalidData(f"params must be AdamParams or OptimizerParams, got a {type(params).__name__}")

            await place.turn()  # all gradients before it are handed over
            self._held.check()
            cleared, held = 0, self._held

            def clear() -> None:
                nonlocal cleared
                cleared, self._lane.accumulated = self._lane.accumulated, 0
                self._held = HeldSequences()

            def keep() -> None:
                self._lane.accumulated += cleared
                self._held.calls[:0] = held.calls

            name = "optimizer_params" if isinstance(params, OptimizerParams) else "adam_params"
            body = {name: (params or AdamParams()).on_the_wire(), "type": "optim_step"}
            try:
                fields = await self._numbered(
                    place,
                    "optim_step",
                    body,
                    "OptimStep",
                    handed_over=clear,
                    accepted=self._steps.end_step,
                    refused=keep,
                )
            except RequestFailed:
                keep()  # a step that the service failed has applied nothing
                raise
            return OptimStepResponse.read(fields)

    async def load_state(
        self, path: str, *, with_optimizer: bool = False, weights_access_token: str | None = None
    ) -> None:
        """Loads a checkpoint; services allow it only as a model's first request.

        Args:
            path: what `save_state` gave.
            with_optimizer: also restore the optimizer's state.
            weights_access_token: lets one load a checkpoint of somebody else.

        Raises:
            UnsupportedFeature: the model is in use already; the message names the way out.
        """
        is_unused = self._lane.is_unused

        def check() -> None:
            if not is_unused:
                raise UnsupportedFeature(
                    f"{path!r} cannot be loaded into a model that is in use: await "
                    "service.create_training_client_from_state(path, with_optimizer=...) makes a new one from it"
                )

        with self._request(Kind.UPDATE, "load_state") as place:
            await self._or_break(check)
            body: dict[str, Any] = {"path": path, "optimizer": with_optimizer, "type": "load_weights"}
            if weights_access_token is not None:
                body["weights_access_token"] = weights_access_token
            await self._numbered(place, "load_weights", body, "LoadWeights")

    # Checkpoints and sampling

    async def save_state(
        self,
        name: str,
        *,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> SaveWeightsResponse:
        """Saves weights and optimizer state, as they are after all requests made so far.

        Args:
            name: of the checkpoint.
            ttl_seconds: when the service may delete it; None is never.
            overwrite: replace a checkpoint of this name.
            user_metadata: labels of the checkpoint.

        Returns:
            The checkpoint's path, for `create_training_client_from_state`.
        """
        with self._request(Kind.READ, "save_state") as place:
            body = _named_save("save_weights", name, ttl_seconds, user_metadata)
            # Asked for only where it is wanted: services that are strict and older do not know the field.
            body.update({} if overwrite is False else {"overwrite": overwrite})
            fields = await self._numbered(place, "save_weights", body, "SaveWeights")
            return SaveWeightsResponse.read(fields)

    async def save_weights_for_sampler(
        self, name: str, *, ttl_seconds: int | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> SaveWeightsResponse:
        """Saves weights for sampling under a name; the path works with `service.create_sampling_client`.

        Raises:
            UnsupportedFeature: the service cannot sample.
        """
        with (
            self._unsupported("save_weights_for_sampler"),
            self._request(Kind.READ, "save_weights_for_sampler") as place,
        ):
            body = _named_save("save_weights_for_sampler", name, ttl_seconds, user_metadata)
            fields = await self._numbered(place, "save_weights_for_sampler", body, "SaveWeightsForSampler")
            return SaveWeightsResponse.read(fields)

    async def save_weights_and_get_sampling_client(
        self, name: str | None = None, *, inflight: bool = False
    ) -> AsyncSamplingClient:
        """A sampling client for the weights as they are after all requests made so far.

        Args:
            name: keep them as a named checkpoint too; None keeps them only for this sampling client.
            inflight: the sampling client follows later saves of this kind, instead of staying with these weights.

        Raises:
            InvalidData: a name and `inflight` were both given.
            UnsupportedFeature: the service cannot sample.
        """
        if name is not None:
            if inflight:
                raise InvalidData("inflight weights have no name: leave out one of name and inflight")
            saved = await self.save_weights_for_sampler(name)
            return await new_sampling_client(self._connection, model_path=saved.path)
        with (
            self._unsupported("save_weights_for_sampler"),
            self._request(Kind.READ, "save_weights_for_sampler") as place,
        ):
            body: dict[str, Any] = {
                "sampling_session_seq_id": self._connection.next_sampler_number(),
                "type": "save_weights_for_sampler",
            }
            body.update({"kind": "inflight"} if inflight else {})
            try:
                fields = await self._numbered(place, "save_weights_for_sampler", body, "SaveWeightsForSampler")
            except RequestFailed as error:
                if was_not_counted(error):
                    self._lane.give_back(place)
                raise
            saved_session = SaveWeightsForSamplerResponse.read(fields).sampling_session_id
            if saved_session is None:
                raise InvalidResponse("save_weights_for_sampler gave no sampling_session_id")
            return AsyncSamplingClient(self._connection, saved_session)

    # About the model

    async def get_info(self) -> GetInfoResponse:
        """What is being trained."""
        self._lane.check_loop()
        if isinstance(self._lane.lost, ClientClosed):
            raise ClientClosed("this training client is closed; make a new one")
        if self._info is None:
            fields = await self._connection.post("/api/v1/get_info", {"model_id": self.model_id, "type": "get_info"})
            self._info = GetInfoResponse.read(fields)
        return self._info

    async def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: the embedded service's own, else loaded by name with transformers.

        Raises:
            MissingExtra: transformers is not installed.
            UnsupportedFeature: the service does not tell which tokenizer it is.
        """
        info = await self.get_info()
        name = info.model_data.tokenizer_id or info.model_data.model_name or info.model_name
        if name is None:
            raise UnsupportedFeature("the service does not tell the model's name; pass your own tokenizer")
        return await self._load_tokenizer(name.partition(":")[0])

    # Closing

    async def aclose(self) -> None:
        """Ends this client; waits a while for what is in flight. Closing twice is fine.

        Raises:
            ClientClosed: the client belongs to another event loop; close it there.
        """
        self._lane.check_loop()
        self._lane.end(ClientClosed("this training client is closed; make a new one"))
        await self._lane.drain(self._connection.config.close_timeout)

    async def __aenter__(self) -> "AsyncTrainingClient":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    # One request

    @contextmanager
    def _request(self, kind: Kind, operation: str, *, forward_only: bool = False) -> Generator[Place]:
        """A place in the lane around one request; its errors tell what the service already holds."""
        place = self._lane.enter(kind, forward_only=forward_only)
        try:
            with telemetry.lifecycle("tinkex.training", {"operation": operation, "model_id": self.model_id}):
                yield place
        except TinkexError as error:
            if kind is not Kind.READ:
                error.accumulated = self._lane.accumulated
            if isinstance(error, RequestFailed) and kind is not Kind.READ:
                error.handed_over = tuple(place.fail_on_service())
                if error.handed_over:
                    error.add_note(
                        f"requests {list(error.handed_over)} had been handed over already and may be executed"
                    )
            raise
        finally:
            place.leave()

    def _unsupported(self, operation: str) -> AbstractContextManager[None]:
        return told_as_unsupported(self._connection.http.host, operation)

    async def _or_break(self, build: Callable[[], Any]) -> Any:
        """Runs a check of the input; requests that were started together with a bad one are to see its failure."""
        try:
            return build()
        except Exception:
            await asyncio.sleep(0)
            raise

    async def _encoded(
        self, data: Sequence[Datum], loss_fn: str, config: LossConfig, *, custom: bool = False
    ) -> list[EncodedBatch]:
        def checked() -> Sequence[Datum]:
            datums = check_data(data)
            check_loss(loss_fn, config)
            check_inputs(datums, loss_fn)
            return datums

        datums = await self._or_break(checked)
        dialect = await self._connection.dialect()
        if not dialect.holds_any_number:
            fields = ("weights",) if custom else None
            await self._or_break(lambda: check_finite(datums, config, fields=fields))
        return await encode_chunks(datums, self._connection, custom=custom)

    async def _pass(
        self,
        place: Place,
        chunks: Sequence[EncodedBatch],
        loss_fn: str,
        config: LossConfig,
        *,
        forward_only: bool,
        last: bool = True,
        handed_over: Callable[[], None] | None = None,
        scaled_for: int | None = None,
    ) -> ForwardBackwardOutput:
        chunked = ChunkedPass(
            connection=self._connection,
            model_id=self.model_id,
            chunks=chunks,
            dialect=await self._connection.dialect(),
            loss_fn=loss_fn,
            config=config,
            forward_only=forward_only,
            keep_graph=not last,
            refused=place.refused,
            queue=self._queue,
        )
        # Before a number is taken: a key that has ended must not leave a gap.
        await self._connection.keys.current()

        held = HeldCall(sum(len(chunk.data) for chunk in chunks), scaled_for)

        def on_hand_over() -> None:
            if not forward_only:
                self._lane.accumulated += 1
                self._held.calls.append(held)
            if handed_over is not None:
                handed_over()

        async def send(numbers: Sequence[int]) -> list[Sent]:
            try:
                sent = await chunked.send(numbers)
            except APIStatusError as error:
                if not forward_only and not is_undecided(error):
                    self._lane.accumulated -= 1
                    held.datums = 0
                raise
            held.datums = _accepted(chunks, sent)
            return sent

        sent = await place.submit(len(chunks), send, last=last, handed_over=on_hand_over)
        try:
            return await chunked.result(sent)
        except (RequestFailed, APIStatusError) as error:
            if not isinstance(error, ResultLost):  # a lost one may have taken effect
                applied = error.applied if isinstance(error, PartialFailure) else ()
                held.datums = sum(stop - start for start, stop in applied)
            raise

    async def _numbered(
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
        # Before a number is taken: what cannot be sent must not leave a gap.
        await self._or_break(lambda: encoded_json(body, endpoint))
        await self._connection.keys.current()

        async def send(numbers: Sequence[int]) -> str:
            numbered = {"model_id": self.model_id, "seq_id": numbers[0], **body}
            try:
                request_id = await self._connection.submit(f"/api/v1/{endpoint}", numbered)
            except APIStatusError:
                if refused is not None:
                    refused()
                raise
            if accepted is not None:
                accepted()
            return request_id

        request_id = await place.submit(1, send, handed_over=handed_over)
        return await self._connection.fields(request_id, request_type, self._queue)


def _data_of(chunks: Sequence[EncodedBatch]) -> list[Datum]:
    return [datum for chunk in chunks for datum in chunk.data]


def _accepted(chunks: Sequence[EncodedBatch], sent: Sequence[Sent]) -> int:
    """Datums in the chunks that the service took."""
    return sum(
        len(chunk.data) for chunk, outcome in zip(chunks, sent, strict=True) if not isinstance(outcome, APIStatusError)
    )


def _named_save(
    kind: str, name: str, ttl_seconds: int | None, user_metadata: Mapping[str, str] | None
) -> dict[str, Any]:
    body: dict[str, Any] = {"path": check_name(name), "type": kind}
    if ttl_seconds is not None:
        body["ttl_seconds"] = ttl_seconds
    if user_metadata is not None:
        body["user_metadata"] = dict(user_metadata)
    return body
