"""Routes of training: a model's ordered work, which is passes, optimizer steps and saves, and uploaded losses."""

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, cast

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from tinkex_py.errors import InvalidData
from tinkex_py.local import wire_format
from tinkex_py.local.bodies import SMALL_BODY, parse_pass
from tinkex_py.local.core import INFLIGHT, Core, Refused, SamplingSession
from tinkex_py.local.data import EnginePass
from tinkex_py.local.http import (
    JSON_VALUE,
    PROTOBUF,
    Route,
    Running,
    UnicodeJSONResponse,
    api_router,
    body_schema,
    core_of,
    digest_of,
    in_order,
    json_digest,
    problems,
    read_json,
    size_of,
)
from tinkex_py.local.records import CheckpointInfo, Kind, expiry
from tinkex_py.local.results import Success
from tinkex_py.local.schemas import (
    CustomLossBody,
    ForwardBackwardBody,
    ForwardBody,
    OptimStepBody,
    PassInput,
    SaveWeightsBody,
    SubmittedResponse,
)
from tinkex_py.transport import wire
from tinkex_py.types import AdamParams

KEEP_GRAPH_HEADER = "x-tinkex-keep-graph"


class NumberedRoute(Route):
    """A route whose refused requests use up their number, because later numbers would wait for it forever."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns a handler that spends the number of an invalid body."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                _spend(request, error.body)
                raise

        return handled


def _spend(request: Request, body: object) -> None:
    fields = cast("dict[str, object]", body) if isinstance(body, dict) else {}
    core: Core | None = request.app.state.service.core
    number = fields.get("seq_id")
    if core is not None and isinstance(number, int):
        core.spend(str(fields.get("model_id")), number)


router = api_router(route_class=NumberedRoute)


@router.post(
    "/forward_backward",
    response_model=SubmittedResponse,
    openapi_extra=body_schema(ForwardBackwardBody, or_protobuf=True),
)
async def forward_backward(request: Request) -> Response:
    """Runs a forward or forward_backward pass, in protobuf or JSON."""
    core = await core_of(request)
    if request.headers.get("content-type") == PROTOBUF:
        submitted = await _protobuf_pass(request, core, await request.body())
    else:
        submitted = await _json_pass(request, core)
    return UnicodeJSONResponse(submitted.model_dump())


@router.post("/forward")
async def forward(body: ForwardBody, request: Request, core: Running) -> SubmittedResponse:
    """Runs a forward pass in JSON."""
    read = _json_reader(request, core, body.forward_input, forward_only=True)
    return await in_order(request, core, body, _pass(core, body.model_id, read))


async def _json_pass(request: Request, core: Core) -> SubmittedResponse:
    try:
        body = read_json(request, ForwardBackwardBody)
    except RequestValidationError as error:
        _spend(request, error.body)
        raise
    read = _json_reader(request, core, body.forward_backward_input, forward_only=body.forward_only)
    return await in_order(request, core, body, _pass(core, body.model_id, read))


async def _protobuf_pass(request: Request, core: Core, body: bytes) -> SubmittedResponse:
    def read_message() -> tuple[wire.ForwardBackwardRequest, bytes]:
        message = parse_pass(body)
        # Maps have no order on the wire: only the deterministic form is the same for every repeat.
        return message, digest_of(request, [message.SerializeToString(deterministic=True)])

    message, digest = await core.aside(read_message) if len(body) > SMALL_BODY else read_message()
    config: dict[str, float | str] = {
        key: value.text if value.WhichOneof("value") == "text" else value.number
        for key, value in message.loss_fn_config_v2.items()
    }
    read = EnginePass(
        data=lambda: wire_format.datums_from_protobuf(message.data, _room(core)),
        loss_fn=message.loss_fn,
        config=config or dict(message.loss_fn_config),
        forward_only=message.forward_only,
        keep_graph=_keeps_graph(request),
    )
    work = _pass(core, message.model_id, lambda: read)
    request_id = core.in_order(message.model_id, message.seq_id, digest, size_of(request), work)
    return SubmittedResponse(request_id=request_id, model_id=message.model_id)


def _json_reader(request: Request, core: Core, value: Any, *, forward_only: bool) -> Callable[[], EnginePass]:
    keep = _keeps_graph(request)

    def read() -> EnginePass:
        try:
            body = PassInput.model_validate(value)
        except ValidationError as error:
            raise InvalidData(problems(error.errors(include_input=False))) from None
        return EnginePass(
            data=lambda: wire_format.datums_from_json(body.data, _room(core)),
            loss_fn=body.loss_fn,
            config=body.loss_fn_config,
            forward_only=forward_only,
            keep_graph=keep,
        )

    return read


def _room(core: Core) -> wire_format.DenseRoom:
    return wire_format.DenseRoom(core.engine.model.vocabulary_size, core.options.max_body_bytes)


def _keeps_graph(request: Request) -> bool:
    return request.headers.get(KEEP_GRAPH_HEADER) == "1"


def _pass(core: Core, model_id: str, read: Callable[[], EnginePass]) -> Callable[[], Success]:
    """Returns a pass as work for the engine, whose thread also decodes its data."""

    def work() -> Success:
        result = core.engine.run_pass(model_id, read())
        return Success(lambda: wire_format.pass_json(result), wire_format.pass_protobuf(result))

    return work


@router.post("/optim_step")
async def optim_step(body: OptimStepBody, request: Request, core: Running) -> SubmittedResponse:
    """Runs an AdamW step."""

    def work() -> Success:
        metrics = core.engine.optim_step(body.model_id, _adam_params(body))
        return Success(lambda: {"metrics": metrics, "type": "optim_step"})

    return await in_order(request, core, body, work)


def _adam_params(body: OptimStepBody) -> AdamParams:
    if body.optimizer_params is None:
        return AdamParams(**body.adam_params.model_dump())
    kind = body.optimizer_params.get("type")
    if kind != "adamw":
        raise InvalidData(f"optimizer {kind!r} is not supported. Supported: adam_params, or optimizer_params 'adamw'")
    given = {key: value for key, value in body.optimizer_params.items() if value is not None}
    return AdamParams(**{key: value for key, value in given.items() if key in AdamParams.model_fields})


@router.post("/save_weights")
async def save_weights(body: SaveWeightsBody, request: Request, core: Running) -> SubmittedResponse:
    """Saves a training checkpoint: weights and optimizer state."""

    def work() -> Success:
        saved = _save(core, body, _named(body, "save_weights"), "weights")
        return Success(lambda: {"path": saved.path, "type": "save_weights"})

    return await in_order(request, core, body, work)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(body: SaveWeightsBody, request: Request, core: Running) -> SubmittedResponse:
    """Saves weights to sample from: under a name, or as a new sampling session."""

    def work() -> Success:
        if body.path is None and body.sampling_session_seq_id is not None:
            return _unnamed_sampler(core, body, body.sampling_session_seq_id)
        name = _named(body, "save_weights_for_sampler", ", or sampling_session_seq_id")
        saved = _save(core, body, name, "sampler_weights")
        return Success(lambda: {"path": saved.path, "type": "save_weights_for_sampler"})

    return await in_order(request, core, body, work)


def _unnamed_sampler(core: Core, body: SaveWeightsBody, number: int) -> Success:
    """A sampling session on the current weights; all inflight ones use a checkpoint that later saves replace."""
    if body.kind not in ("snapshot", "inflight"):
        raise InvalidData(f"kind={body.kind!r} is not supported. Supported: 'snapshot', 'inflight'")
    inflight = body.kind == "inflight"
    saved = _save(core, body, INFLIGHT if inflight else f"sample-{number}", "ephemeral")
    sampler_id = f"{body.model_id.partition(':')[0]}:sample:{number}"
    sampler = (
        SamplingSession(sampler_id, inflight_of=body.model_id)
        if inflight
        else SamplingSession(sampler_id, snapshot=saved)
    )

    def register() -> None:
        core.samplers[sampler_id] = sampler

    return Success(lambda: {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}, then=register)


@router.post("/save_weights_external")
async def save_weights_external(body: SaveWeightsBody, request: Request, core: Running) -> SubmittedResponse:
    """Saves weights whose files can be downloaded separately."""

    def work() -> Success:
        saved = _save(core, body, _named(body, "save_weights_external"), "external_weights")
        return Success(lambda: {"path": saved.path, "size_bytes": saved.size_bytes, "type": "save_weights_external"})

    return await in_order(request, core, body, work)


def _named(body: SaveWeightsBody, call: str, alternative: str = "") -> str:
    if body.path is None:
        raise InvalidData(f"{call} needs a name in `path`{alternative}")
    return body.path


def _save(core: Core, body: SaveWeightsBody, name: str, kind: Kind) -> CheckpointInfo:
    run = core.engine.run_info(body.model_id)
    if run is None:
        raise InvalidData(f"model {body.model_id!r} is not loaded")
    info = CheckpointInfo(
        run=run,
        kind=kind,
        name=name,
        folder="",
        time=datetime.now(UTC),
        user_metadata=body.user_metadata,
        expires_at=expiry(body.ttl_seconds),
    )
    # Older clients do not send `overwrite`: only an explicit false protects a name.
    overwrite = kind == "ephemeral" or body.overwrite is not False
    return core.engine.save(body.model_id, info, overwrite=overwrite, recipients=body.age_encryption_recipients)


@router.post("/create_custom_loss")
async def create_custom_loss(body: CustomLossBody, request: Request, core: Running) -> SubmittedResponse:
    """Checks a traced loss, and keeps it for its session."""
    if not core.options.custom_losses:
        raise Refused(
            404, "this service accepts no uploaded losses: start it with custom_losses=True or --custom-losses"
        )
    core.open_session(body.session_id)
    fields: dict[str, Any] = request.scope[JSON_VALUE]

    def work() -> Success:
        loss_id = core.engine.custom_losses.add(body.session_id, body.custom_loss_seq_id, fields)
        return Success(lambda: {"loss_id": loss_id, "type": "create_custom_loss"})

    scope, size = ("custom_loss_seq_id", body.session_id, body.custom_loss_seq_id), size_of(request)
    request_id = core.numbered(scope, await json_digest(request, core), lambda: core.submit(work, size))
    return SubmittedResponse(request_id=request_id)
