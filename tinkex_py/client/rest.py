"""What a service keeps: training runs, checkpoints, sessions."""

import os
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path

from tinkex_py.client.download import Download
from tinkex_py.client.paging import DEFAULT_PAGE_SIZE, Page, all_items, check_count
from tinkex_py.client.rest_requests import RestRequests, is_lost_success
from tinkex_py.errors import InvalidData, NotFound, UnsupportedFeature
from tinkex_py.limits import RetryPolicy
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
    """Training runs, checkpoints and sessions of one service; needs no session. Made by `create_rest_client()`.

    It has nothing to close: it lives as long as the service client that made it. Every method raises
    `UnsupportedFeature` where the service does not have what it asks for, `NotFound` where there is no such run,
    checkpoint or session, `InvalidData` for an argument that cannot be sent, and `APIStatusError` or
    `TransportError` for all that goes wrong besides.

    Args:
        requests: how to ask the service.
    """

    def __init__(self, requests: RestRequests) -> None:
        self._requests = requests

    async def get_server_capabilities(self) -> ServerCapabilities:
        """The models of the service."""
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
        """All training runs, newest first, fetched page by page as they are needed.

        Args:
            page_size: runs per request.
            access_scope: "owned", or "accessible" for those of others too.
            project_id: only runs of this project.
        """

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
        """One page of training runs, newest first.

        Args:
            limit: at most so many.
            offset: how many to leave out at the start.
            access_scope: "owned", or "accessible" for those of others too.
            project_id: only runs of this project.
        """
        query = {**_page(limit, offset), "access_scope": access_scope, "project_id": project_id}
        return TrainingRunsPage.read(
            await self._requests.ask("GET", _RUNS, "listing training runs", query=query, names_nothing=True)
        )

    async def get_training_run(self, run: str, *, access_scope: AccessScope = "owned") -> TrainingRun:
        """One training run.

        Args:
            run: its id, or the path of one of its checkpoints.
            access_scope: "owned", or "accessible" for those of others too.
        """
        path = f"{_RUNS}/{_run_segment(run)}"
        return TrainingRun.read(
            await self._requests.ask("GET", path, "showing a training run", query={"access_scope": access_scope})
        )

    # Checkpoints

    def checkpoints(
        self, run: str | None = None, *, page_size: int = DEFAULT_PAGE_SIZE
    ) -> AsyncGenerator[Checkpoint, None]:
        """All checkpoints, newest first, fetched page by page as they are needed.

        Args:
            run: only those of this training run: its id, or the path of one of its checkpoints.
            page_size: checkpoints per request.
        """

        async def fetch(limit: int, offset: int) -> Page[Checkpoint]:
            page = await self.checkpoints_page(run, limit=limit, offset=offset)
            return page.checkpoints, page.cursor

        return all_items(fetch, lambda checkpoint: checkpoint.tinker_path, page_size)

    async def checkpoints_page(
        self, run: str | None = None, *, limit: int = DEFAULT_PAGE_SIZE, offset: int = 0
    ) -> CheckpointsPage:
        """One page of checkpoints, newest first. Some services give all checkpoints of a run whatever is asked for.

        Args:
            run: only those of this training run: its id, or the path of one of its checkpoints.
            limit: at most so many.
            offset: how many to leave out at the start.
        """
        path = "/api/v1/checkpoints" if run is None else f"{_RUNS}/{_run_segment(run)}/checkpoints"
        feature = "listing the checkpoints of all runs" if run is None else "listing checkpoints"
        return CheckpointsPage.read(
            await self._requests.ask("GET", path, feature, query=_page(limit, offset), names_nothing=run is None)
        )

    async def get_checkpoint(self, path: str) -> Checkpoint:
        """One checkpoint, found in the listing of its run.

        Args:
            path: `tinker://{training run}/{kind}/{name}`.
        """
        wanted = CheckpointPath.parse(path)
        async for checkpoint in self.checkpoints(wanted.run_id):
            if checkpoint.tinker_path == str(wanted):
                return checkpoint
        raise NotFound(f"training run {wanted.run_id!r} has no checkpoint {wanted.checkpoint_id!r}", status=404)

    async def get_weights_info(self, path: str) -> WeightsInfo:
        """What a checkpoint was made with: base model and LoRA settings.

        Args:
            path: what `save_state` gave; sent as it is, because services have forms of their own.
        """
        body = {"tinker_path": check_address(path)}
        return WeightsInfo.read(
            await self._requests.ask("POST", "/api/v1/weights_info", "describing a checkpoint", json=body)
        )

    async def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Lets a checkpoint expire.

        Args:
            path: `tinker://{training run}/{kind}/{name}`.
            ttl_seconds: seconds from now; None lets it live for ever.
        """
        if ttl_seconds is not None:
            check_count("ttl_seconds", ttl_seconds, least=1)
        url = f"{_checkpoint_url(CheckpointPath.parse(path))}/ttl"
        await self._requests.ask("PUT", url, "changing when a checkpoint expires", json={"ttl_seconds": ttl_seconds})

    async def publish_checkpoint(self, path: str) -> None:
        """Lets everybody use a checkpoint.

        Args:
            path: `tinker://{training run}/{kind}/{name}`.

        Raises:
            Conflict: on some services, it is public already.
        """
        url = f"{_checkpoint_url(CheckpointPath.parse(path))}/publish"
        await self._requests.ask("POST", url, "publishing checkpoints")

    async def unpublish_checkpoint(self, path: str) -> None:
        """Makes a published checkpoint private again.

        Args:
            path: `tinker://{training run}/{kind}/{name}`.
        """
        url = f"{_checkpoint_url(CheckpointPath.parse(path))}/publish"
        await self._requests.ask("DELETE", url, "publishing checkpoints")

    async def delete_checkpoint(self, path: str) -> None:
        """Deletes a checkpoint for good.

        Args:
            path: `tinker://{training run}/{kind}/{name}`.
        """
        try:
            await self._requests.ask("DELETE", _checkpoint_url(CheckpointPath.parse(path)), "deleting checkpoints")
        except NotFound as error:
            if not is_lost_success(error):
                raise

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
        """Copies a checkpoint; the copy has a time to live of its own.

        Args:
            path: `tinker://{training run}/{kind}/{name}`.
            project_id: the project that gets the copy, or
            session_id: the session that gets it, with
            model_number: an unused number among the models of that session.
            ttl_seconds: seconds until the copy expires; None is never.
            access_token: opens a checkpoint of somebody else.

        Returns:
            The path of the copy.
        """
        source = str(CheckpointPath.parse(path))
        if (project_id is None) == (session_id is None) or (session_id is None) != (model_number is None):
            raise InvalidData("give project_id, or session_id and model_number: the place that gets the copy")
        body = {
            "source_path": source,
            "destination_project_id": project_id,
            "session_id": session_id,
            "model_seq_id": model_number,
            "ttl_seconds": ttl_seconds,
        }
        # One key for all attempts, so that a repeated one does not make a second copy.
        headers = {"X-Idempotency-Key": str(uuid.uuid4())}
        if access_token is not None:
            headers["X-Tinker-Weights-Access-Token"] = access_token
        given = {name: value for name, value in body.items() if value is not None}
        answer = await self._requests.ask(
            "POST", "/api/v1/copy_weights", "copying checkpoints", json=given, headers=headers
        )
        return CopiedCheckpoint.read(answer).tinker_path

    # Downloads

    async def get_archive_url(self, path: str) -> ArchiveUrl:
        """Where a checkpoint can be downloaded as one archive, without a key.

        Args:
            path: `tinker://{training run}/{kind}/{name}`.
        """
        parsed = CheckpointPath.parse(path)
        feature = "checkpoints as archives"
        try:
            answer = await self._requests.ask_where(f"{_checkpoint_url(parsed)}/archive", feature)
        except UnsupportedFeature:
            if parsed.kind != "sampler_weights":
                raise
            # Some services know only sampler weights here, and those by their name alone.
            alone = f"{_RUNS}/{url_segment(parsed.run_id)}/checkpoints/{url_segment(parsed.name)}/archive"
            answer = await self._requests.ask_where(alone, feature)
        return ArchiveUrl.read(answer)

    async def get_external_weights_urls(self, path: str) -> ExternalWeightsUrls:
        """Where the files of external weights can be downloaded one by one, without a key.

        Args:
            path: `tinker://{training run}/external_weights/{name}`.
        """
        parsed = CheckpointPath.parse(path)
        if parsed.kind != "external_weights":
            raise InvalidData(f"{path!r} holds no external weights: only those have an address for each file")
        url = f"{_checkpoint_url(parsed)}/external_weights_urls"
        return ExternalWeightsUrls.read(await self._requests.ask("GET", url, "addresses of external weights"))

    async def download_checkpoint(
        self,
        path: str,
        folder: "str | os.PathLike[str]",
        *,
        on_progress: Callable[[DownloadProgress], object] | None = None,
    ) -> Path:
        """Downloads a checkpoint's files into a new folder.

        The folder appears when everything is in it. Until then the download lives in a hidden folder beside it;
        a download that failed, or was cancelled, or whose process died goes on from there when it is asked for again,
        if the service can continue, and begins anew otherwise.

        Args:
            path: `tinker://{training run}/{kind}/{name}`.
            folder: where the files shall be; it must not exist, or be empty. Folders above it are made.
            on_progress: called on the event loop as bytes arrive; what it raises ends the download.

        Returns:
            The folder.

        Raises:
            InvalidData: the folder is in use, or another download into it is under way.
            InvalidResponse: the archive is damaged, or holds a link, a device or a name that leads out of the folder.
            OSError: the disk is full, or the folder cannot be written.
        """
        parsed = CheckpointPath.parse(path)
        # The download itself decides what is tried again, and for how long.
        once = AsyncRestClient(replace(self._requests, retry=RetryPolicy.none()))
        download = Download(self._requests, parsed, Path(folder), lambda: once.get_archive_url(path), on_progress)
        return await download.run()

    # Sessions and samplers

    def sessions(
        self, *, page_size: int = DEFAULT_PAGE_SIZE, access_scope: AccessScope = "owned"
    ) -> AsyncGenerator[str, None]:
        """Ids of all sessions, newest first, fetched page by page as they are needed.

        Args:
            page_size: sessions per request.
            access_scope: "owned", or "accessible" for those of others too.
        """

        async def fetch(limit: int, offset: int) -> Page[str]:
            page = await self.sessions_page(limit=limit, offset=offset, access_scope=access_scope)
            return page.sessions, None

        return all_items(fetch, lambda session_id: session_id, page_size)

    async def sessions_page(
        self, *, limit: int = DEFAULT_PAGE_SIZE, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> SessionsPage:
        """One page of session ids, newest first.

        Args:
            limit: at most so many.
            offset: how many to leave out at the start.
            access_scope: "owned", or "accessible" for those of others too.
        """
        query = {**_page(limit, offset), "access_scope": access_scope}
        return SessionsPage.read(
            await self._requests.ask("GET", _SESSIONS, "listing sessions", query=query, names_nothing=True)
        )

    async def get_session(self, session_id: str, *, access_scope: AccessScope = "owned") -> Session:
        """The training runs and samplers of a session."""
        path = f"{_SESSIONS}/{url_segment(check_segment('the id of a session', session_id))}"
        return Session.read(
            await self._requests.ask("GET", path, "showing a session", query={"access_scope": access_scope})
        )

    async def search_sessions(
        self, query: SessionQuery | None = None, *, page_size: int = 50
    ) -> AsyncGenerator[SessionSummary, None]:
        """Sessions that fit a query, newest first, fetched page by page as they are needed.

        Args:
            query: what to look for; None fits every session.
            page_size: sessions per request, at most 200.
        """
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
        """One page of the sessions that fit a query, newest first.

        Args:
            query: what to look for; None fits every session.
            limit: at most so many, up to 200.
            cursor: `next_cursor` of the page before; None begins with the newest session.
        """
        check_count("limit", limit, least=1)
        wanted = query or SessionQuery()
        body = {**wanted.fields(), "limit": limit}
        if cursor is not None:
            body["cursor"] = cursor.model_dump(mode="json")
        names_nothing = wanted.project_ids is None
        return SessionSearchPage.read(
            await self._requests.ask(
                "POST", f"{_SESSIONS}/search", "searching sessions", json=body, names_nothing=names_nothing
            )
        )

    async def assign_session_project(self, session_id: str, project_id: str) -> None:
        """Moves a session, with its runs, into a project."""
        path = f"{_SESSIONS}/{url_segment(check_segment('the id of a session', session_id))}/project"
        await self._requests.ask("PUT", path, "putting sessions into projects", json={"project_id": project_id})

    async def get_sampler(self, sampler_id: str) -> Sampler:
        """What a sampling session draws from.

        Args:
            sampler_id: `sampling_session_id` of a sampling client.
        """
        path = f"/api/v1/samplers/{url_segment(check_segment('the id of a sampler', sampler_id))}"
        return Sampler.read(await self._requests.ask("GET", path, "showing a sampler"))


def _page(limit: int, offset: int) -> dict[str, object]:
    check_count("limit", limit, least=1)
    check_count("offset", offset, least=0)
    return {"limit": limit, "offset": offset}


def _run_segment(run: str) -> str:
    is_path = isinstance(run, str) and run.startswith("tinker://")  # pyright: ignore[reportUnnecessaryIsInstance]
    return url_segment(CheckpointPath.parse(run).run_id if is_path else check_segment("the id of a training run", run))


def _checkpoint_url(path: CheckpointPath) -> str:
    return f"{_RUNS}/{url_segment(path.run_id)}/checkpoints/{path.kind}/{url_segment(path.name)}"
