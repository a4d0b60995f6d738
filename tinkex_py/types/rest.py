"""What services tell about training runs, checkpoints and sessions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from tinkex_py.types.outputs import Answer


def _in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""A time with its zone; where a service tells none it is UTC."""

Metadata = Mapping[str, Any]
AccessScope = Literal["owned", "accessible"]


class Cursor(Answer):
    """Which part of a listing a page is."""

    offset: int
    limit: int
    total_count: int


class Checkpoint(Answer):
    """One checkpoint in a listing.

    Attributes:
        checkpoint_id: kind and name, such as "weights/step-100"; some services give the name alone.
        checkpoint_type: "training", "sampler" or "external".
        time: when it was saved.
        tinker_path: its address, for every call that takes one.
        size_bytes: bytes of its files.
        public: whether others may use it.
        user_metadata: labels it was saved with.
        expires_at: when the service will delete it; None is never.
    """

    checkpoint_id: str
    checkpoint_type: str
    time: Moment | None = None
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: Metadata | None = None
    expires_at: Moment | None = None


class CheckpointsPage(Answer):
    """One page of checkpoints; `cursor` is None where the service gives all at once."""

    checkpoints: tuple[Checkpoint, ...]
    cursor: Cursor | None = None


class CopiedCheckpoint(Answer):
    """Where a copy of a checkpoint is."""

    tinker_path: str


class TrainingRun(Answer):
    """One training run, which is one training client's model."""

    training_run_id: str
    base_model: str
    model_owner: str | None = None
    is_lora: bool | None = None
    lora_rank: int | None = None
    corrupted: bool = False
    last_request_time: Moment | None = None
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: Metadata | None = None


class TrainingRunsPage(Answer):
    """One page of training runs."""

    training_runs: tuple[TrainingRun, ...]
    cursor: Cursor | None = None


class SessionsPage(Answer):
    """One page of session ids."""

    sessions: tuple[str, ...]


class Session(Answer):
    """What belongs to one session."""

    training_run_ids: tuple[str, ...] = ()
    sampler_ids: tuple[str, ...] = ()
    user_metadata: Metadata | None = None
    display_name: str | None = None


class SessionStatus(Answer):
    """How a session stands.

    Attributes:
        type: "active", "client_finished", "cancelled" or "failed".
        reason: for "client_finished" `{"type": "success" | "errored" | "interrupted"}`; for "failed" what failed.
        detail: more about it, in words.
        category: for "failed" who is to blame: "user" or "internal".
        message: for "failed" what happened.
    """

    type: str
    reason: Metadata | None = None
    detail: str | None = None
    category: str | None = None
    message: str | None = None


class SessionSummary(Answer):
    """One session in the result of a search."""

    session_id: str
    created_at: Moment
    owner: str | None = None
    project_id: str | None = None
    status: SessionStatus | None = None
    checkpoints_count: int = 0
    checkpoint_storage_bytes: int | None = None
    display_name: str | None = None
    user_metadata: Metadata | None = None


@dataclass(frozen=True, kw_only=True)
class SessionQuery:
    """What sessions to look for; all that is given must fit.

    Attributes:
        session_id: this session; with `display_name`, one of the two is enough.
        display_name: words that the display name has, in any case.
        user_metadata: labels that the session was made with.
        project_ids: it is in one of these projects.
        statuses: it stands in one of these ways: "active", "client_finished", "cancelled", "failed".
        access_scope: "owned", or "accessible" for those of others too.
    """

    session_id: str | None = None
    display_name: str | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    project_ids: Sequence[str] | None = None
    statuses: Sequence[str] | None = None
    access_scope: AccessScope = "owned"

    def fields(self) -> dict[str, Any]:
        """The query as services read it."""
        fields = {
            "session_id": self.session_id,
            "display_name": self.display_name,
            "user_metadata": dict(self.user_metadata),
            "project_ids": None if self.project_ids is None else list(self.project_ids),
            "statuses": None if self.statuses is None else [{"type": status} for status in self.statuses],
            "owner": {"type": "own" if self.access_scope == "owned" else "accessible"},
        }
        return {name: value for name, value in fields.items() if value is not None}


class SessionSearchCursor(Answer):
    """Where the next page of a search begins."""

    last_created_at: Moment
    last_session_id: str


class SessionSearchPage(Answer):
    """One page of a search, newest first."""

    sessions: tuple[SessionSummary, ...]
    next_cursor: SessionSearchCursor | None = None


class Sampler(Answer):
    """What a sampling session draws from; `model_path` is None for a base model or a snapshot without a name."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


class ArchiveUrl(Answer):
    """Where a checkpoint's archive can be downloaded without a key, and until when."""

    url: str
    expires: Moment | None = None


class ExternalWeightsUrls(Answer):
    """Where each file of external weights can be downloaded without a key: file name to address."""

    urls: Mapping[str, str]
    expires: Moment | None = None


@dataclass(frozen=True)
class DownloadProgress:
    """How far a download is.

    Attributes:
        received_bytes: bytes of the archive on disk, with those of an earlier attempt.
        total_bytes: bytes of the whole archive; None if the service does not tell.
    """

    received_bytes: int
    total_bytes: int | None
