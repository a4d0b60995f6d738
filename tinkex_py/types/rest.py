"""Training runs, checkpoints and sessions, as services report them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator

from tinkex_py.arguments import check_choice, check_labels, check_list, check_text
from tinkex_py.types.response_model import ResponseModel


def _in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""A time with its zone; UTC if the service reports none."""

Metadata = Mapping[str, Any]
AccessScope = Literal["owned", "accessible"]


class Cursor(ResponseModel):
    """The position of a page in a listing."""

    offset: int
    limit: int
    total_count: int


class Checkpoint(ResponseModel):
    """One checkpoint in a listing.

    Attributes:
        checkpoint_id: kind and name, such as "weights/step-100"; some services return the name only.
        checkpoint_type: "training", "sampler" or "external".
        time: when it was saved.
        tinker_path: its path, for calls with a `path` argument.
        size_bytes: size of its files.
        public: whether other users can use it.
        user_metadata: labels set when it was saved.
        expires_at: when the service deletes it; None is never.
    """

    checkpoint_id: str
    checkpoint_type: str
    time: Moment | None = None
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: Metadata | None = None
    expires_at: Moment | None = None


class CheckpointsPage(ResponseModel):
    """One page of checkpoints; `cursor` is None if the service returns all of them at once."""

    checkpoints: tuple[Checkpoint, ...]
    cursor: Cursor | None = None


class CopiedCheckpoint(ResponseModel):
    """Path of a copied checkpoint."""

    tinker_path: str


class TrainingRun(ResponseModel):
    """One training run: the model of one training client."""

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


class TrainingRunsPage(ResponseModel):
    """One page of training runs."""

    training_runs: tuple[TrainingRun, ...]
    cursor: Cursor | None = None


class SessionsPage(ResponseModel):
    """One page of session ids."""

    sessions: tuple[str, ...]


class Session(ResponseModel):
    """The training runs and samplers of one session."""

    training_run_ids: tuple[str, ...] = ()
    sampler_ids: tuple[str, ...] = ()
    user_metadata: Metadata | None = None
    display_name: str | None = None


class SessionStatus(ResponseModel):
    """Status of a session.

    Attributes:
        type: "active", "client_finished", "cancelled" or "failed".
        reason: for "client_finished" `{"type": "success" | "errored" | "interrupted"}`; for "failed" what failed.
        detail: further explanation.
        category: for "failed", who caused the failure: "user" or "internal".
        message: for "failed", the error message.
    """

    type: str
    reason: Metadata | None = None
    detail: str | None = None
    category: str | None = None
    message: str | None = None


class SessionSummary(ResponseModel):
    """One session in a search result."""

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
    """A search for sessions. A session must match all criteria that are set.

    Attributes:
        session_id: id of the session; if `display_name` is set too, matching one of the two is enough.
        display_name: words of the display name, ignoring case.
        user_metadata: labels of the session.
        project_ids: projects, one of which contains the session.
        statuses: possible statuses: "active", "client_finished", "cancelled", "failed".
        access_scope: "owned", or "accessible" to include sessions of other users.
    """

    session_id: str | None = None
    display_name: str | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    project_ids: Sequence[str] | None = None
    statuses: Sequence[str] | None = None
    access_scope: AccessScope = "owned"

    def __post_init__(self) -> None:
        for name in ("session_id", "display_name"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        for name in ("project_ids", "statuses"):
            if getattr(self, name) is not None:
                check_list(name, getattr(self, name), str)
        check_labels("user_metadata", self.user_metadata)
        check_choice("access_scope", self.access_scope, get_args(AccessScope))

    def fields(self) -> dict[str, Any]:
        """Returns the fields to send."""
        fields = {
            "session_id": self.session_id,
            "display_name": self.display_name,
            "user_metadata": dict(self.user_metadata),
            "project_ids": None if self.project_ids is None else list(self.project_ids),
            "statuses": None if self.statuses is None else [{"type": status} for status in self.statuses],
            "owner": {"type": "own" if self.access_scope == "owned" else "accessible"},
        }
        return {name: value for name, value in fields.items() if value is not None}


class SessionSearchCursor(ResponseModel):
    """The position of the next page of a search."""

    last_created_at: Moment
    last_session_id: str


class SessionSearchPage(ResponseModel):
    """One page of a search, newest first."""

    sessions: tuple[SessionSummary, ...]
    next_cursor: SessionSearchCursor | None = None


class Sampler(ResponseModel):
    """The model of a sampling session; `model_path` is None for a base model or an unnamed snapshot."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


class ArchiveUrl(ResponseModel):
    """URL of a checkpoint's archive, which needs no key, and its expiry."""

    url: str
    expires: Moment | None = None


class ExternalWeightsUrls(ResponseModel):
    """URLs of the files of external weights by file name, which need no key, and their expiry."""

    urls: Mapping[str, str]
    expires: Moment | None = None


@dataclass(frozen=True)
class DownloadProgress:
    """Progress of a download.

    Attributes:
        received_bytes: bytes of the archive on disk, including those of earlier attempts.
        total_bytes: bytes of the whole archive; None if unknown.
    """

    received_bytes: int
    total_bytes: int | None
