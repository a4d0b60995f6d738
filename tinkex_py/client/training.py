"""The training client: trains one model."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from tinkex_py.arguments import check_count, check_flag, check_kind, check_labels, check_text
from tinkex_py.client.accumulation import Accumulation
from tinkex_py.client.arguments import check_name, given
from tinkex_py.client.batches import checked_chunks, loss_config
from tinkex_py.client.certificates import Certificate
from tinkex_py.client.custom_step import DEFAULTS as CUSTOM_STEP_DEFAULTS, CustomStepOptions, custom_step
from tinkex_py.client.ordering import Kind, Ordering
from tinkex_py.client.passes import GradientPass, Model, Pass
from tinkex_py.client.queue_state import QueueWatch
from tinkex_py.client.sampling import AsyncSamplingClient, new_sampling_client
from tinkex_py.client.server_execution import run_on_service
from tinkex_py.client.service_models import model_info
from tinkex_py.client.session import ClientSession
from tinkex_py.client.submission import NumberedRequest, OptimizerRequest, json_result
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
from tinkex_py.transport.decoding import request_id_of
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
    """Trains one model on the service. Created by `AsyncServiceClient`.

    Requests take effect in the order in which their coroutines start: `asyncio.gather(a, b)` runs a before b. A request
    is not sent if a gradient or update before it did not take effect.

    Args:
        session: the session with the service.
        model_id: id of the model.
        load_tokenizer: returns the tokenizer of a model name.
        base_model: name of the base model, if it is known.
    """

    def __init__(
        self,
        session: ClientSession,
        model_id: str,
        *,
        load_tokenizer: "Callable[[str], Awaitable[Tokenizer]]",
        base_model: str | None = None,
    ) -> None:
        self.model_id = model_id
        self._session = session
        self._load_tokenizer = load_tokenizer
        self._accumulation = Accumulation()
        self._ordering = Ordering(model_id, self._accumulation)
        self._queue = QueueWatch(model_id, session.settings.on_queue_state, self._ordering.check_reason)
        self._model = Model(
            session, model_id, self._ordering, self._accumulation, self._queue, base_model, base_model or model_id
        )
        self._info: GetInfoResponse | None = None
        session.orderings.add(self._ordering)

    @property
    def accumulated(self) -> int:
        """Number of backward passes handed over since the last optimizer step; they cannot be undone."""
        return self._accumulation.count

    @property
    def step(self) -> int:
        """Number of optimizer steps so far, which schedules of regularizer weights receive.

        To resume a run, set it to the number of steps before.
        """
        return self._accumulation.steps

    @step.setter
    def step(self, count: int) -> None:
        self._accumulation.steps = check_count("step", count, least=0)

    @property
    def queue_state(self) -> QueueState:
        """The queue state that the service reported last."""
        return self._queue.state

    # Passes over data

    async def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", *, loss_fn_config: LossConfig | None = None
    ) -> ForwardBackwardOutput:
        """Returns logprobs and loss of the datums, without a change of the model.

        A term of a custom step may call this too; it then runs as part of that step.

        Args:
            data: the datums.
            loss_fn: a loss of the service.
            loss_fn_config: settings of the loss.

        Raises:
            InvalidData: the datums are invalid.
            RequestFailed: the request failed on the service.
        """
        config = loss_config(loss_fn_config)
        async with self._ordering.enter(Kind.READ, "forward", forward_only=True) as turn:
            chunks = checked_chunks(data, loss_fn, config, self._session.config)
            return await turn.send(Pass(self._model, chunks, loss_fn, config))

    async def forward_backward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", *, loss_fn_config: LossConfig | None = None
    ) -> ForwardBackwardOutput:
        """Accumulates the gradient of a loss of the service for the next optimizer step; arguments as `forward`.

        Raises:
            InvalidData: the datums are invalid.
            PrecedingRequestFailed: an earlier request did not take effect, so this one was not sent.
            RequestFailed: the request failed on the service.
        """
        config = loss_config(loss_fn_config)
        async with self._ordering.enter(Kind.GRADIENT, "forward_backward") as turn:
            chunks = checked_chunks(data, loss_fn, config, self._session.config)
            return await turn.send(GradientPass(self._model, chunks, loss_fn, config))

    @shows_options(CustomStepOptions, CUSTOM_STEP_DEFAULTS)
    async def forward_backward_custom(
        self,
        data: Sequence[Datum],
        base_loss: "Term | Pipeline | str",
        *,
        regularizers: "Sequence[RegularizerSpec]" = (),
        **options: Unpack[CustomStepOptions],
    ) -> "CustomLossOutput":
        """Accumulates the gradient of a composed loss for the next optimizer step.

        The service computes logprobs in a forward pass, the terms run in this process, and the gradient of
        `base_loss + sum(weight_i * regularizer_i)` is sent to the service. Of the loss inputs only `target_tokens` and
        `weights` are sent; terms can read all of them.

        Args:
            data: the datums, each with `target_tokens` of `[T]` or `[T, K]`.
            base_loss: a term, the name of a ready-made one such as "ppo", or a ready Pipeline, which excludes
                regularizers and options of a pipeline.
            regularizers: specs with unique names.
            options: see `CustomStepOptions` and `PipelineOptions`.

        Raises:
            UnsupportedFeature: `execution="server"`, and the step cannot run there; or no loss of the service carries
                the gradient of this step unchanged. The message says why.
            RegularizerError: a term failed; no gradient was sent, and the client remains usable.
            PipelineError: the loss cannot be composed, or no term depends on the logprobs.
            InvalidData: the datums or an option are invalid.
            TimeoutExceeded: the deadline passed.
            PrecedingRequestFailed: an earlier request did not take effect, so this one was not sent.
            RequestFailed: the request failed on the service.
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
        """Applies the accumulated gradient and clears it.

        Args:
            params: parameters of AdamW, or of the optimizer that the model was created with; default `AdamParams()`.

        Raises:
            SurrogateMismatch: gradients were scaled for another number of datums than the service holds; not sent.
            PrecedingRequestFailed: an earlier gradient did not take effect, so this request was not sent.
            RequestFailed: the request failed on the service.
        """
        async with self._ordering.enter(Kind.UPDATE, "optim_step") as turn:
            name = "optimizer_params" if isinstance(params, OptimizerParams) else "adam_params"
            if params is not None and not isinstance(params, OptimizerParams):
                check_kind("params", params, AdamParams, "or OptimizerParams")
            body = {name: (AdamParams() if params is None else params).on_the_wire()}
            step = OptimizerRequest(self._session.api, self.model_id, body, self._queue, self._accumulation)
            return OptimStepResponse.read(await turn.send(step))

    async def load_state(
        self, path: str, *, with_optimizer: bool = False, weights_access_token: str | None = None
    ) -> None:
        """Loads a checkpoint; services allow it only as a model's first request.

        Args:
            path: path that `save_state` returned.
            with_optimizer: also restore the state of the optimizer.
            weights_access_token: access to a checkpoint of another user.

        Raises:
            UnsupportedFeature: the model has had another request; use `create_training_client_from_state`.
        """
        is_unused = self._ordering.is_unused
        async with self._ordering.enter(Kind.UPDATE, "load_state") as turn:
            check_text("path", path)
            check_flag("with_optimizer", with_optimizer)
            if weights_access_token is not None:
                check_text("weights_access_token", weights_access_token)
            if not is_unused:
                raise UnsupportedFeature(
                    f"{path!r} cannot be loaded into a model that is in use: create a new client with "
                    "service.create_training_client_from_state(path, with_optimizer=...)"
                )
            body = {"path": path, "optimizer": with_optimizer, **given(weights_access_token=weights_access_token)}
            await turn.send(self._numbered("load_weights", body))

    # Checkpoints and sampling

    async def save_state(
        self,
        name: str,
        *,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> SaveWeightsResponse:
        """Saves weights and optimizer state, as they are after all earlier requests.

        Args:
            name: name of the checkpoint.
            ttl_seconds: seconds until the checkpoint expires; None means never.
            overwrite: replace a checkpoint of this name.
            user_metadata: labels of the checkpoint.

        Returns:
            The path of the checkpoint, for `create_training_client_from_state`.
        """
        async with self._ordering.enter(Kind.READ, "save_state") as turn:
            body = _checkpoint_fields(name, ttl_seconds, user_metadata)
            body |= given(overwrite=check_flag("overwrite", overwrite) or None)
            return SaveWeightsResponse.read(await turn.send(self._numbered("save_weights", body)))

    async def save_weights_for_sampler(
        self, name: str, *, ttl_seconds: int | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> SaveWeightsResponse:
        """Saves weights for sampling, under a name; `service.create_sampling_client` takes the returned path.

        Raises:
            UnsupportedFeature: the service cannot sample.
        """
        saved = await self._save_for_sampler(
            lambda: _checkpoint_fields(name, ttl_seconds, user_metadata), to_sample=False
        )
        return SaveWeightsResponse.read(saved)

    async def _save_for_sampler(self, fields: Callable[[], dict[str, Any]], *, to_sample: bool) -> Mapping[str, Any]:
        endpoint = "save_weights_for_sampler"
        with reported_as_unsupported(self._session.api.host, endpoint):
            async with self._ordering.enter(Kind.READ, endpoint) as turn:
                if to_sample:
                    await self._session.models.check_any("sample")
                try:
                    return await turn.send(self._numbered(endpoint, fields()))
                except RequestFailed as error:
                    if was_not_counted(error):
                        self._ordering.give_back(turn)
                    raise

    async def save_weights_and_get_sampling_client(
        self, name: str | None = None, *, inflight: bool = False, record_stability_info: bool = False
    ) -> AsyncSamplingClient:
        """Creates a sampling client for the weights as they are after all earlier requests.

        Args:
            name: also keep the weights as a checkpoint of this name; None keeps them for the sampling client only.
            inflight: the sampling client follows later saves with `inflight=True`.
            record_stability_info: the service records what `stable_reinforce` needs of every sample.

        Raises:
            InvalidData: both a name and `inflight` were given.
            UnsupportedFeature: the service cannot sample.
        """
        recording = check_flag("record_stability_info", record_stability_info)
        if name is not None:
            if check_flag("inflight", inflight):
                raise InvalidData("inflight weights have no name: omit name or inflight")
            saved = await self._save_for_sampler(lambda: _checkpoint_fields(name, None, None), to_sample=True)
            path = SaveWeightsResponse.read(saved).path
            return await new_sampling_client(self._session, model_path=path, record_stability_info=recording)
        kind = given(kind="inflight" if check_flag("inflight", inflight) else None)
        saved = await self._save_for_sampler(
            lambda: {"sampling_session_seq_id": next(self._session.sampler_numbers), **kind}, to_sample=True
        )
        sampling_session_id = SaveWeightsForSamplerResponse.read(saved).sampling_session_id
        if sampling_session_id is None:
            raise InvalidResponse("save_weights_for_sampler returned no sampling_session_id")
        return AsyncSamplingClient(self._session, sampling_session_id, record_stability_info=recording)

    # About the model

    async def get_info(self) -> GetInfoResponse:
        """Returns the model that is trained."""
        self._ordering.check_loop()
        if isinstance(self._ordering.lost, ClientClosed):
            raise ClientClosed("this training client is closed: create a new one")
        if self._info is None:
            self._info = await model_info(self._session.api, self.model_id)
        return self._info

    @property
    def certificate(self) -> Certificate | None:
        """The certificate by which `surrogate="auto"` chose; None if none was needed so far."""
        return self._session.surrogates.certified.get(self._model.key)

    async def get_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of the model: that of the embedded service, else loaded with transformers.

        Raises:
            MissingExtra: transformers is not installed.
            UnsupportedFeature: the service does not name the tokenizer.
        """
        info = await self.get_info()
        name = info.model_data.tokenizer_id or info.model_data.model_name or info.model_name
        if name is None:
            raise UnsupportedFeature("the service does not name the model's tokenizer: load it yourself")
        return await self._load_tokenizer(name.partition(":")[0])

    # Closing

    async def unload(self) -> None:
        """Closes the client as `aclose` does, and frees its model on the service. Unsaved weights are gone.

        Raises:
            UnsupportedFeature: the service frees models at the end of their session only.
            NotFound: the model was freed before.
        """
        await self.aclose()
        api = self._session.api
        body = {"model_id": self.model_id, "type": "unload_model"}
        with reported_as_unsupported(api.host, "unloading models"):
            request_id = await api.send(request("POST", "/api/v1/unload_model", json=body), request_id_of)
            await json_result(api, request_id, "UnloadModel")

    async def aclose(self) -> None:
        """Closes the client and waits up to `config.close_timeout` seconds for requests in flight. Idempotent.

        Raises:
            ClientClosed: the client belongs to another event loop; close it there.
        """
        self._ordering.check_loop()
        self._ordering.end(ClientClosed("this training client is closed: create a new one"))
        await self._ordering.drain(self._session.settings.close_timeout)

    async def __aenter__(self) -> "AsyncTrainingClient":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def _numbered(self, endpoint: str, body: Mapping[str, Any]) -> NumberedRequest:
        return NumberedRequest(self._session.api, self.model_id, endpoint, body, self._queue)


def _checkpoint_fields(name: str, ttl_seconds: int | None, user_metadata: Mapping[str, str] | None) -> dict[str, Any]:
    labels = None if user_metadata is None else check_labels("user_metadata", user_metadata)
    seconds = None if ttl_seconds is None else check_count("ttl_seconds", ttl_seconds, least=1)
    return {"path": check_name(name), **given(ttl_seconds=seconds, user_metadata=labels)}
