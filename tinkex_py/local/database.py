"""The state file: sessions, runs and checkpoints in one SQLite database.

Methods are synchronous and safe to call from any thread, but not on the event loop.
"""

# ruff: noqa: S608  (statements consist of fixed parts; values are always bound)

import sqlite3
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinkex_py.errors import ConfigError
from tinkex_py.local.records import CheckpointInfo, SessionInfo, TrainingRunInfo

VERSION = 1
_TABLES = """
CREATE TABLE sessions (session_id TEXT PRIMARY KEY, created TEXT NOT NULL, project_id TEXT, record TEXT NOT NULL);
CREATE INDEX sessions_newest ON sessions (created DESC, session_id DESC);
CREATE TABLE runs (run_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, created TEXT NOT NULL, record TEXT NOT NULL);
CREATE INDEX runs_newest ON runs (created DESC, run_id DESC);
CREATE INDEX runs_of_session ON runs (session_id);
CREATE TABLE checkpoints (
    run_id TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, folder TEXT NOT NULL, time TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, expires_at TEXT, record TEXT NOT NULL, PRIMARY KEY (run_id, kind, name));
CREATE INDEX checkpoints_newest ON checkpoints (time DESC, run_id, kind, name);
CREATE INDEX checkpoints_expiring ON checkpoints (expires_at) WHERE expires_at IS NOT NULL;
"""
_VISIBLE = "kind != 'ephemeral' AND (expires_at IS NULL OR expires_at > ?)"


