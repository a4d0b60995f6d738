"""Routes of training: a model's ordered work, which is passes, optimizer steps and saves; and uploaded losses."""

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, cast

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from tinkex_py.errors import InvalidData, UnsupportedFeature
from tinkex_py.local import wire_format
from tinkex_py.local.core import INFLIGHT, Core, Refused, SamplingSession
from tinkex_py.local.data import EnginePass
from tinkex_py.local.http import (
    PROTOBUF,
    AnyTextResponse,
    Route,
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
from tinkex_py.local.records import CheckpointInfo, TrainingRunInfo, expiry
from tinkex_py.local.requests import (
    CustomLossBody,
    ForwardBackwardBody,
    ForwardBody,
    OptimStepBody,
    PassInput,
    SaveWeightsBody,
)
from tinkex_py.local.responses import SubmittedResponse
from tinkex_py.local.results import Success
from tinkex_py.transport import wire
from tinkex_py.types import AdamParams

KEEP_GRAPH_HEADER = "x-tinkex-keep-graph"


class NumberedRoute(Route):
    """A refused request of a training model still uses its number up, or everything behind it would wait for ever."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, which spends the number of a body that is malformed."""
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
    sequencer = core.sequencers.get(str(fields.get("model_id"))) if core is not None else None
    number = fields.get("seq_id")
    if sequencer is not None and isinstance(number, int):
        sequencer.spend(number)


router = api_router(route_class=NumberedRoute)


@router.post(
    "/forward_backward",
    response_model=SubmittedResponse,
    openapi_extra=body_schema(ForwardBackwardBody, or_protobuf=True),
)
async def forward_backward(request: Request) -> Response:
    """A pass in protobuf (backward, or forward only) or in the JSON form."""
    if request.headers.get("content-type") == PROTOBUF:
        submitted = _protobuf_pass(request, await request.body())
    else:
        submitted = await _json_pass(request)
    return AnyTextResponse(submitted.model_dump())


async def _json_pass(request: Request) -> SubmittedResponse:
    try:
        body = await read_json(request, ForwardBackwardBody)
    except RequestValidationError as error:
        _spend(request, error.body)
        raise
    read = _json_reader(request, body.forward_backward_input, forward_only=body.forward_only)
    return await in_order(request, body, _pass(core_of(request), body.model_id, read))


@router.post("/forward")
async def forward(body: ForwardBody, request: Request) -> SubmittedResponse:
    """A forward pass in the JSON form."""
    read = _json_reader(request, body.forward_input, forward_only=True)
    return await in_order(request, body, _pass(core_of(request), body.model_id, read))


def _pass(core: Core, model_id: str, read: Callable[[], EnginePass]) -> Callable[[], Success]:
    """A pass as work of the engine, whose thread then reads its inner part too."""

    def work() -> Success:
        result = core.engine.run_pass(model_id, read())
        return Success(lambda: wire_format.pass_json(result), wire_format.pass_protobuf(result))

    return work


def _keeps_graph(request: Request) -> bool:
    return request.headers.get(KEEP_GRAPH_HEADER) == "1"


def _protobuf_pass(request: Request, body: bytes) -> SubmittedResponse:
    try:
        message = wire.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise Refused(400, "the body is no ForwardBackwardRequest in protobuf") from None
    config: dict[str, float | str] = {
        key: value.text if value.WhichOneof("value") == "text" else value.number
        for key, value in message.loss_fn_config_v2.items()
    }
    read = EnginePass(
        data=lambda: wire_format.datums_from_protobuf(message.data),
        loss_fn=message.loss_fn,
        config=config or dict(message.loss_fn_config),
        forward_only=message.forward_only,
        keep_graph=_keeps_graph(request),
    )
    # Maps have no order on the wire: only the deterministic form is the same for every repeat.
    digest = digest_of(request, message.SerializeToString(deterministic=True))
    core = core_of(request)
    work = _pass(core, message.model_id, lambda: read)
    request_id = core.in_order(message.model_id, message.seq_id, digest, size_of(request), work)
    return SubmittedResponse(request_id=request_id, model_id=message.model_id)


def _json_reader(request: Request, value: Any, *, forward_only: bool) -> Callable[[], EnginePass]:
    keep = _keeps_graph(request)

    def read() -> EnginePass:
        try:
            body = PassInput.model_validate(value)
        except ValidationError as error:
            raise InvalidData(problems(error.errors(include_input=False))) from None
        return EnginePass(
            data=lambda: wire_format.datums_from_json(body.data),
            loss_fn=body.loss_fn,
            config=body.loss_fn_config,
            forward_only=forward_only,
            keep_graph=keep,
        )

    return read


@router.post("/optim_step")
async def optim_step(body: OptimStepBody, request: Request) -> SubmittedResponse:
    """One AdamW step."""
    core = core_of(request)

    def work() -> Success:
        metrics = core.engine.optim_step(body.model_id, _adam_params(body))
        return Success(lambda: {"metrics": metrics, "type": "optim_step"})

    return await in_order(request, body, work)


def _adam_params(body: OptimStepBody) -> AdamParams:
    if body.optimizer_params is None:
        return AdamParams(**body.adam_params.model_dump())
    kind = body.optimizer_params.get("type")
    if kind != "adamw":
        raise InvalidData(f"optimizer {kind!r} is not known here. Known: adam_params, or optimizer_params 'adamw'")
    given = {key: value for key, value in body.optimizer_params.items() if value is not None}
    return AdamParams(**{key: value for key, value in given.items() if key in AdamParams.model_fields})


@router.post("/save_weights")
async def save_weights(body: SaveWeightsBody, request: Request) -> SubmittedResponse:
    """A training checkpoint: weights and optimizer state."""
    core = core_of(request)

    def work() -> Success:
        if body.path is None:
            raise InvalidData("save_weights needs a name in `path`")
        saved = _save(core, body, body.path, "weights")
        return Success(lambda: {"path": saved.path, "type": "save_weights"})

    return await in_order(request, body, work)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(body: SaveWeightsBody, request: Request) -> SubmittedResponse:
    """Weights to sample from: under a name, or as a sampling session that is ready to use."""
    core = core_of(request)

    def work() -> Success:
        if body.path is not None:
            saved = _save(core, body, body.path, "sampler_weights")
            return Success(lambda: {"path": saved.path, "type": "save_weights_for_sampler"})
        if body.sampling_session_seq_id is None:
            raise InvalidData("save_weights_for_sampler needs a name in `path`, or sampling_session_seq_id")
        return _nameless_sampler(core, body, body.sampling_session_seq_id)

    return await in_order(request, body, work)


def _nameless_sampler(core: Core, body: SaveWeightsBody, number: int) -> Success:
    """A sampling session on the weights as they are; inflight ones share one checkpoint that later saves replace."""
    if body.kind not in ("snapshot", "inflight"):
        raise InvalidData(f"kind={body.kind!r} is not known here. Known: 'snapshot', 'inflight'")
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
async def save_weights_external(body: SaveWeightsBody, request: Request) -> SubmittedResponse:
    """Weights whose files can be downloaded one by one."""
    core = core_of(request)

    def work() -> Success:
        if body.age_encryption_recipients:
            raise UnsupportedFeature("the embedded service cannot encrypt: leave age_encryption_recipients out")
        if body.path is None:
            raise InvalidData("save_weights_external needs a name in `path`")
        saved = _save(core, body, body.path, "external_weights")
        return Success(
            lambda: {"path": saved.path, "size_bytes": saved.size_bytes, "type": "save_weights_external"},
        )

    return await in_order(request, body, work)


def _save(core: Core, body: SaveWeightsBody, name: str, kind: Any) -> CheckpointInfo:
    run: TrainingRunInfo | None = core.engine.run_info(body.model_id)
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
    # Only an explicit `overwrite: false` protects a name: older clients do not know the field.
    return core.engine.save(body.model_id, info, overwrite=kind == "ephemeral" or body.overwrite is not False)


@router.post("/create_custom_loss")
async def create_custom_loss(body: CustomLossBody, request: Request) -> SubmittedResponse:
    """Check a traced loss and keep it for its session."""
    core = core_of(request)
    if not core.options.custom_losses:
        raise Refused(404, "this service takes no uploaded losses: start it with custom_losses=True or --custom-losses")
    core.open_session(body.session_id)
    fields: dict[str, Any] = await request.json()

    def work() -> Success:
        loss_id = core.engine.custom_losses.add(body.session_id, body.custom_loss_seq_id, fields)
        return Success(lambda: {"loss_id": loss_id, "type": "create_custom_loss"})

    scope, size = ("custom_loss_seq_id", body.session_id, body.custom_loss_seq_id), size_of(request)
    request_id = core.numbered(scope, await json_digest(request), lambda: core.submit(work, size))
    return SubmittedResponse(request_id=request_id)
