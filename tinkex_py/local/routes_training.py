"""Routes of one training model's ordered work: passes, optimizer steps, saves."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import DecodeError
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkex_py.errors import InvalidData, UnsupportedFeature
from tinkex_py.local import wire_format
from tinkex_py.local.core import INFLIGHT, Core, Refused, Sampler
from tinkex_py.local.data import PassRequest
from tinkex_py.local.http import (
    PROTOBUF,
    Body,
    answer,
    digest,
    parse,
    problems,
    read_body,
    read_json,
    size_of,
    with_core,
)
from tinkex_py.local.records import CheckpointInfo, RunInfo, expiry
from tinkex_py.local.requests import (
    ForwardBackwardBody,
    ForwardBody,
    OptimStepBody,
    PassInput,
    SaveWeightsBody,
)
from tinkex_py.local.results import Answer
from tinkex_py.transport import wire
from tinkex_py.types import AdamParams

KEEP_GRAPH_HEADER = "x-tinkex-keep-graph"


async def forward_backward(request: Request, core: Core) -> Response:
    """A pass in protobuf (backward, or forward only) or in the JSON form."""
    keep = request.headers.get(KEEP_GRAPH_HEADER) == "1"
    if request.headers.get("content-type", "").startswith(PROTOBUF):
        return await _protobuf_pass(request, core, keep=keep)
    raw = await read_json(request)
    body = _parse_numbered(core, ForwardBackwardBody, raw)
    inner = body.forward_backward_input
    return _accept(
        core,
        body.model_id,
        body.seq_id,
        digest("forward_backward", raw),
        size_of(request),
        lambda: _json_pass(inner, forward_only=body.forward_only, keep=keep),
    )


async def forward(request: Request, core: Core) -> Response:
    """A forward pass in the JSON form."""
    raw = await read_json(request)
    body = _parse_numbered(core, ForwardBody, raw)
    keep = request.headers.get(KEEP_GRAPH_HEADER) == "1"
    inner = body.forward_input
    return _accept(
        core,
        body.model_id,
        body.seq_id,
        digest("forward", raw),
        size_of(request),
        lambda: _json_pass(inner, forward_only=True, keep=keep),
    )


async def _protobuf_pass(request: Request, core: Core, *, keep: bool) -> Response:
    raw = await read_body(request)
    try:
        message = wire.ForwardBackwardRequest.FromString(raw)
    except DecodeError:
        raise Refused(400, "the body is no ForwardBackwardRequest in protobuf") from None
    config: dict[str, float | str] = {
        key: value.text if value.WhichOneof("value") == "text" else value.number
        for key, value in message.loss_fn_config_v2.items()
    }
    work = PassRequest(
        data=lambda: wire_format.datums_from_protobuf(message.data),
        loss_fn=message.loss_fn,
        config=config or dict(message.loss_fn_config),
        forward_only=message.forward_only,
        keep_graph=keep,
    )
    # Maps have no order on the wire: only the deterministic form is the same for every repeat.
    content = message.SerializeToString(deterministic=True)
    number, told = message.seq_id, digest("forward_backward", content)
    return _accept(core, message.model_id, number, told, len(raw), lambda: work)


def _json_pass(value: Any, *, forward_only: bool, keep: bool) -> PassRequest:
    try:
        body = PassInput.model_validate(value)
    except ValidationError as error:
        raise InvalidData(problems(error)) from None
    return PassRequest(
        data=lambda: wire_format.datums_from_json(body.data),
        loss_fn=body.loss_fn,
        config=body.loss_fn_config,
        forward_only=forward_only,
        keep_graph=keep,
    )


def _accept(
    core: Core, model_id: str, number: int, content: bytes, size: int, request: Callable[[], PassRequest]
) -> Response:
    def work() -> Answer:
        result = core.engine.run_pass(model_id, request())
        return Answer(lambda: wire_format.pass_json(result), wire_format.pass_protobuf(result))

    request_id = core.in_order(model_id, number, content, size, work)
    return answer({"request_id": request_id, "model_id": model_id})


async def optim_step(request: Request, core: Core) -> Response:
    """One AdamW step."""
    raw = await read_json(request)
    body = _parse_numbered(core, OptimStepBody, raw)

    def work() -> Answer:
        metrics = core.engine.optim_step(body.model_id, _adam_params(body))
        return Answer(lambda: {"metrics": metrics, "type": "optim_step"})

    request_id = _in_order(core, body, digest("optim_step", raw), size_of(request), work)
    return answer({"request_id": request_id, "model_id": body.model_id})


def _adam_params(body: OptimStepBody) -> AdamParams:
    if body.optimizer_params is None:
        return AdamParams(**body.adam_params.model_dump())
    kind = body.optimizer_params.get("type")
    if kind != "adamw":
        raise InvalidData(f"optimizer {kind!r} is not known here. Known: adam_params, or optimizer_params 'adamw'")
    given = {key: value for key, value in body.optimizer_params.items() if value is not None}
    return AdamParams(**{key: value for key, value in given.items() if key in AdamParams.model_fields})


async def save_weights(request: Request, core: Core) -> Response:
    """A training checkpoint: weights and optimizer state."""
    raw = await read_json(request)
    body = _parse_numbered(core, SaveWeightsBody, raw)

    def work() -> Answer:
        if body.path is None:
            raise InvalidData("save_weights needs a name in `path`")
        saved = _save(core, body, body.path, "weights")
        return Answer(lambda: {"path": saved.path, "type": "save_weights"})

    request_id = _in_order(core, body, digest("save_weights", raw), size_of(request), work)
    return answer({"request_id": request_id, "model_id": body.model_id})


async def save_weights_for_sampler(request: Request, core: Core) -> Response:
    """Weights to sample from: under a name, or as a sampling session that is ready to use."""
    raw = await read_json(request)
    body = _parse_numbered(core, SaveWeightsBody, raw)

    def work() -> Answer:
        if body.path is not None:
            saved = _save(core, body, body.path, "sampler_weights")
            return Answer(lambda: {"path": saved.path, "type": "save_weights_for_sampler"})
        if body.sampling_session_seq_id is None:
            raise InvalidData("save_weights_for_sampler needs a name in `path`, or sampling_session_seq_id")
        return _nameless_sampler(core, body, body.sampling_session_seq_id)

    request_id = _in_order(core, body, digest("save_weights_for_sampler", raw), size_of(request), work)
    return answer({"request_id": request_id, "model_id": body.model_id})


def _nameless_sampler(core: Core, body: SaveWeightsBody, number: int) -> Answer:
    """A sampling session on the weights as they are; inflight ones share one checkpoint that later saves replace."""
    if body.kind not in ("snapshot", "inflight"):
        raise InvalidData(f"kind={body.kind!r} is not known here. Known: 'snapshot', 'inflight'")
    inflight = body.kind == "inflight"
    saved = _save(core, body, INFLIGHT if inflight else f"sample-{number}", "ephemeral")
    sampler_id = f"{body.model_id.partition(':')[0]}:sample:{number}"
    sampler = Sampler(sampler_id, inflight_of=body.model_id) if inflight else Sampler(sampler_id, snapshot=saved)

    def register() -> None:
        core.samplers[sampler_id] = sampler

    return Answer(lambda: {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}, then=register)


async def save_weights_external(request: Request, core: Core) -> Response:
    """Weights whose files can be downloaded one by one."""
    raw = await read_json(request)
    body = _parse_numbered(core, SaveWeightsBody, raw)

    def work() -> Answer:
        if body.age_encryption_recipients:
            raise UnsupportedFeature("the embedded service cannot encrypt: leave age_encryption_recipients out")
        if body.path is None:
            raise InvalidData("save_weights_external needs a name in `path`")
        saved = _save(core, body, body.path, "external_weights")
        return Answer(
            lambda: {"path": saved.path, "size_bytes": saved.size_bytes, "type": "save_weights_external"},
        )

    request_id = _in_order(core, body, digest("save_weights_external", raw), size_of(request), work)
    return answer({"request_id": request_id, "model_id": body.model_id})


def _in_order(
    core: Core, body: OptimStepBody | SaveWeightsBody, content: bytes, size: int, work: Callable[[], Answer]
) -> str:
    return core.in_order(body.model_id, body.seq_id, content, size, work)


def _save(core: Core, body: SaveWeightsBody, name: str, kind: Any) -> CheckpointInfo:
    run: RunInfo | None = core.engine.run_info(body.model_id)
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


def _parse_numbered(core: Core, model: type[Body], raw: Mapping[str, Any]) -> Body:
    try:
        return parse(model, raw)
    except Refused:
        lane = core.lanes.get(str(raw.get("model_id")))
        number = raw.get("seq_id")
        if lane is not None and isinstance(number, int):
            lane.spend(number)
        raise


routes = [
    Route("/api/v1/forward_backward", with_core(forward_backward), methods=["POST"]),
    Route("/api/v1/forward", with_core(forward), methods=["POST"]),
    Route("/api/v1/optim_step", with_core(optim_step), methods=["POST"]),
    Route("/api/v1/save_weights", with_core(save_weights), methods=["POST"]),
    Route("/api/v1/save_weights_for_sampler", with_core(save_weights_for_sampler), methods=["POST"]),
    Route("/api/v1/save_weights_external", with_core(save_weights_external), methods=["POST"]),
]
