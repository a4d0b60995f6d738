"""Routes of checkpoints: listings, changes, and signed download addresses."""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from fastapi import Depends, Request
from fastapi.responses import FileResponse, RedirectResponse

from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import API, Running, Whole, api_router
from tinkex_py.local.records import CheckpointInfo, Kind, expiry
from tinkex_py.local.schemas import CopyBody, EmptyResponse, TinkerPath, TtlBody, WeightsInfoResponse
from tinkex_py.types import Checkpoint, CheckpointsPage, Cursor, ExternalWeightsUrls
from tinkex_py.types.rest import CopiedCheckpoint

router = api_router()
DOWNLOADS = f"{API}/downloads/"
ARCHIVE = "archive.tar"
_CHECKPOINT = "/training_runs/{run}/checkpoints/{kind}/{name}"
_OCTETS = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_TYPES: Mapping[Kind, str] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


async def find_checkpoint(run: str, kind: str, name: str, core: Running) -> CheckpointInfo:
    """Returns the checkpoint that a path names; Refused (404) if there is none."""
    return await core.stored(lambda store: store.find(f"tinker://{run}/{kind}/{name}"))


FoundCheckpoint = Annotated[CheckpointInfo, Depends(find_checkpoint)]


@router.get("/training_runs/{run}/checkpoints")
async def run_checkpoints(run: str, core: Running, limit: Whole | None = None, offset: Whole = 0) -> CheckpointsPage:
    """Lists the checkpoints of one run, newest first; all of them without a limit."""

    def listed(store: CheckpointStore) -> tuple[list[CheckpointInfo], int] | None:
        if store.records.run(run) is None:
            return None
        return store.records.checkpoints(run, limit=-1 if limit is None else limit, offset=offset)

    found = await core.stored(listed)
    if found is None:
        raise Refused(404, f"there is no training run {run!r}")
    infos, count = found
    cursor = None if limit is None else Cursor(offset=offset, limit=limit, total_count=count)
    return CheckpointsPage(checkpoints=tuple(map(checkpoint_entry, infos)), cursor=cursor)


@router.get("/checkpoints")
async def checkpoints(core: Running, limit: Whole = 100, offset: Whole = 0) -> CheckpointsPage:
    """Lists the checkpoints of all runs, newest first."""
    infos, count = await core.stored(lambda store: store.records.checkpoints(limit=limit, offset=offset))
    cursor = Cursor(offset=offset, limit=limit, total_count=count)
    return CheckpointsPage(checkpoints=tuple(map(checkpoint_entry, infos)), cursor=cursor)


@router.delete(_CHECKPOINT)
async def delete_checkpoint(info: FoundCheckpoint, core: Running) -> EmptyResponse:
    """Deletes a checkpoint."""
    await core.stored(lambda store: store.delete(info))
    return EmptyResponse()


@router.put(f"{_CHECKPOINT}/ttl")
async def checkpoint_ttl(body: TtlBody, info: FoundCheckpoint, core: Running) -> EmptyResponse:
    """Sets when a checkpoint expires, counted from now; null is never."""
    return _done(await core.stored(lambda store: store.set_expiry(info, expiry(body.ttl_seconds))), info)


@router.post(f"{_CHECKPOINT}/publish")
async def publish(info: FoundCheckpoint, core: Running) -> EmptyResponse:
    """Marks a checkpoint as public. Repeats succeed, because clients would retry a 409 for minutes."""
    return _done(await core.stored(lambda store: store.records.change_checkpoint(info, public=True)), info)


@router.delete(f"{_CHECKPOINT}/publish")
async def unpublish(info: FoundCheckpoint, core: Running) -> EmptyResponse:
    """Marks a checkpoint as private."""
    return _done(await core.stored(lambda store: store.records.change_checkpoint(info, public=False)), info)


def _done(changed: CheckpointInfo | None, info: CheckpointInfo) -> EmptyResponse:
    if changed is None:
        raise Refused(404, f"there is no checkpoint {info.path!r} any more")
    return EmptyResponse()


