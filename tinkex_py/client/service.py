"""The service client: opens and closes one session, and creates the other clients."""

import asyncio
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from tinkex_py import telemetry
from tinkex_py.arguments import check_flag, check_path, check_text
from tinkex_py.client.arguments import given
from tinkex_py.client.certificates import Certificate
from tinkex_py.client.rest import AsyncRestClient
from tinkex_py.client.rest_requests import RestRequests
from tinkex_py.client.sampling import AsyncSamplingClient, new_sampling_client
from tinkex_py.client.service_models import (
    load_fields,
    lora_config_of,
    lora_settings,
    model_labels,
    tokenizer_by_name,
)
from tinkex_py.client.session import ClientSession, warn_left_open
from tinkex_py.client.submission import json_result
from tinkex_py.client.surrogate import SUMMED, SURROGATES, SurrogateName
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.config import TinkexConfig, checked_config, names_service
from tinkex_py.errors import APIStatusError, ClientClosed, ConfigError, TimeoutExceeded
from tinkex_py.limits import running_loop
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.threads import import_before_threads, in_own_thread
from tinkex_py.transport.adapters import InProcessTransport, client_transport
from tinkex_py.transport.api import ServiceApi
from tinkex_py.transport.auth import Auth
from tinkex_py.transport.decoding import fields_of, request_id_of, text_of
from tinkex_py.transport.http import LONGEST_RESPONSE, HttpClient, Transport
from tinkex_py.transport.messages import Secret, request
from tinkex_py.transport.secrecy import hides_arguments
from tinkex_py.types import LoraConfig, ServerCapabilities, ServiceFeatures, Tokenizer, WeightsInfo

if TYPE_CHECKING:
    from pathlib import Path

    from tinkex_py.certify.models import Cost
    from tinkex_py.local import LocalService

EMBEDDED_ADDRESS = "http://embedded"
_EMBEDDED: Mapping[str, Any] = {"base_url": EMBEDDED_ADDRESS, "api_key": "tml-embedded"}
# Statuses of services that only load checkpoints into an existing model.
_NO_CREATE_BY_LOADING = frozenset({400, 404, 405, 422})