class Database:
    """An open state file. No other process can open it at the same time.

    Args:
        file: its path; created if missing.

    Raises:
        ConfigError: another service uses it, a newer version created it, or it is not a state file.
    """

    def __init__(self, file: Path) -> None:
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(file)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Closes the file; repeated calls have no effect."""
        with self._lock:
            self._connection.close()

    def _prepare(self, file: Path) -> None:
        try:
            # Held until the process ends, even by a crash: two services would delete each other's files.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA synchronous = FULL")
            with self._transaction("EXCLUSIVE"):
                (version,) = self._connection.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in filter(None, (part.strip() for part in _TABLES.split(";"))):
                        self._connection.execute(statement)
                    self._connection.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise ConfigError(f"the state file {file} cannot be opened: {error}") from error
            raise ConfigError(f"{file} is in use by another service: give each service its own folder") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{file} is not a state file ({error}): choose another folder") from error
        if version > VERSION:
            raise ConfigError(
                f"a newer version of this package created {file}: use that version, or choose another folder"
            )

    # Sessions

    def put_session(self, session: SessionInfo) -> None:
        """Adds or replaces a session."""
        self._execute(
            "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?)",
            (session.session_id, _stamp(session.created), session.project_id, session.model_dump_json()),
        )

    def sessions(self, after: tuple[datetime, str] | None = None) -> Iterator[SessionInfo]:
        """Returns sessions, newest first; all of them, or those after one with this creation time and id."""
        where, values = ("", ())
        if after is not None:
            where, values = "WHERE (created, session_id) < (?, ?)", (_stamp(after[0]), after[1])
        rows = self._rows(f"SELECT record FROM sessions {where} ORDER BY created DESC, session_id DESC", values)
        return (SessionInfo.model_validate_json(record) for (record,) in rows)

    def session_ids(self, limit: int, offset: int) -> list[str]:
        """Returns a page of session ids, newest first."""
        statement = "SELECT session_id FROM sessions ORDER BY created DESC, session_id DESC LIMIT ? OFFSET ?"
        return [session_id for (session_id,) in self._rows(statement, (limit, offset))]

    # Runs

    def put_run(self, run: TrainingRunInfo) -> None:
        """Adds or replaces a run."""
        self._execute(
            "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)",
            (run.run_id, run.session_id, _stamp(run.created), run.model_dump_json()),
        )

    def run(self, run_id: str) -> TrainingRunInfo | None:
        """Returns a run, or None if there is none."""
        rows = self._rows("SELECT record FROM runs WHERE run_id = ?", (run_id,))
        return TrainingRunInfo.model_validate_json(rows[0][0]) if rows else None

    def run_ids(self, session_id: str | None = None) -> list[str]:
        """Returns the ids of all runs, or of those of a session, oldest first."""
        where, values = ("", ()) if session_id is None else ("WHERE session_id = ?", (session_id,))
        return [run_id for (run_id,) in self._rows(f"SELECT run_id FROM runs {where} ORDER BY created, run_id", values)]

    def runs(self, limit: int, offset: int, project_id: str | None = None) -> tuple[list[TrainingRunInfo], int]:
        """Returns a page of runs, newest first, and the total number."""
        where, values = ("", ())
        if project_id is not None:
            where = "WHERE session_id IN (SELECT session_id FROM sessions WHERE project_id = ?)"
            values = (project_id,)
        ((count,),) = self._rows(f"SELECT COUNT(*) FROM runs {where}", values)
        rows = self._rows(
            f"SELECT record FROM runs {where} ORDER BY created DESC, run_id DESC LIMIT ? OFFSET ?",
            (*values, limit, offset),
        )
        return [TrainingRunInfo.model_validate_json(record) for (record,) in rows], count

    # Checkpoints

    def put_checkpoint(self, info: CheckpointInfo) -> None:
        """Adds a checkpoint, or replaces the one of that name."""
        self._execute(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                info.run.run_id,
                info.kind,
                info.name,
                info.folder,
                _stamp(info.time),
                info.size_bytes,
                None if info.expires_at is None else _stamp(info.expires_at),
                info.model_dump_json(),
            ),
        )

    def checkpoint(self, run_id: str, kind: str, name: str) -> CheckpointInfo | None:
        """Returns a checkpoint, also an expired one, or None if there is none."""
        found = self._checkpoints("run_id = ? AND kind = ? AND name = ?", (run_id, kind, name))
        return found[0] if found else None

    def change_checkpoint(self, info: CheckpointInfo, **changes: Any) -> CheckpointInfo | None:
        """Changes the record of a checkpoint; returns None if it was deleted or replaced."""
        with self._transaction("IMMEDIATE"):
            found = self.checkpoint(info.run.run_id, info.kind, info.name)
            if found is None or found.folder != info.folder:
                return None
            changed = found.model_copy(update=changes)
            self.put_checkpoint(changed)
            return changed

    def drop_checkpoint(self, info: CheckpointInfo) -> None:
        """Removes the record of a checkpoint, unless another one has taken its name."""
        self._execute(
            "DELETE FROM checkpoints WHERE run_id = ? AND kind = ? AND name = ? AND folder = ?",
            (info.run.run_id, info.kind, info.name, info.folder),
        )

    def checkpoints(
        self, run_id: str | None = None, *, limit: int = -1, offset: int = 0
    ) -> tuple[list[CheckpointInfo], int]:
        """Returns a page of the checkpoints that clients can see, newest first, and the total number."""
        where, values = _VISIBLE, (_stamp(datetime.now(UTC)),)
        if run_id is not None:
            where, values = f"run_id = ? AND {_VISIBLE}", (run_id, *values)
        ((count,),) = self._rows(f"SELECT COUNT(*) FROM checkpoints WHERE {where}", values)
        page = f"{where} ORDER BY time DESC, run_id, kind, name LIMIT ? OFFSET ?"
        return self._checkpoints(page, (*values, limit, offset)), count

    def session_usage(self, session_id: str) -> tuple[int, int]:
        """Returns the number of visible checkpoints of a session, and their bytes."""
        ((count, size),) = self._rows(
            "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM checkpoints "
            f"WHERE run_id IN (SELECT run_id FROM runs WHERE session_id = ?) AND {_VISIBLE}",
            (session_id, _stamp(datetime.now(UTC))),
        )
        return count, size

    def ephemeral(self, run_id: str | None = None) -> list[CheckpointInfo]:
        """Returns the unnamed snapshots of one run, or of all."""
        where, values = ("", ()) if run_id is None else (" AND run_id = ?", (run_id,))
        return self._checkpoints(f"kind = 'ephemeral'{where}", values)

    def expired(self) -> list[CheckpointInfo]:
        """Returns expired checkpoints."""
        return self._checkpoints("expires_at <= ?", (_stamp(datetime.now(UTC)),))

    def next_expiry(self) -> datetime | None:
        """Returns when the next checkpoint expires, or None."""
        ((moment,),) = self._rows("SELECT MIN(expires_at) FROM checkpoints", ())
        return None if moment is None else datetime.fromisoformat(moment)

    def folders(self) -> set[str]:
        """Returns the folders of all checkpoints."""
        return {folder for (folder,) in self._rows("SELECT folder FROM checkpoints", ())}

    def _checkpoints(self, where: str, values: tuple[Any, ...]) -> list[CheckpointInfo]:
        rows = self._rows(f"SELECT record FROM checkpoints WHERE {where}", values)
        return [CheckpointInfo.model_validate_json(record) for (record,) in rows]

    def _rows(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    def _execute(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._lock:
            self._connection.execute(statement, values)

    @contextmanager
    def _transaction(self, kind: str) -> Generator[None]:
        with self._lock:
            self._connection.execute(f"BEGIN {kind}")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk has ended the transaction already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def _stamp(moment: datetime) -> str:
    """Returns a text that sorts by time."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
