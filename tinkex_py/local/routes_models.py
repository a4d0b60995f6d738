"""Routes that create, load and describe training models."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any

from fastapi import Request

from tinkex_py.errors import InvalidData
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import Running, api_router, in_order, json_digest, size_of
from tinkex_py.local.records import CheckpointInfo, TrainingRunInfo
from tinkex_py.local.results import Success, failed
from tinkex_py.local.schemas import (
    CreateModelBody,
    LoadWeightsBody,
    ModelId,
    ModelInfoResponse,
    NumberedBody,
    SubmittedResponse,
)
from tinkex_py.types import LoraConfig, ModelData

router = api_router()


@router.post("/create_model")
async def create_model(body: CreateModelBody, request: Request, core: Running) -> SubmittedResponse:
    """Creates a training model; its id is made of the session and the number."""
    model_id = _model_id(core, body.session_id, body.model_seq_id)
    settings = body.lora_config
    seed = settings.seed if settings.seed is not None else _default_seed(core.options.seed, body.model_seq_id)

    def check() -> None:
        _check_optimizer(body.optimizer_config)
        core.engine.check_model(body.base_model, LoraConfig(**settings.model_dump()))

    def work() -> Success:
        run = TrainingRunInfo(
            run_id=model_id,
            base_model=body.base_model,
            created=datetime.now(UTC),
            user_metadata=body.user_metadata,
            **settings.model_dump(exclude={"seed"}),
        )
        core.engine.create_model(run, LoraConfig(**settings.model_dump()), seed)
        return Success(lambda: {"model_id": model_id, "type": "create_model"})

    scope = "model_seq_id", body.session_id, body.model_seq_id
    return await _new_model(request, core, scope, model_id, work, check)


@router.post("/load_weights")
async def load_weights(body: LoadWeightsBody, request: Request, core: Running) -> SubmittedResponse:
    """Creates a training model from a checkpoint, or loads one into an unused model."""
    if body.session_id is None or body.model_seq_id is None:
        return await _load_into(request, core, body)
    model_id = _model_id(core, body.session_id, body.model_seq_id)

    def check() -> None:
        if not body.optimizer:
            _check_optimizer(body.optimizer_config)

    def work() -> Success:
        source = core.store.find(body.path, "weights")
        if body.base_model is not None and body.base_model != source.run.base_model:
            raise InvalidData(
                f"checkpoint {body.path!r} belongs to base model {source.run.base_model!r}, not {body.base_model!r}"
            )
        changes = {"run_id": model_id, "created": datetime.now(UTC), "user_metadata": body.user_metadata}
        run = source.run.model_copy(update=changes)
        core.engine.create_from_checkpoint(run, source, with_optimizer=body.optimizer)
        return _loaded(model_id, source)

    scope = "model_seq_id", body.session_id, body.model_seq_id
    return await _new_model(request, core, scope, model_id, work, check)


async def _new_model(
    request: Request,
    core: Core,
    scope: tuple[str, str, int],
    model_id: str,
    work: Callable[[], Success],
    check: Callable[[], None],
) -> SubmittedResponse:
    size = size_of(request)

    def submit() -> "Future[Success]":
        try:
            check()
        except InvalidData as error:
            return failed(error)  # without taking a place among the models
        return core.submit_model(model_id, work, size)

    request_id = core.numbered(scope, await json_digest(request, core), submit)
    return SubmittedResponse(request_id=request_id, model_id=model_id)


async def _load_into(request: Request, core: Core, body: LoadWeightsBody) -> SubmittedResponse:
    if body.model_id is None:
        raise Refused(422, "load_weights needs session_id and model_seq_id, or model_id and seq_id")
    model_id = body.model_id

    def work() -> Success:
        source = core.store.find(body.path, "weights")
        core.engine.load_into(model_id, source, with_optimizer=body.optimizer)
        return _loaded(model_id, source)

    return await in_order(request, core, NumberedBody(model_id=model_id, seq_id=body.seq_id), work)


@router.post("/get_info")
async def get_info(body: ModelId, core: Running) -> ModelInfoResponse:
    """Describes a training model."""
    core.sequencer(body.model_id)
    run = core.engine.run_info(body.model_id)
    if run is None:
        raise Refused(404, f"model {body.model_id!r} is not loaded: wait until its creation has succeeded")
    model = core.engine.model
    return ModelInfoResponse(
        model_id=run.run_id,
        model_name=run.base_model,
        model_data=ModelData(model_name=run.base_model, arch=model.architecture, tokenizer_id=model.tokenizer_id),
        is_lora=True,
        lora_rank=run.rank,
    )


@router.post("/unload_model")
async def unload_model(body: ModelId, core: Running) -> SubmittedResponse:
    """Frees a training model."""
    core.sequencer(body.model_id)
    return SubmittedResponse(request_id=core.unload(body.model_id), model_id=body.model_id)


def _model_id(core: Core, session_id: str, number: int) -> str:
    core.open_session(session_id)
    return f"{session_id}:train:{number}"


def _check_optimizer(config: dict[str, Any]) -> None:
    if config.get("type", "adamw") != "adamw":
        raise InvalidData(f"optimizer {config.get('type')!r} is not supported. Supported: 'adamw'")


def _default_seed(base: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{base}:{number}".encode()).digest()[:6], "little")


def _loaded(model_id: str, source: CheckpointInfo) -> Success:
    return Success(lambda: {"path": source.path, "model_id": model_id, "type": "load_weights"})
