"""Routes that make, load and describe training models."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import Request

from tinkex_py.errors import InvalidData
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import api_router, core_of, in_order, json_digest, size_of
from tinkex_py.local.records import CheckpointInfo, TrainingRunInfo
from tinkex_py.local.requests import CreateModelBody, LoadWeightsBody, LoraBody, ModelBody, NumberedBody
from tinkex_py.local.responses import ModelInfoResponse, SubmittedResponse
from tinkex_py.local.results import Success
from tinkex_py.local.sequencer import Sequencer
from tinkex_py.types import LoraConfig, ModelData

router = api_router()


@router.post("/create_model")
async def create_model(body: CreateModelBody, request: Request) -> SubmittedResponse:
    """A fresh training model; its id follows from session and number."""
    core = core_of(request)
    model_id = _model_id(core, body.session_id, body.model_seq_id)
    settings = body.lora_config
    chosen = settings.seed if settings.seed is not None else _default_seed(core.options.seed, body.model_seq_id)

    def work() -> Success:
        _check_optimizer(body.optimizer_config)
        lora = LoraConfig(**settings.model_dump())
        core.engine.create_model(_run(model_id, body.base_model, settings, body.user_metadata), lora, chosen)
        return Success(lambda: {"model_id": model_id, "type": "create_model"})

    return await _new_model(request, ("model_seq_id", body.session_id, body.model_seq_id), model_id, work)


@router.post("/load_weights")
async def load_weights(body: LoadWeightsBody, request: Request) -> SubmittedResponse:
    """Make a training model out of a checkpoint, or load one into a model that is still unused."""
    if body.session_id is None or body.model_seq_id is None:
        return await _load_into(request, body)
    core = core_of(request)
    model_id = _model_id(core, body.session_id, body.model_seq_id)

    def work() -> Success:
        if not body.optimizer:
            _check_optimizer(body.optimizer_config)
        source = core.store.find(body.path, "weights")
        if body.base_model is not None and body.base_model != source.run.base_model:
            raise InvalidData(f"{body.path!r} was made from {source.run.base_model!r}, not from {body.base_model!r}")
        run = source.run.model_copy(
            update={"run_id": model_id, "created": datetime.now(UTC), "user_metadata": body.user_metadata}
        )
        core.engine.create_from_checkpoint(run, source, with_optimizer=body.optimizer)
        return _loaded(model_id, source)

    return await _new_model(request, ("model_seq_id", body.session_id, body.model_seq_id), model_id, work)


async def _new_model(
    request: Request, scope: tuple[str, str, int], model_id: str, work: Callable[[], Success]
) -> SubmittedResponse:
    core, size = core_of(request), size_of(request)
    request_id = core.numbered(scope, await json_digest(request), lambda: core.submit(work, size))
    core.sequencers.setdefault(model_id, Sequencer())
    return SubmittedResponse(request_id=request_id, model_id=model_id)


async def _load_into(request: Request, body: LoadWeightsBody) -> SubmittedResponse:
    if body.model_id is None:
        raise Refused(422, "load_weights needs session_id and model_seq_id, or model_id and seq_id")
    core, model_id = core_of(request), body.model_id

    def work() -> Success:
        source = core.store.find(body.path, "weights")
        core.engine.load_into(model_id, source, with_optimizer=body.optimizer)
        return _loaded(model_id, source)

    return await in_order(request, NumberedBody(model_id=model_id, seq_id=body.seq_id), work)


@router.post("/get_info")
async def get_info(body: ModelBody, request: Request) -> ModelInfoResponse:
    """What a training model is made of."""
    core = core_of(request)
    core.sequencer(body.model_id)
    run = core.engine.run_info(body.model_id)
    if run is None:
        raise Refused(404, f"model {body.model_id!r} is not there (yet): wait for its creation to succeed")
    model = core.engine.model
    return ModelInfoResponse(
        model_id=run.run_id,
        model_name=run.base_model,
        model_data=ModelData(model_name=run.base_model, arch=model.architecture, tokenizer_id=model.tokenizer_id),
        is_lora=True,
        lora_rank=run.rank,
    )


@router.post("/unload_model")
async def unload_model(body: ModelBody, request: Request) -> SubmittedResponse:
    """Free a training model."""
    core = core_of(request)
    core.sequencer(body.model_id)
    return SubmittedResponse(request_id=core.unload(body.model_id), model_id=body.model_id)


def _model_id(core: Core, session_id: str, number: int) -> str:
    core.open_session(session_id)
    model_id = f"{session_id}:train:{number}"
    core.check_models(model_id)
    return model_id


def _check_optimizer(config: dict[str, Any]) -> None:
    if config.get("type", "adamw") != "adamw":
        raise InvalidData(f"optimizer {config.get('type')!r} is not known here. Known: 'adamw'")


def _default_seed(base: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{base}:{number}".encode()).digest()[:6], "little")


def _run(model_id: str, base_model: str, settings: LoraBody, user_metadata: dict[str, Any] | None) -> TrainingRunInfo:
    return TrainingRunInfo(
        run_id=model_id,
        base_model=base_model,
        created=datetime.now(UTC),
        user_metadata=user_metadata,
        **settings.model_dump(exclude={"seed"}),
    )


def _loaded(model_id: str, source: CheckpointInfo) -> Success:
    return Success(lambda: {"path": source.path, "model_id": model_id, "type": "load_weights"})
