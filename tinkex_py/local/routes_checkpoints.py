"""Listings of checkpoints, and what can be done to them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import answer, page_of, read, with_core
from tinkex_py.local.records import CheckpointInfo, Kind, expiry
from tinkex_py.local.requests import CopyBody, TinkerPathBody, TtlBody

_TYPES: Mapping[Kind, str] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


async def run_checkpoints(request: Request, core: Core) -> Response:
    """Checkpoints of one run, newest first; all of them unless a page is asked for."""
    run_id = request.path_params["run"]
    page = page_of(request, -1)

    def listed(store: CheckpointStore) -> tuple[list[CheckpointInfo], int] | None:
        if store.records.run(run_id) is None:
            return None
        return store.records.checkpoints(run_id, limit=page.limit, offset=page.offset)

    found = await core.stored(listed)
    if found is None:
        raise Refused(404, f"there is no training run {run_id!r}")
    infos, count = found
    cursor = page.cursor(count) if page.limit >= 0 else None
    return answer({"checkpoints": [checkpoint_entry(info) for info in infos], "cursor": cursor})


async def checkpoints(request: Request, core: Core) -> Response:
    """Checkpoints of all runs, newest first."""
    page = page_of(request, 100)
    infos, count = await core.stored(lambda store: store.records.checkpoints(limit=page.limit, offset=page.offset))
    return answer({"checkpoints": [checkpoint_entry(info) for info in infos], "cursor": page.cursor(count)})


async def delete_checkpoint(request: Request, core: Core) -> Response:
    """Remove a checkpoint."""
    info = await find_checkpoint(request, core)
    await core.stored(lambda store: store.delete(info))
    return answer({})


async def checkpoint_ttl(request: Request, core: Core) -> Response:
    """Change when a checkpoint expires, counted from now; null is never."""
    body = await read(request, TtlBody)
    info = await find_checkpoint(request, core)
    _require(await core.stored(lambda store: store.set_expiry(info, expiry(body.ttl_seconds))), info)
    return answer({})


async def publish(request: Request, core: Core) -> Response:
    """Mark a checkpoint as public. Once more is fine: 409 would make clients repeat it for minutes."""
    return await _set_public(request, core, public=True)


async def unpublish(request: Request, core: Core) -> Response:
    """Mark a checkpoint as private."""
    return await _set_public(request, core, public=False)


async def weights_info(request: Request, core: Core) -> Response:
    """What a checkpoint was made with."""
    body = await read(request, TinkerPathBody)
    run = (await core.stored(lambda store: store.find(body.tinker_path))).run
    return answer(
        {
            "base_model": run.base_model,
            "is_lora": True,
            "lora_rank": run.rank,
            "train_unembed": run.train_unembed,
            "train_mlp": run.train_mlp,
            "train_attn": run.train_attn,
            "optimizer_config": {"type": "adamw"},
        }
    )


async def copy_weights(request: Request, core: Core) -> Response:
    """Copy a checkpoint into a run of its own in a session; the copy has its own time to live."""
    body = await read(request, CopyBody)
    if body.session_id is None or body.model_seq_id is None:
        raise Refused(
            404, "the embedded service has no projects: name session_id and model_seq_id, the run that gets the copy"
        )
    core.open_session(body.session_id)
    run_id = f"{body.session_id}:train:{body.model_seq_id}"
    if run_id in core.lanes:
        raise Refused(400, f"model_seq_id {body.model_seq_id} of session {body.session_id!r} is in use: take another")

    def copied(store: CheckpointStore) -> CheckpointInfo | None:
        source = store.find(body.source_path)
        existing = store.get(run_id, source.kind, source.name)
        if existing is not None and existing.copied_from == source.path:
            return existing
        if store.records.run(run_id) is not None:
            return None
        now = datetime.now(UTC)
        run = source.run.model_copy(update={"run_id": run_id, "created": now})
        changes = {"run": run, "time": now, "public": False, "copied_from": source.path}
        target = source.model_copy(update={**changes, "expires_at": expiry(body.ttl_seconds)})
        store.write_run(run)
        return store.copy(source, target)

    copy = await core.stored(copied)
    if copy is None:
        raise Refused(400, f"model_seq_id {body.model_seq_id} of session {body.session_id!r} was used: take another")
    return answer({"tinker_path": copy.path})


async def find_checkpoint(request: Request, core: Core) -> CheckpointInfo:
    """The checkpoint that a path names by run, kind and name.

    Raises:
        Refused: 404.
    """
    run, kind, name = (request.path_params[key] for key in ("run", "kind", "name"))
    return await core.stored(lambda store: store.find(f"tinker://{run}/{kind}/{name}"))


def checkpoint_entry(info: CheckpointInfo) -> dict[str, Any]:
    """A checkpoint as listings show it."""
    entry: dict[str, Any] = {
        "checkpoint_id": f"{info.kind}/{info.name}",
        "checkpoint_type": _TYPES[info.kind],
        "time": info.time.isoformat(),
        "tinker_path": info.path,
        "size_bytes": info.size_bytes,
        "public": info.public,
    }
    if info.user_metadata is not None:
        entry["user_metadata"] = info.user_metadata
    if info.expires_at is not None:
        entry["expires_at"] = info.expires_at.isoformat()
    return entry


async def _set_public(request: Request, core: Core, *, public: bool) -> Response:
    info = await find_checkpoint(request, core)
    _require(await core.stored(lambda store: store.records.change_checkpoint(info, public=public)), info)
    return answer({})


def _require(changed: CheckpointInfo | None, info: CheckpointInfo) -> None:
    if changed is None:
        raise Refused(404, f"there is no checkpoint {info.path!r} any more")


_CHECKPOINT = "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"
routes = [
    Route("/api/v1/training_runs/{run}/checkpoints", with_core(run_checkpoints), methods=["GET"]),
    Route("/api/v1/checkpoints", with_core(checkpoints), methods=["GET"]),
    Route(_CHECKPOINT, with_core(delete_checkpoint), methods=["DELETE"]),
    Route(f"{_CHECKPOINT}/ttl", with_core(checkpoint_ttl), methods=["PUT"]),
    Route(f"{_CHECKPOINT}/publish", with_core(publish), methods=["POST"]),
    Route(f"{_CHECKPOINT}/publish", with_core(unpublish), methods=["DELETE"]),
    Route("/api/v1/weights_info", with_core(weights_info), methods=["POST"]),
    Route("/api/v1/copy_weights", with_core(copy_weights), methods=["POST"]),
]
