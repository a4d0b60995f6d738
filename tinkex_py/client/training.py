"""Trains one model."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tinkex_py.client.carrier import Surrogate, check_surrogate
from tinkex_py.client.connection import Connection
from tinkex_py.client.custom_options import check_deadline, pipeline_of, until_handed_over
from tinkex_py.client.custom_step import CustomStep
from tinkex_py.client.model_requests import ModelRequests, or_break
from tinkex_py.client.refusals import told_as_unsupported, was_not_counted
from tinkex_py.client.sampling import AsyncSamplingClient, new_sampling_client
from tinkex_py.client.server_execution import Execution, check_execution, run_on_service
from tinkex_py.client.steps import OptimizerSteps
from tinkex_py.client.training_data import check_name
from tinkex_py.errors import (
    ClientClosed,
    InvalidData,
    InvalidResponse,
    RequestFailed,
    UnsupportedFeature,
)
from tinkex_py.transport.codec import LossConfig
from tinkex_py.transport.place import Kind
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

if TYPE_CHECKING:
    from tinkex_py.losses.options import Combine
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.pipeline import Pipeline
    from tinkex_py.losses.recording import RecordPath
    from tinkex_py.losses.spec import RegularizerSpec, Term


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
        self._requests = ModelRequests(connection, model_id)
        self._steps = OptimizerSteps()
        self._info: GetInfoResponse | None = None

    @property
    def accumulated(self) -> int:
        """Backward passes handed over since the last optimizer step; the service cannot take them back."""
        return self._requests.lane.accumulated

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
        return self._requests.queue.state

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
        with self._requests.request(Kind.READ, "forward", forward_only=True) as place:
            config: LossConfig = {} if loss_fn_config is None else loss_fn_config
            chunks = await self._requests.chunks(data, loss_fn, config)
            return await self._requests.run_forward(place, chunks, loss_fn, config)

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
        with self._requests.request(Kind.GRADIENT, "forward_backward") as place:
            config: LossConfig = {} if loss_fn_config is None else loss_fn_config
            chunks = await self._requests.chunks(data, loss_fn, config)
            return await self._requests.run_backward(place, chunks, loss_fn, config)

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
        overlap: bool = True,
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
            overlap: where a custom step is right before this one, the forward pass goes out while that step's terms
                still run. It changes no number; the terms of this step start when that step is over.

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
        with self._requests.request(Kind.GRADIENT, "forward_backward_custom") as place:
            options: dict[str, Any] = {
                "track_grad_norms": track_grad_norms,
                "parallel": parallel,
                "max_concurrency": max_concurrency,
                "max_threads": max_threads,
                "timeout": timeout,
                "combine": combine,
            }
            await or_break(lambda: check_deadline(deadline))
            pipeline = await or_break(lambda: pipeline_of(base_loss, regularizers, options))
            await or_break(lambda: check_execution(execution))
            await or_break(lambda: check_surrogate(surrogate, sequences_per_step, execution))
            if execution != "client":
                served = await run_on_service(
                    self._requests,
                    place,
                    self._steps,
                    data,
                    pipeline,
                    execution,
                    deadline,
                    recorded=record is not None,
                )
                if served is not None:
                    return served
            step = CustomStep(
                self._requests, self._steps, place, pipeline, surrogate, sequences_per_step, overlap, record
            )
            async with until_handed_over(deadline) as handed_over:
                return await step.run(data, handed_over)

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
        with self._requests.request(Kind.UPDATE, "optim_step") as place:
            if params is not None and not isinstance(params, AdamParams | OptimizerParams):  # pyright: ignore[reportUnnecessaryIsInstance]
                await asyncio.sleep(0)
                raise InvalidData(f"params must be AdamParams or OptimizerParams, got a {type(params).__name__}")

            name = "optimizer_params" if isinstance(params, OptimizerParams) else "adam_params"
            body = {name: (params or AdamParams()).on_the_wire(), "type": "optim_step"}
            fields = await self._requests.run_optim_step(place, body, accepted=self._steps.end_step)
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
        is_unused = self._requests.lane.is_unused

        def check() -> None:
            if not is_unused:
                raise UnsupportedFeature(
                    f"{path!r} cannot be loaded into a model that is in use: await "
                    "service.create_training_client_from_state(path, with_optimizer=...) makes a new one from it"
                )

        with self._requests.request(Kind.UPDATE, "load_state") as place:
            await or_break(check)
            body: dict[str, Any] = {"path": path, "optimizer": with_optimizer, "type": "load_weights"}
            if weights_access_token is not None:
                body["weights_access_token"] = weights_access_token
            await self._requests.run_numbered(place, "load_weights", body, "LoadWeights")

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
        with self._requests.request(Kind.READ, "save_state") as place:
            body = _named_save("save_weights", name, ttl_seconds, user_metadata)
            # Asked for only where it is wanted: services that are strict and older do not know the field.
            body.update({} if overwrite is False else {"overwrite": overwrite})
            fields = await self._requests.run_numbered(place, "save_weights", body, "SaveWeights")
            return SaveWeightsResponse.read(fields)

    async def save_weights_for_sampler(
        self, name: str, *, ttl_seconds: int | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> SaveWeightsResponse:
        """Saves weights for sampling under a name; the path works with `service.create_sampling_client`.

        Raises:
            UnsupportedFeature: the service cannot sample.
        """
        return await self._save_for_sampler(name, ttl_seconds, user_metadata)

    async def _save_for_sampler(
        self, name: str, ttl_seconds: int | None, user_metadata: Mapping[str, str] | None, *, to_sample: bool = False
    ) -> SaveWeightsResponse:
        with (
            self._unsupported("save_weights_for_sampler"),
            self._requests.request(Kind.READ, "save_weights_for_sampler") as place,
        ):
            if to_sample:
                await self._connection.models.check_any("sample")
            body = _named_save("save_weights_for_sampler", name, ttl_seconds, user_metadata)
            fields = await self._requests.run_numbered(place, "save_weights_for_sampler", body, "SaveWeightsForSampler")
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
            saved = await self._save_for_sampler(name, None, None, to_sample=True)
            return await new_sampling_client(self._connection, model_path=saved.path)
        with (
            self._unsupported("save_weights_for_sampler"),
            self._requests.request(Kind.READ, "save_weights_for_sampler") as place,
        ):
            await self._connection.models.check_any("sample")
            body: dict[str, Any] = {
                "sampling_session_seq_id": self._connection.next_sampler_number(),
                "type": "save_weights_for_sampler",
            }
            body.update({"kind": "inflight"} if inflight else {})
            try:
                fields = await self._requests.run_numbered(
                    place, "save_weights_for_sampler", body, "SaveWeightsForSampler"
                )
            except RequestFailed as error:
                if was_not_counted(error):
                    self._requests.lane.give_back(place)
                raise
            saved_session = SaveWeightsForSamplerResponse.read(fields).sampling_session_id
            if saved_session is None:
                raise InvalidResponse("save_weights_for_sampler gave no sampling_session_id")
            return AsyncSamplingClient(self._connection, saved_session)

    # About the model

    async def get_info(self) -> GetInfoResponse:
        """What is being trained."""
        self._requests.lane.check_loop()
        if isinstance(self._requests.lane.lost, ClientClosed):
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
        self._requests.lane.check_loop()
        self._requests.lane.end(ClientClosed("this training client is closed; make a new one"))
        await self._requests.lane.drain(self._connection.config.close_timeout)

    async def __aenter__(self) -> "AsyncTrainingClient":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def _unsupported(self, operation: str) -> AbstractContextManager[None]:
        return told_as_unsupported(self._connection.http.host, operation)


def _named_save(
    kind: str, name: str, ttl_seconds: int | None, user_metadata: Mapping[str, str] | None
) -> dict[str, Any]:
    body: dict[str, Any] = {"path": check_name(name), "type": kind}
    if ttl_seconds is not None:
        body["ttl_seconds"] = ttl_seconds
    if user_metadata is not None:
        body["user_metadata"] = dict(user_metadata)
    return body