@router.post("/weights_info")
async def weights_info(body: TinkerPath, core: Running) -> WeightsInfoResponse:
    """Returns the base model and the LoRA settings of a checkpoint."""
    run = (await core.stored(lambda store: store.find(body.tinker_path))).run
    return WeightsInfoResponse(
        base_model=run.base_model,
        is_lora=True,
        lora_rank=run.rank,
        train_unembed=run.train_unembed,
        train_mlp=run.train_mlp,
        train_attn=run.train_attn,
    )


@router.post("/copy_weights")
async def copy_weights(body: CopyBody, core: Running) -> CopiedCheckpoint:
    """Copies a checkpoint into a new run of a session, with its own time to live."""
    if body.session_id is None or body.model_seq_id is None:
        raise Refused(404, "the embedded service has no projects: pass session_id and model_seq_id of the new run")
    core.open_session(body.session_id)
    run_id = f"{body.session_id}:train:{body.model_seq_id}"
    used = Refused(400, f"model_seq_id {body.model_seq_id} of session {body.session_id!r} is in use: choose another")
    if run_id in core.sequencers:
        raise used

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
        raise used
    return CopiedCheckpoint(tinker_path=copy.path)


def checkpoint_entry(info: CheckpointInfo) -> Checkpoint:
    """Returns the entry of a checkpoint in listings."""
    return Checkpoint(
        checkpoint_id=f"{info.kind}/{info.name}",
        checkpoint_type=_TYPES[info.kind],
        time=info.time,
        tinker_path=info.path,
        size_bytes=info.size_bytes,
        public=info.public,
        user_metadata=info.user_metadata,
        expires_at=info.expires_at,
    )


@router.get(
    f"{_CHECKPOINT}/archive",
    status_code=302,
    response_class=RedirectResponse,
    response_description="the address is in Location",
)
async def archive(request: Request, info: FoundCheckpoint, core: Running) -> RedirectResponse:
    """Redirects to a checkpoint as one tar file."""
    url, expires = _signed_url(request, core, info, ARCHIVE)
    return RedirectResponse(url, status_code=302, headers={"Expires": format_datetime(expires, usegmt=True)})


@router.get(f"{_CHECKPOINT}/external_weights_urls")
async def external_weights_urls(request: Request, info: FoundCheckpoint, core: Running) -> ExternalWeightsUrls:
    """Returns the addresses of the files of external weights."""
    if info.kind != "external_weights":
        raise Refused(400, f"{info.path!r} is not external weights: download its archive")
    files = await core.stored(lambda store: store.files(info))
    signed = {file.name: _signed_url(request, core, info, file.name) for file in files}
    if not signed:
        raise Refused(404, f"there is no checkpoint {info.path!r} any more")
    expires = min(moment for _, moment in signed.values())
    return ExternalWeightsUrls(urls={name: url for name, (url, _) in signed.items()}, expires=expires)


@router.get(
    "/downloads/{run}/{kind}/{name}/{file}",
    response_class=FileResponse,
    responses={200: _OCTETS, 206: {**_OCTETS, "description": "the requested range"}},
)
async def download(
    run: str, kind: str, name: str, file: str, core: Running, expires: str = "", signature: str = ""
) -> FileResponse:
    """Returns the file of a signed address, or a range of it."""
    refusal = core.links.refusal(_path(run, kind, name, file), expires, signature)
    if refusal is not None:
        raise Refused(*refusal)
    info = await find_checkpoint(run, kind, name, core)
    found = await core.stored(lambda store: _file(store, info, file))
    if found is None:
        raise Refused(404, f"there is no file {file!r} in checkpoint {info.path!r}")
    return FileResponse(found, media_type="application/octet-stream", filename=f"{info.name}-{file}")


def _file(store: CheckpointStore, info: CheckpointInfo, name: str) -> Path | None:
    if name == ARCHIVE:
        return store.archive(info)
    return next((file for file in store.files(info) if file.name == name), None)


def _path(run_id: str, kind: str, name: str, file: str) -> str:
    return f"{DOWNLOADS}{run_id}/{kind}/{name}/{file}"


def _signed_url(request: Request, core: Core, info: CheckpointInfo, file: str) -> tuple[str, datetime]:
    path = _path(info.run.run_id, info.kind, info.name, file)
    query, expires = core.links.sign(path)
    return f"{str(request.base_url).rstrip('/')}{quote(path, safe='/:')}?{query}", datetime.fromtimestamp(expires, UTC)
