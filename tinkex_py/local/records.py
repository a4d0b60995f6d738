"""What the service stores about sessions, training runs and checkpoints."""

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

# Listings omit the ephemeral ones, which belong to sampling sessions.
Kind = Literal["weights", "sampler_weights", "external_weights", "ephemeral"]
EndReason = Literal["success", "errored", "interrupted"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class TrainingRunInfo(_Record):
    """One training run, which is one training model."""

    run_id: str
    base_model: str
    rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    created: datetime
    user_metadata: dict[str, Any] | None = None

    @property
    def session_id(self) -> str:
        """The session that created the run."""
        return self.run_id.partition(":")[0]


class SessionEnd(_Record):
    """Why a session is finished."""

    reason: EndReason = "success"
    detail: str | None = None


class SessionInfo(_Record):
    """The session of a client."""

    session_id: str
    created: datetime
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None
    project_id: str | None = None
    end: SessionEnd | None = None

    @property
    def finished(self) -> bool:
        """Whether the session is finished."""
        return self.end is not None


class CheckpointInfo(_Record):
    """One checkpoint; its files are in `folder`."""

    run: TrainingRunInfo
    kind: Kind
    name: str
    folder: str
    time: datetime
    size_bytes: int = 0
    has_optimizer: bool = False
    public: bool = False
    copied_from: str | None = None
    user_metadata: dict[str, Any] | None = None
    expires_at: datetime | None = None

    @property
    def path(self) -> str:
        """The `tinker://` path for clients."""
        return f"tinker://{self.run.run_id}/{self.kind}/{self.name}"


def expiry(ttl_seconds: int | None) -> datetime | None:
    """Returns when a time to live (seconds) from now ends."""
    return None if ttl_seconds is None else datetime.now(UTC) + timedelta(seconds=ttl_seconds)
