"""The client for the training runs, checkpoints and sessions of a service."""

import os
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from tinkex_py.arguments import check_choice, check_count, check_function, check_kind, check_path, check_text
from tinkex_py.client.archive import MAX_ARCHIVE_BYTES
from tinkex_py.client.arguments import given
from tinkex_py.client.download import Download
from tinkex_py.client.rest_requests import DEFAULT_PAGE_SIZE, Page, RestRequests, all_items
from tinkex_py.errors import InvalidData, NotFound, UnsupportedFeature
from tinkex_py.limits import RetryPolicy
from tinkex_py.transport.secrecy import CutOff
from tinkex_py.types import ServerCapabilities, WeightsInfo
from tinkex_py.types.checkpoint_path import CheckpointPath, check_address, check_segment, url_segment
from tinkex_py.types.rest import (
    AccessScope,
    ArchiveUrl,
    Checkpoint,
    CheckpointsPage,
    CopiedCheckpoint,
    DownloadProgress,
    ExternalWeightsUrls,
    Sampler,
    Session,
    SessionQuery,
    SessionSearchCursor,
    SessionSearchPage,
    SessionsPage,
    SessionSummary,
    TrainingRun,
    TrainingRunsPage,
)

_RUNS = "/api/v1/training_runs"
_SESSIONS = "/api/v1/sessions"


