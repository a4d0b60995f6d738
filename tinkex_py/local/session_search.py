"""Which sessions fit a query."""

from itertools import islice

from tinkex_py.local.database import Database
from tinkex_py.local.records import SessionInfo
from tinkex_py.local.requests import OwnerQuery, SearchBody, StatusQuery
from tinkex_py.types import SessionSearchCursor, SessionSearchPage, SessionStatus, SessionSummary

OWNER = "local"
"""The one owner of everything, and the project of what was put in none."""


def page_of_sessions(records: Database, query: SearchBody) -> SessionSearchPage:
    """One page of summaries, newest first, and where the next page begins if there is one."""
    cursor = query.cursor
    after = None if cursor is None else (cursor.last_created_at, cursor.last_session_id)
    fitting = (session for session in records.sessions(after) if fits(session, query))
    found = list(islice(fitting, query.limit + 1))
    page = found[: query.limit]
    following = None
    if len(found) > query.limit:
        following = SessionSearchCursor(last_created_at=page[-1].created, last_session_id=page[-1].session_id)
    return SessionSearchPage(sessions=tuple(_summary(records, session) for session in page), next_cursor=following)


def fits(session: SessionInfo, query: SearchBody) -> bool:
    """Whether a session is meant by every part of a query."""
    metadata = session.user_metadata or {}
    return (
        _is_named(session, query)
        and all(metadata.get(key) == value for key, value in query.user_metadata.items())
        and (query.project_ids is None or (session.project_id or OWNER) in query.project_ids)
        and (query.statuses is None or any(_has_status(session, status) for status in query.statuses))
        and _is_owned(query.owner)
    )


def _is_named(session: SessionInfo, query: SearchBody) -> bool:
    """An id and a display name widen each other; neither is no condition."""
    if query.session_id is None and query.display_name is None:
        return True
    if session.session_id == query.session_id:
        return True
    if query.display_name is None:
        return False
    name = (session.display_name or "").casefold()
    return all(word in name for word in query.display_name.casefold().split())


def _has_status(session: SessionInfo, status: StatusQuery) -> bool:
    if session.end is None:
        return status.type == "active"
    return status.type == "client_finished" and (status.reasons is None or session.end.reason in status.reasons)


def _is_owned(owner: OwnerQuery) -> bool:
    return owner.type != "user" or OWNER in owner.owner_urns


def _summary(records: Database, session: SessionInfo) -> SessionSummary:
    count, size = records.session_usage(session.session_id)
    if session.end is None:
        status = SessionStatus(type="active")
    else:
        reason = {"type": session.end.reason}
        status = SessionStatus(type="client_finished", reason=reason, detail=session.end.detail)
    return SessionSummary(
        session_id=session.session_id,
        created_at=session.created,
        owner=OWNER,
        project_id=session.project_id or OWNER,
        status=status,
        checkpoints_count=count,
        checkpoint_storage_bytes=size,
        display_name=session.display_name,
        user_metadata=session.user_metadata,
    )