class AsyncServiceClient:
    """A client of one service, with one session. Does no I/O before `async with` or the first call.

    Args:
        config: settings; default `TinkexConfig()`, which reads the environment.
        base_url: address of the service, without a config; as in `TinkexConfig`.
        api_key: key, without a config; as in `TinkexConfig`.
        http_client: a client with httpx's interface that sends all requests; its owner closes it.

    Raises:
        ConfigError: the key is missing, a setting is invalid, or an address or key was given beside a config.
    """

    @hides_arguments
    def __init__(
        self,
        config: TinkexConfig | None = None,
        *,
        base_url: str | None = None,
        api_key: str | Secret | None = None,
        http_client: object | None = None,
    ) -> None:
        transport = client_transport(http_client)
        single = given(base_url=base_url, api_key=api_key)
        if config is not None and single:
            raise ConfigError(f"pass either config or {' and '.join(single)}: a config has both")
        self._prepare(checked_config(config) or TinkexConfig(**single), transport=transport, embedded=None)

    def _prepare(self, settings: TinkexConfig, *, transport: Transport | None, embedded: "LocalService | None") -> None:
        self.config = settings
        self._embedded = embedded
        self._http, self._polls = (
            HttpClient(
                base_url=settings.base_url,
                transport=transport,
                timeout=settings.timeout,
                max_connections=connections,
                headers={**settings.access_headers, **settings.default_headers},
                max_response_bytes=min(longest, settings.max_response_bytes),
            )
            for connections, longest in (
                (settings.max_connections, LONGEST_RESPONSE),
                (settings.max_polls, settings.max_response_bytes),
            )
        )
        auth = Auth(settings.secret_key, settings.credential_command)
        self._api = ServiceApi(self._http, self._polls, auth, retry=settings.retry, poll_timeout=settings.poll_timeout)
        self._workers = WorkerPool(settings.max_threads, settings.max_processes)
        # The embedded service follows the protocol; other services are measured.
        surrogate = None if embedded is None else SUMMED
        self._session = ClientSession(settings, self._api, self._workers, surrogate=surrogate)
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finalizer: weakref.finalize[..., AsyncServiceClient] | None = None
        self._has_session = False
        self._closed = False

    @classmethod
    @hides_arguments
    def from_env(cls, *, local: str | None = None, **settings: Any) -> "AsyncServiceClient":
        """Creates a client for the service that the environment names.

        Args:
            local: model of an embedded service, as in `AsyncServiceClient.local`, which is used if neither the
                environment (`TINKER_BASE_URL`, `TINKER_API_KEY`, `TINKER_CREDENTIAL_CMD`) nor `settings` has an address
                or a key. None: the hosted service then, with the key of `~/.tinker/credentials.json`.
            settings: further fields of TinkexConfig.
        """
        if local is None or names_service(settings):
            return cls(TinkexConfig(**settings))
        return cls.local(local, config=TinkexConfig(**{**settings, **_EMBEDDED}))

    @classmethod
    @hides_arguments
    def local(
        cls,
        model: str = "tiny",
        *,
        state_dir: "Path | str | None" = None,
        device: str | None = None,
        config: TinkexConfig | None = None,
        **options: Any,
    ) -> "AsyncServiceClient":
        """Creates a client with an embedded service in this process. Entering it, or its first call, loads the model.

        Args:
            model: "tiny", "smollm2", or a local Hugging Face folder.
            state_dir: folder for checkpoints, runs and sessions, which survive restarts; None uses a temporary folder
                that is removed at the end.
            device: "cpu", "cuda" or "mps"; None selects one.
            config: timeouts and limits; its address and key are ignored.
            options: further options of the embedded service.

        Raises:
            MissingExtra: a required package is not installed.
        """
        from tinkex_py.local import LocalOptions, LocalService

        folder = None if state_dir is None else check_path("state_dir", state_dir, error=ConfigError)
        embedded = LocalService(LocalOptions(model=model, state_dir=folder, device=device, **options))
        client = cls.__new__(cls)
        settings = checked_config(config) or TinkexConfig(**_EMBEDDED)
        client._prepare(settings, transport=InProcessTransport(embedded.app), embedded=embedded)
        return client

    # Models

    async def create_lora_training_client(
        self,
        base_model: str | None = None,
        *,
        rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        lora_config: LoraConfig | None = None,
        user_metadata: Mapping[str, str] | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
    ) -> AsyncTrainingClient:
        """Creates a model with new LoRA adapters. Settings that are None have the defaults of `LoraConfig`.

        Args:
            base_model: name of the base model; `get_server_capabilities` lists them. None: the only one.
            rank: inner dimension of the adapters; default 32.
            seed: seed of the initial weights; by default the service chooses.
            train_mlp: adapt the feed-forward layers; default True.
            train_attn: adapt the attention layers; default True.
            train_unembed: adapt the output layer; default True.
            lora_config: these settings in one value.
            user_metadata: labels of the model.
            optimizer_config: optimizer, such as `{"type": "dimuon", "version": 1}`; None means AdamW.

        Raises:
            ConfigError: both `lora_config` and single settings were given, or no model, and the service has several.
            UnsupportedFeature: the service lists only another model, or cannot train this one.
            RequestFailed, APIStatusError: the service does not have this model.
        """
        parts = {"train_mlp": train_mlp, "train_attn": train_attn, "train_unembed": train_unembed}
        settings = lora_settings(lora_config, rank=rank, seed=seed, **parts)
        if base_model is not None:
            check_text("base_model", base_model)
        labels = model_labels(user_metadata, optimizer_config)
        session = await self._connected()
        base_model = base_model or await session.models.only("train")
        await session.models.check(base_model, "train")
        body: dict[str, Any] = {
            "session_id": session.session_id,
            "model_seq_id": next(session.model_numbers),
            "base_model": base_model,
            "lora_config": settings.model_dump(exclude_none=True),
            "type": "create_model",
            **labels,
        }
        try:
            request_id = await self._api.send(request("POST", "/api/v1/create_model", json=body), request_id_of)
        except TimeoutExceeded as error:
            error.add_note(f"check the name {base_model!r}: some services do not respond for a model that they lack")
            raise
        model_id = text_of(await json_result(self._api, request_id, "CreateModel"), "model_id", "create_model")
        return self._training_client(model_id, base_model)

    async def create_training_client_from_state(
        self,
        path: str,
        *,
        with_optimizer: bool = False,
        user_metadata: Mapping[str, str] | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        weights_access_token: str | None = None,
    ) -> AsyncTrainingClient:
        """Creates a model from a checkpoint.

        Args:
            path: path that `save_state` returned.
            with_optimizer: also restore the state of the optimizer, so that training continues as without a stop.
            user_metadata: labels of the model.
            optimizer_config: optimizer, unless its state is restored; None means AdamW.
            weights_access_token: access to a checkpoint of another user.

        Raises:
            ConfigError: both `optimizer_config` and `with_optimizer` were given.
            RequestFailed, APIStatusError: the checkpoint does not exist.
        """
        labels = model_labels(user_metadata, optimizer_config)
        loading = load_fields(path, with_optimizer, optimizer_config, weights_access_token)
        session = await self._connected()
        number = next(session.model_numbers)
        body = {"session_id": session.session_id, "model_seq_id": number, **loading, **labels}
        try:
            request_id = await self._api.send(request("POST", "/api/v1/load_weights", json=body), request_id_of)
        except APIStatusError as error:
            if error.status not in _NO_CREATE_BY_LOADING:
                raise
            training = await self._create_for(path, weights_access_token, user_metadata, optimizer_config)
            await training.load_state(path, with_optimizer=with_optimizer, weights_access_token=weights_access_token)
            return training
        fields = await json_result(self._api, request_id, "LoadWeights")
        if fields.get("model_id"):
            return self._training_client(text_of(fields, "model_id", "load_weights"))
        return self._training_client(f"{session.session_id}:train:{number}")

    async def _create_for(
        self,
        path: str,
        token: str | None,
        user_metadata: Mapping[str, str] | None,
        optimizer_config: Mapping[str, Any] | None,
    ) -> AsyncTrainingClient:
        fields = {"tinker_path": path, **given(weights_access_token=token)}
        info = WeightsInfo.read(await self._api.send(request("POST", "/api/v1/weights_info", json=fields), fields_of))
        return await self.create_lora_training_client(
            info.base_model,
            lora_config=lora_config_of(info),
            user_metadata=user_metadata,
            optimizer_config=optimizer_config,
        )

    async def create_sampling_client(
        self, *, base_model: str | None = None, model_path: str | None = None, record_stability_info: bool = False
    ) -> AsyncSamplingClient:
        """Creates a client that samples from a base model, by default the only one, or from a checkpoint for sampling.

        With `record_stability_info`, the service records what `stable_reinforce` needs of every sample.

        Raises:
            ConfigError: both were given, or neither, and the service does not have exactly one model.
            UnsupportedFeature: the service cannot sample, or not from this model.
        """
        if base_model is not None and model_path is not None:
            raise ConfigError("pass base_model or model_path, not both")
        for name, value in given(base_model=base_model, model_path=model_path).items():
            check_text(name, value)
        recording = check_flag("record_stability_info", record_stability_info)
        session = await self._connected()
        return await new_sampling_client(session, base_model, model_path, record_stability_info=recording)

    def create_rest_client(self) -> AsyncRestClient:
        """Creates a client for training runs, checkpoints and sessions. It needs no session."""
        return AsyncRestClient(RestRequests(self._api, self.config.retry, self._reachable))

    async def get_server_capabilities(self) -> ServerCapabilities:
        """Returns the models of the service."""
        await self._connected()
        asking = request("GET", "/api/v1/get_server_capabilities")
        return ServerCapabilities.read(await self._api.send(asking, fields_of))

    async def get_features(self) -> ServiceFeatures:
        """Returns the encoding and the features of the service; trains and samples nothing.

        Raises:
            APIStatusError, TransportError: the service returned no usable response.
        """
        session = await self._connected()
        encoding = await session.encoding.choose()
        return ServiceFeatures(wire=encoding.name, uploaded_losses=session.config.custom_loss_server_side)

    async def certify_gradients(
        self,
        model: str | None = None,
        *,
        rank: int = 8,
        surrogates: Sequence[SurrogateName] = tuple(SURROGATES),
        max_models: int = 2,
        on_cost: "Callable[[Cost], object] | None" = None,
    ) -> Certificate:
        """Measures which surrogate carries the gradient of a custom loss unchanged; `surrogate="auto"` then uses it.

        It trains throwaway models for one step each, and compares the changes of their logprobs. They are removed at
        the end, also after a failure or a cancellation. The result is stored in `config.certificates`.

        Args:
            model: name of the base model; None means the only model of the service.
            rank: rank of the throwaway models.
            surrogates: the surrogates to measure, in order; the first that passes ends the measurement.
            max_models: maximum number of throwaway models at a time.
            on_cost: called with the largest possible cost before anything is created.

        Raises:
            InvalidData: an argument is invalid, or the service has several models and none was named.
            ConfigError: the certificate cannot be stored.
        """
        from tinkex_py.certify.measurement import MeasurementPlan, certify

        plan = MeasurementPlan(model, rank, surrogates, max_models)
        return await certify(self, await self._connected(), plan, on_cost)

    async def get_tokenizer(self, name: str | None = None) -> Tokenizer:
        """Returns the tokenizer of a base model: that of the embedded service, else loaded with transformers.

        Args:
            name: the model, a folder, or any other name that transformers accepts. None: the only model.

        Raises:
            ConfigError: the embedded service does not have this model; or there is no name, and several models.
            MissingExtra: transformers is not installed.
            UnsupportedFeature: there is no tokenizer of this name.
        """
        if name is None:
            name = await (await self._connected()).models.only("train")
        check_text("name", name)
        if self._embedded is not None:
            await self._reachable()
            return self._embedded.tokenizer_for(name)
        self._check_usable()
        return await self._load_tokenizer(name)

    def _training_client(self, model_id: str, base_model: str | None = None) -> AsyncTrainingClient:
        return AsyncTrainingClient(self._session, model_id, load_tokenizer=self._load_tokenizer, base_model=base_model)

    async def _load_tokenizer(self, name: str) -> Tokenizer:
        if self._embedded is not None:
            return self._embedded.tokenizer
        import_before_threads("transformers")
        return await in_own_thread("tinkex-tokenizer", lambda: tokenizer_by_name(name))

    # Opening and closing

    async def _connected(self) -> ClientSession:
        self._check_usable()
        async with self._opening:
            if not self._has_session:
                await self._open()
        return self._session

    async def _reachable(self) -> None:
        """Prepares requests that need no session."""
        self._check_usable()
        async with self._opening:
            if self._embedded is not None:
                await self._embedded.start()
            await self._session.prepare()
            self._warn_if_left_open()

    async def _open(self) -> None:
        with telemetry.lifecycle("tinkex.session", {"base_url": self.config.base_url}):
            if self._embedded is not None:
                await self._embedded.start()
            await self._session.open(self)
        self._has_session = True
        self._warn_if_left_open()

    def _warn_if_left_open(self) -> None:
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, warn_left_open, self.config.base_url)
            self._finalizer.atexit = False

    def _check_usable(self) -> None:
        if self._closed:
            raise ClientClosed("this service client is closed: create a new one")
        self._check_loop()

    def _check_loop(self) -> None:
        loop = running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise ClientClosed(
                "this service client belongs to another event loop, that of its first call: create one client per loop"
            )

    async def aclose(self) -> None:
        """Ends the session and waits up to `config.close_timeout` seconds for requests in flight. Idempotent.

        No task, socket, file or thread remains, except threads of abandoned terms, which end when the term returns.

        Raises:
            ClientClosed: the client belongs to another event loop; close it there.
        """
        if self._closed:
            return
        self._check_loop()
        self._closed = True
        if self._finalizer is not None:
            self._finalizer.detach()
        async with AsyncExitStack() as stack:
            if self._embedded is not None:
                stack.push_async_callback(self._embedded.stop)
            stack.callback(self._workers.close)
            stack.push_async_callback(self._http.aclose)
            stack.push_async_callback(self._polls.aclose)
            stack.push_async_callback(self._session.close)
            stack.push_async_callback(self._session.close_orderings)

    async def __aenter__(self) -> "AsyncServiceClient":
        self._check_usable()
        try:
            await self._connected()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncServiceClient(base_url={self.config.base_url!r}, closed={self._closed})"