class AsyncRestClient:
    """Training runs, checkpoints and sessions of one service. Created by `create_rest_client()`; needs no session.

    It works until the service client that created it is closed, and need not be closed itself. Every method raises
    `UnsupportedFeature` if the service lacks the endpoint, `NotFound` if there is no such run, checkpoint or session,
    `InvalidData` for an invalid argument, and `APIStatusError` or `TransportError` for any other failure.

    Many methods share these arguments:

    - `path`: a checkpoint, `tinker://{training run}/{kind}/{name}`.
    - `run`: the id of a training run, or the path of one of its checkpoints.
    - `page_size`, `limit`: maximum number of items per request; `offset`: number of items to skip.
    - `access_scope`: "owned", or "accessible" to include those of other users.
    """

    def __init__(self, requests: RestRequests) -> None:
        self._requests = requests

    async def get_server_capabilities(self) -> ServerCapabilities:
        """Returns the models of the service."""
        return ServerCapabilities.read(
            await self._requests.ask("GET", "/api/v1/get_server_capabilities", "listing models", names_nothing=True)
        )

    # Training runs

    def training_runs(
        self,
        *,
        page_size: int = DEFAULT_PAGE_SIZE,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> AsyncGenerator[TrainingRun, None]:
        """Yields all training runs, or those of a project, newest first; requests pages as needed."""

        async def fetch(limit: int, offset: int) -> Page[TrainingRun]:
            page = await self.training_runs_page(
                limit=limit, offset=offset, access_scope=access_scope, project_id=project_id
            )
            return page.training_runs, page.cursor

        return all_items(fetch, lambda run: run.training_run_id, page_size)

    async def training_runs_page(
        self,
        *,
        limit: int = DEFAULT_PAGE_SIZE,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> TrainingRunsPage:
        """Returns one page of training runs, or of those of a project, newest first."""
        if project_id is not None:
            check_text("project_id", project_id)
        query = {**_page(limit, offset), **_scope(access_scope), "project_id": project_id}
        return TrainingRunsPage.read(
            await self._requests.ask("GET", _RUNS, "listing training runs", query=query, names_nothing=True)
        )

    async def get_training_run(self, run: str, *, access_scope: AccessScope = "owned") -> TrainingRun:
        """Returns one training run."""
        path = f"{_RUNS}/{_run_segment(run)}"
        return TrainingRun.read(
            await self._requests.ask("GET", path, "showing a training run", query=_scope(access_scope))
        )

    # Checkpoints

    def checkpoints(
        self, run: str | None = None, *, page_size: int = DEFAULT_PAGE_SIZE
    ) -> AsyncGenerator[Checkpoint, None]:
        """Yields all checkpoints, or those of a training run, newest first; requests pages as needed."""

        async def fetch(limit: int, offset: int) -> Page[Checkpoint]:
            page = await self.checkpoints_page(run, limit=limit, offset=offset)
            return page.checkpoints, page.cursor

        return all_items(fetch, lambda checkpoint: checkpoint.tinker_path, page_size)

    async def checkpoints_page(
        self, run: str | None = None, *, limit: int = DEFAULT_PAGE_SIZE, offset: int = 0
    ) -> CheckpointsPage:
        """Returns one page of checkpoints, newest first; some services return all checkpoints of a run at once."""
        path = "/api/v1/checkpoints" if run is None else f"{_RUNS}/{_run_segment(run)}/checkpoints"
        feature = "listing the checkpoints of all runs" if run is None else "listing checkpoints"
        return CheckpointsPage.read(
            await self._requests.ask("GET", path, feature, query=_page(limit, offset), names_nothing=run is None)
        )

    async def get_checkpoint(self, path: str) -> Checkpoint:
        """Returns one checkpoint, from the list of its run."""
        wanted = CheckpointPath.parse(path)
        async for checkpoint in self.checkpoints(wanted.run_id):
            if checkpoint.tinker_path == str(wanted):
                return checkpoint
        raise NotFound(f"training run {wanted.run_id!r} has no checkpoint {wanted.checkpoint_id!r}", status=404)

    async def get_weights_info(self, path: str) -> WeightsInfo:
        """Returns the base model and the LoRA settings of a checkpoint; `path` is sent unchanged."""
        body = {"tinker_path": check_address(path)}
        return WeightsInfo.read(
            await self._requests.ask("POST", "/api/v1/weights_info", "describing a checkpoint", json=body)
        )

    async def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Makes a checkpoint expire `ttl_seconds` from now; None means never."""
        ttl = None if ttl_seconds is None else check_count("ttl_seconds", ttl_seconds, least=1)
        url = f"{_checkpoint_url(path)}/ttl"
        await self._requests.ask("PUT", url, "changing when a checkpoint expires", json={"ttl_seconds": ttl})

    async def publish_checkpoint(self, path: str) -> None:
        """Publishes a checkpoint; some services raise `Conflict` if it is public already."""
        url = f"{_checkpoint_url(path)}/publish"
        await self._requests.ask("POST", url, "publishing checkpoints")

    async def unpublish_checkpoint(self, path: str) -> None:
        """Makes a published checkpoint private again."""
        url = f"{_checkpoint_url(path)}/publish"
        await self._requests.ask("DELETE", url, "publishing checkpoints")

    async def delete_checkpoint(self, path: str) -> None:
        """Deletes a checkpoint permanently."""
        try:
            await self._requests.ask("DELETE", _checkpoint_url(path), "deleting checkpoints")
        except NotFound as error:
            if error.attempts <= 1:
                raise
            # An earlier attempt deleted it, and its response was lost.

    async def copy_checkpoint(
        self,
        path: str,
        *,
        project_id: str | None = None,
        session_id: str | None = None,
        model_number: int | None = None,
        ttl_seconds: int | None = None,
        access_token: str | None = None,
    ) -> str:
        """Copies a checkpoint into a project, or into a session, and returns the path of the copy.

        Args:
            path: the checkpoint.
            project_id: the project that receives the copy.
            session_id: the session that receives the copy.
            model_number: an unused model number of that session.
            ttl_seconds: seconds until the copy expires; None means never.
            access_token: access to a checkpoint of another user.
        """
        source = str(CheckpointPath.parse(path))
        if (project_id is None) == (session_id is None) or (session_id is None) != (model_number is None):
            raise InvalidData("pass either project_id, or session_id and model_number")
        for name, text in (("project_id", project_id), ("session_id", session_id), ("access_token", access_token)):
            if text is not None:
                check_text(name, text)
        number = None if model_number is None else check_count("model_number", model_number, least=0)
        destination = given(destination_project_id=project_id, session_id=session_id, model_seq_id=number)
        ttl = None if ttl_seconds is None else check_count("ttl_seconds", ttl_seconds, least=1)
        body = {"source_path": source, **destination, **given(ttl_seconds=ttl)}
        # One key for all attempts, so that a repeated request makes no second copy.
        headers = {"X-Idempotency-Key": str(uuid.uuid4())}
        if access_token is not None:
            headers["X-Tinker-Weights-Access-Token"] = access_token
        url, feature = "/api/v1/copy_weights", "copying checkpoints"
        return CopiedCheckpoint.read(
            await self._requests.ask("POST", url, feature, json=body, headers=headers)
        ).tinker_path

    # Downloads

    async def get_archive_url(self, path: str) -> ArchiveUrl:
        """Returns a URL that downloads a checkpoint as one archive, without a key."""
        parsed = CheckpointPath.parse(path)
        with CutOff():  # the URL is signed
            return ArchiveUrl.read(await self._ask_where(parsed))

    async def _ask_where(self, path: CheckpointPath) -> Mapping[str, Any]:
        feature = "checkpoints as archives"
        try:
            return await self._requests.ask_where(f"{_checkpoint_url(str(path))}/archive", feature)
        except UnsupportedFeature:
            if path.kind != "sampler_weights":
                raise
            # Some services only offer sampler weights, by name.
            alone = f"{_RUNS}/{url_segment(path.run_id)}/checkpoints/{url_segment(path.name)}/archive"
            return await self._requests.ask_where(alone, feature)

    async def get_external_weights_urls(self, path: str) -> ExternalWeightsUrls:
        """Returns URLs that download the single files of external weights, without a key."""
        if CheckpointPath.parse(path).kind != "external_weights":
            raise InvalidData(f"{path!r} must be tinker://RUN/external_weights/NAME: only those have URLs of files")
        url = f"{_checkpoint_url(path)}/external_weights_urls"
        with CutOff():  # the URLs are signed
            return ExternalWeightsUrls.read(await self._requests.ask("GET", url, "addresses of external weights"))

    async def download_checkpoint(
        self,
        path: str,
        folder: "str | os.PathLike[str]",
        *,
        on_progress: Callable[[DownloadProgress], object] | None = None,
        max_bytes: int = MAX_ARCHIVE_BYTES,
    ) -> Path:
        """Downloads the files of a checkpoint into a new folder, and returns the folder.

        The folder appears when it is complete. Until then the data is in a hidden folder beside it, from which the same
        call continues after a failure, a cancellation or the end of the process, if the service supports that.

        Args:
            path: the checkpoint.
            folder: a folder that is empty or does not exist; parent folders are created.
            on_progress: called on the event loop as bytes arrive; its exceptions end the download.
            max_bytes: largest size of the archive, and of its files together; default 256 GiB.

        Raises:
            InvalidData: the folder is not empty, or is the target of another download.
            InvalidResponse: the archive is damaged or larger than `max_bytes`, or contains a link, a device or a name
                outside of the folder. Nothing of it is kept, and the next call starts again.
            OSError: the files cannot be written.
        """
        parsed = CheckpointPath.parse(path)
        # The download has its own retries.
        once = AsyncRestClient(replace(self._requests, retry=RetryPolicy.none()))
        if on_progress is not None:
            check_function("on_progress", on_progress)
        target, most = check_path("folder", folder), check_count("max_bytes", max_bytes, least=1)
        download = Download(self._requests, parsed, target, lambda: once.get_archive_url(path), on_progress, most)
        return await download.run()

    # Sessions and samplers

    def sessions(
        self, *, page_size: int = DEFAULT_PAGE_SIZE, access_scope: AccessScope = "owned"
    ) -> AsyncGenerator[str, None]:
        """Yields the ids of all sessions, newest first; requests pages as needed."""

        async def fetch(limit: int, offset: int) -> Page[str]:
            page = await self.sessions_page(limit=limit, offset=offset, access_scope=access_scope)
            return page.sessions, None

        return all_items(fetch, lambda session_id: session_id, page_size)

    async def sessions_page(
        self, *, limit: int = DEFAULT_PAGE_SIZE, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> SessionsPage:
        """Returns one page of session ids, newest first."""
        query = {**_page(limit, offset), **_scope(access_scope)}
        return SessionsPage.read(
            await self._requests.ask("GET", _SESSIONS, "listing sessions", query=query, names_nothing=True)
        )

    async def get_session(self, session_id: str, *, access_scope: AccessScope = "owned") -> Session:
        """Returns the training runs and samplers of a session."""
        path = f"{_SESSIONS}/{url_segment(check_segment('session_id', session_id))}"
        return Session.read(await self._requests.ask("GET", path, "showing a session", query=_scope(access_scope)))

    async def search_sessions(
        self, query: SessionQuery | None = None, *, page_size: int = 50
    ) -> AsyncGenerator[SessionSummary, None]:
        """Yields the sessions that match a query, newest first; requests pages of up to 200 as needed."""
        check_count("page_size", page_size, least=1)
        cursor: SessionSearchCursor | None = None
        while True:
            page = await self.search_sessions_page(query, limit=page_size, cursor=cursor)
            for summary in page.sessions:
                yield summary
            if page.next_cursor is None or page.next_cursor == cursor:
                return
            cursor = page.next_cursor

    async def search_sessions_page(
        self, query: SessionQuery | None = None, *, limit: int = 50, cursor: SessionSearchCursor | None = None
    ) -> SessionSearchPage:
        """Returns one page of the sessions that match a query, newest first.

        Args:
            query: the filter; None matches every session.
            limit: maximum number of sessions, up to 200.
            cursor: `next_cursor` of the previous page; None starts with the newest session.
        """
        wanted = SessionQuery() if query is None else check_kind("query", query, SessionQuery)
        body = {**wanted.fields(), "limit": check_count("limit", limit, least=1)}
        if cursor is not None:
            body["cursor"] = check_kind("cursor", cursor, SessionSearchCursor).model_dump(mode="json")
        names_nothing = wanted.project_ids is None
        return SessionSearchPage.read(
            await self._requests.ask(
                "POST", f"{_SESSIONS}/search", "searching sessions", json=body, names_nothing=names_nothing
            )
        )

    async def assign_session_project(self, session_id: str, project_id: str) -> None:
        """Moves a session and its runs into a project."""
        check_text("project_id", project_id)
        path = f"{_SESSIONS}/{url_segment(check_segment('session_id', session_id))}/project"
        await self._requests.ask("PUT", path, "putting sessions into projects", json={"project_id": project_id})

    async def get_sampler(self, sampler_id: str) -> Sampler:
        """Returns the model of a sampling session, by the `sampling_session_id` of a sampling client."""
        path = f"/api/v1/samplers/{url_segment(check_segment('sampler_id', sampler_id))}"
        return Sampler.read(await self._requests.ask("GET", path, "showing a sampler"))


def _page(limit: int, offset: int) -> dict[str, object]:
    return {"limit": check_count("limit", limit, least=1), "offset": check_count("offset", offset, least=0)}


def _scope(access_scope: AccessScope) -> dict[str, object]:
    check_choice("access_scope", access_scope, get_args(AccessScope))
    return {"access_scope": access_scope}


def _run_segment(run: str) -> str:
    is_path = isinstance(run, str) and run.startswith("tinker://")  # pyright: ignore[reportUnnecessaryIsInstance]
    return url_segment(CheckpointPath.parse(run).run_id if is_path else check_segment("run", run))


def _checkpoint_url(path: str) -> str:
    parsed = CheckpointPath.parse(path)
    return f"{_RUNS}/{url_segment(parsed.run_id)}/checkpoints/{parsed.kind}/{url_segment(parsed.name)}"
