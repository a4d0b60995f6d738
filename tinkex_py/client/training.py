"""Trains one model."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Unpack

from tinkex_py.client.accumulation import Accumulation
from tinkex_py.client.batches import check_name, checked_chunks
from tinkex_py.client.custom_step import DEFAULTS as CUSTOM_STEP_DEFAULTS, CustomStepOptions, custom_step
from tinkex_py.client.ordering import Kind, Ordering, Turn
from tinkex_py.client.passes import GradientPass, Model, Pass
from tinkex_py.client.queue_state import QueueWatch
from tinkex_py.client.sampling import AsyncSamplingClient, new_sampling_client
from tinkex_py.client.server_execution import run_on_service
from tinkex_py.client.session import ClientSession
from tinkex_py.client.submission import NumberedRequest, OptimizerRequest
from tinkex_py.client.unsupported import reported_as_unsupported, was_not_counted
from tinkex_py.errors import (
    ClientClosed,
    InvalidData,
    InvalidResponse,
    RequestFailed,
    TimeoutExceeded,
    UnsupportedFeature,
)
from tinkex_py.limits import time_limit
from tinkex_py.losses.options import shows_options
from tinkex_py.transport.decoding import fields_of
from tinkex_py.transport.encoding import LossConfig
from tinkex_py.transport.messages import request
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
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.pipeline import Pipeline
    from tinkex_py.losses.spec import RegularizerSpec, Term


class AsyncTrainingClient:
    """Trains one model on the service. Made by `AsyncServiceClient`.

    Requests take effect in the order in which they are made, which is the order of their first steps: with
    `asyncio.gather(a, b)` that is a before b. A request whose predecessor did not take effect is not sent.

    Args:
        session: with the service.
        model_id: the service's id of the model.
        load_tokenizer: gives the tokenizer of a model name.
    """

    def __init__(
        self, session: ClientSession, model_id: str, *, load_tokenizer: "Callable[[str], Awaitable[Tokenizer]]"
    ) -> None:
        self.model_id = model_id
        self._session = session
        self._load_tokenizer = load_tokenizer
        self._accumulation = Accumulation()
        self._ordering = Ordering(model_id, self._accumulation)
        self._queue = QueueWatch(model_id, session.settings.on_queue_state, self._ordering.check_reason)
        self._model = Model(session, model_id, self._ordering, self._accumulation, self._queue)
        self._info: GetInfoResponse | None = None
        session.orderings.add(self._ordering)

    @property
    def accumulated(self) -> int:
        """Backward passes handed over since the last optimizer step; the service cannot take them back."""
        return self._accumulation.count

    @property
    def step(self) -> int:
        """Optimizer steps that the service took so far; what a schedule of a regularizer's weight is called with.

        Set it where a run is resumed, to the number of steps that were made before.
        """
        return self._accumulation.steps

    @step.setter
    def step(self, made: int) -> None:
        if isinstance(made, bool) or not isinstance(made, int) or made < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"step must be an int >= 0, got {made!r}")
        self._accumulation.steps = made

    @property
    def queue_state(self) -> QueueState:
        """Whether the service works on this client's requests, as it said last."""
        return self._queue.state

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
        config: LossConfig = {} if loss_fn_config is None else loss_fn_config
        async with self._ordering.enter(Kind.READ, "forward", forward_only=True) as turn:
            chunks = checked_chunks(data, loss_fn, config, self._session.config)
            return await turn.send(Pass(self._model, chunks, loss_fn, config))

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
        config: LossConfig = {} if loss_fn_config is None else loss_fn_config
        async with self._ordering.enter(Kind.GRADIENT, "forward_backward") as turn:
            chunks = checked_chunks(data, loss_fn, config, self._session.config)
            return await turn.send(GradientPass(self._model, chunks, loss_fn, config))

    @shows_options(CustomStepOptions, CUSTOM_STEP_DEFAULTS)
    async def forward_backward_custom(
        self,
        data: Sequence[Datum],
        base_loss: "Term | Pipeline",
        *,
        regularizers: "Sequence[RegularizerSpec]" = (),
        **options: Unpack[CustomStepOptions],
    ) -> "CustomLossOutput":
        """Adds the gradient of a composed loss to what the next optimizer step uses.

        The service's forward pass gives logprobs; the terms run here; the gradient of
        `base_loss + sum(weight_i * regularizer_i)` goes back. Only `target_tokens` and `weights` are sent; all other
        loss inputs stay here, for the terms.

        Args:
            data: the datums, each with `target_tokens` of `[T]` or `[T, K]`.
            base_loss: a term, or a ready Pipeline (then no other option of it may be given).
            regularizers: specs with unique names.
            options: see `CustomStepOptions` and `PipelineOptions`.

        Raises:
            UnsupportedFeature: `execution="server"`, and the step cannot run there; or no loss of the service carries
                the gradient of this step unchanged. The message says why.
            RegularizerError: a term failed; nothing was sent, and the client stays usable.
            PipelineError: the loss cannot be composed, or no term depends on the logprobs.
            InvalidData: the datums or an option cannot be used.
            TimeoutExceeded: the deadline passed.
            PrecedingRequestFailed: an earlier request did not take effect, so this was not sent.
            RequestFailed: the service failed the request.
        """
        async with self._ordering.enter(Kind.GRADIENT, "forward_backward_custom") as turn:
            step = custom_step(base_loss, regularizers, options)
            too_late = f"the custom step was not handed over within its deadline of {step.deadline} s"
            async with time_limit(step.deadline, lambda: TimeoutExceeded(too_late)) as limit:

                def on_hand_over() -> None:
                    limit.reschedule(None)

                if step.execution != "client":
                    served = await run_on_service(step, turn, self._model, data, on_hand_over)
                    if served is not None:
                        return served
                return await step.run(turn, self._model, data, on_hand_over)

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
        async with self._ordering.enter(Kind.UPDATE, "optim_step") as turn:
            if params is not None and not isinstance(params, AdamParams | OptimizerParams):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InvalidData(f"params must be AdamParams or OptimizerParams, got a {type(params).__name__}")
            name = "optimizer_params" if isinstance(params, OptimizerParams) else "adam_params"
            body = {name: (params or AdamParams()).on_the_wire(), "type": "optim_step"}
            step = OptimizerRequest(self._session.api, self.model_id, body, self._queue, self._accumulation)
            return OptimStepResponse.read(await turn.send(step))

    async def load_state(
        self, path: str, *, with_optimizer: bool = False, weights_access_token: str | None = None
    ) -> None:
        """Loads a checkpoint; services allow it only as a model's first request.

        Args:
            path: what `save_state` gave.
            with_optimizer: also restore the optimizer's state.
            weights_access_token: lets one load another user's checkpoint.

        Raises:
            UnsupportedFeature: the model is in use already; the message names the way out.
        """
        is_unused = self._ordering.is_unused
        async with self._ordering.enter(Kind.UPDATE, "load_state") as turn:
            if not is_unused:
                raise UnsupportedFeature(
                    f"{path!r} cannot be loaded into a model that is in use: await "
                    "service.create_training_client_from_state(path, with_optimizer=...) makes a new one from it"
                )
            body: dict[str, Any] = {"path": path, "optimizer": with_optimizer, "type": "load_weights"}
            if weights_access_token is not None:
                body["weights_access_token"] = weights_access_token
            await turn.send(self._numbered("load_weights", body, "LoadWeights"))

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
        async with self._ordering.enter(Kind.READ, "save_state") as turn:
            body = _named_save("save_weights", name, ttl_seconds, user_metadata)
            # Asked for only where it is wanted: services that are strict and older do not know the field.
            body.update({} if overwrite is False else {"overwrite": overwrite})
            fields = await turn.send(self._numbered("save_weights", body, "SaveWeights"))
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
        async with self._saving_for_sampler() as turn:
            if to_sample:
                await self._session.models.check_any("sample")
            body = _named_save("save_weights_for_sampler", name, ttl_seconds, user_metadata)
            fields = await turn.send(self._numbered("save_weights_for_sampler", body, "SaveWeightsForSampler"))
            return SaveWeightsResponse.read(fields)

    @asynccontextmanager
    async def _saving_for_sampler(self) -> AsyncGenerator[Turn]:
        operation = "save_weights_for_sampler"
        with reported_as_unsupported(self._session.api.host, operation):
            async with self._ordering.enter(Kind.READ, operation) as turn:
                yield turn

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
            return await new_sampling_client(self._session, model_path=saved.path)
        async with self._saving_for_sampler() as turn:
            await self._session.models.check_any("sample")
            body: dict[str, Any] = {
                "sampling_session_seq_id": next(self._session.sampler_numbers),
                "type": "save_weights_for_sampler",
            }
            body.update({"kind": "inflight"} if inflight else {})
            try:
                fields = await turn.send(self._numbered("save_weights_for_sampler", body, "SaveWeightsForSampler"))
            except RequestFailed as error:
                if was_not_counted(error):
                    self._ordering.give_back(turn)
                raise
            saved_session = SaveWeightsForSamplerResponse.read(fields).sampling_session_id
            if saved_session is None:
                raise InvalidResponse("save_weights_for_sampler gave no sampling_session_id")
            return AsyncSamplingClient(self._session, saved_session)

    # About the model

    async def get_info(self) -> GetInfoResponse:
        """What is being trained."""
        self._ordering.check_loop()
        if isinstance(self._ordering.lost, ClientClosed):
            raise ClientClosed("this training client is closed; make a new one")
        if self._info is None:
            asking = request("POST", "/api/v1/get_info", json={"model_id": self.model_id, "type": "get_info"})
            self._info = GetInfoResponse.read(await self._session.api.send(asking, fields_of))
        return self._info

    async def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: the embedded service's own, else loaded by name with transformers.

        Raises:
            MissingExtra: transformers is not installed.
            UnsupportedFeature: the service does not say which tokenizer it is.
        """
        info = await self.get_info()
        name = info.model_data.tokenizer_id or info.model_data.model_name or info.model_name
        if name is None:
            raise UnsupportedFeature("the service does not give the model's name; pass your own tokenizer")
        return await self._load_tokenizer(name.partition(":")[0])

    # Closing

    async def aclose(self) -> None:
        """Ends this client; waits a while for what is in flight. Closing twice is fine.

        Raises:
            ClientClosed: the client belongs to another event loop; close it there.
        """
        self._ordering.check_loop()
        self._ordering.end(ClientClosed("this training client is closed; make a new one"))
        await self._ordering.drain(self._session.settings.close_timeout)

    async def __aenter__(self) -> "AsyncTrainingClient":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def _numbered(self, endpoint: str, body: Mapping[str, Any], request_type: str) -> NumberedRequest:
        return NumberedRequest(self._session.api, self.model_id, endpoint, body, request_type, self._queue)


def _named_save(
    kind: str, name: str, ttl_seconds: int | None, user_metadata: Mapping[str, str] | None
) -> dict[str, Any]:
    body: dict[str, Any] = {"path": check_name(name), "type": kind}
    if ttl_seconds is not None:
        body["ttl_seconds"] = ttl_seconds
    if user_metadata is not None:
        body["user_metadata"] = dict(user_metadata)
    return body
