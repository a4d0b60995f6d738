"""A full disk: typed errors, nothing half written, and a service that goes on when there is room again."""

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from tests.local import full_disk_program
from tinkex_py.local.database import Database
from tinkex_py.local.records import SessionInfo

FULL = "the service cannot use its state folder"


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_is_a_typed_error_and_the_service_goes_on(tmp_path):
    command = [sys.executable, full_disk_program.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["save before"]["path"].endswith("/weights/kept")
    for failed in (found["save"], found["sampler"], *found["models"]):
        assert failed["status"] == 200
        assert failed["category"] == "server"
        assert FULL in failed["error"]
        assert str(tmp_path) not in failed["error"]
    assert found["session"]["status"] == 507
    assert FULL in found["session"]["detail"]
    assert "metrics" in found["step"]
    assert (found["drafts"], found["sessions"]) == ([], 1)
    assert found["session after"]["status"] == 200
    assert all("model_id" in made for made in found["models after"])
    assert found["save after"]["path"] == found["save before"]["path"]
    assert found["files"] == ["adapter_model.safetensors", "optimizer.safetensors"]
    service_files = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert service_files <= {"runs", "state.sqlite3", "tokenizer", "archives"}


def test_a_transaction_that_a_full_disk_ends_raises_the_error_of_the_disk(tmp_path):
    """SQLite has rolled back by itself then; a second rollback would fail and hide the reason."""

    def full() -> None:
        with database._transaction("IMMEDIATE"):
            database._connection.execute("ROLLBACK")
            raise OSError(28, "No space left on device")

    database = Database(tmp_path / "state.sqlite3")
    try:
        with pytest.raises(OSError, match="No space left"):
            full()
        database.put_session(SessionInfo(session_id="s", created=datetime.now(UTC)))
        assert [session.session_id for session in database.sessions()] == ["s"]
    finally:
        database.close()
