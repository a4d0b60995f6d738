"""`tinkex-py runs` and `tinkex-py checkpoints` against a running service."""

import asyncio
import json
import os
import pty
import subprocess
import sys

import pytest

from tests.commands.conftest import KEY
from tinkex_py import AsyncServiceClient, TinkexConfig
from tinkex_py.commands.common.printing import cell_text, size_text


async def made_run(address, names):
    """A training run with these checkpoints, oldest first."""
    async with AsyncServiceClient(TinkexConfig(base_url=address, api_key=KEY)) as service:
        training = await service.create_lora_training_client("tiny", rank=2, seed=0)
        return training.model_id, [(await training.save_state(name)).path for name in names]


@pytest.fixture
def saved(address):
    """A run of its own for every test: its id, and the paths of three checkpoints."""
    return asyncio.run(made_run(address, ["one", "two", "three"]))


def lines_of(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def paths_left(command, run_id):
    return [line["tinker_path"] for line in lines_of(command("checkpoints", "list", "--run", run_id, "--json"))]


def test_list(command, saved):
    run_id, paths = saved
    assert paths_left(command, run_id) == paths[::-1]  # newest first
    assert paths_left(command, paths[0]) == paths[::-1]  # a path names its run too
    everything = [line["tinker_path"] for line in lines_of(command("checkpoints", "list", "--limit", "0", "--json"))]
    assert everything[:3] == paths[::-1]
    table = command("checkpoints", "list", "--run", run_id)
    rows = [line.split() for line in table.stdout.splitlines()]
    assert rows[0] == ["path", "type", "saved", "size", "expires", "shared"]
    assert [row[0] for row in rows[1:]] == paths[::-1]  # whole, not cut off
    assert rows[1][5:7] == ["37.9", "KiB"] or rows[1][6] == "KiB"


def test_a_limit_says_that_there_is_more(command, saved):
    run_id, paths = saved
    result = command("checkpoints", "list", "--run", run_id, "--limit", "2", "--json")
    assert [line["tinker_path"] for line in lines_of(result)] == [paths[2], paths[1]]
    assert result.stderr == "only the first 2 are shown: use --limit 0 to list all\n"
    assert command("checkpoints", "list", "--run", run_id, "--limit", "3").stderr == ""


def test_nothing_to_list(command, address):
    run_id, _ = asyncio.run(made_run(address, []))
    result = command("checkpoints", "list", "--run", run_id)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no checkpoints\n")
    result = command("checkpoints", "list", "--run", run_id, "--json")
    assert (result.exit_code, result.output) == (0, "")
    result = command("checkpoints", "list", "--run", "no-such-run")
    assert result.exit_code == 1
    assert result.stderr.startswith("tinkex-py checkpoints list: ")
    assert len(result.stderr.splitlines()) == 1


def test_runs(command, saved):
    run_id, paths = saved
    first = lines_of(command("runs", "--json"))[0]
    assert (first["training_run_id"], first["base_model"], first["lora_rank"]) == (run_id, "tiny", 2)
    assert first["last_checkpoint"]["tinker_path"] == paths[2]
    (only,) = lines_of(command("runs", paths[0], "--json"))
    assert only["training_run_id"] == run_id
    table = command("runs", "--limit", "1")
    rows = [line.split() for line in table.stdout.splitlines()]
    assert rows[0] == ["run", "base", "model", "rank", "last", "request", "last", "checkpoint", "state"]
    assert rows[1][:3] == [run_id, "tiny", "2"]
    assert rows[1][-1] == "weights/three"
    result = command("runs", "no-such-run")
    assert result.exit_code == 1
    assert "no-such-run" in result.stderr
    assert command("runs", "a/b").exit_code == 2


def test_download(command, saved, tmp_path, monkeypatch):
    _, paths = saved
    monkeypatch.chdir(tmp_path)
    result = command("checkpoints", "download", paths[0])
    assert (result.exit_code, result.stdout) == (0, f"downloaded {paths[0]} to {tmp_path / 'one'}\n")
    names = ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"]
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == names
    (line,) = lines_of(command("checkpoints", "download", paths[1], "new/two", "--json"))
    assert line == {"path": paths[1], "folder": str(tmp_path / "new" / "two"), "files": names}
    again = command("checkpoints", "download", paths[0])
    assert again.exit_code == 2
    assert "is not empty" in again.stderr
    assert command("checkpoints", "download", "nonsense").exit_code == 2
    assert command("checkpoints", "download", paths[0] + "-gone", "gone").exit_code == 1
    assert not (tmp_path / "gone").exists()


def test_download_as_an_adapter(command, saved, tmp_path):
    _, paths = saved
    target = str(tmp_path / "adapter")
    (line,) = lines_of(command("checkpoints", "download", paths[0], target, "--adapter", "--json"))
    assert line["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert command("checkpoints", "download", paths[0], target, "--adapter").exit_code == 2
    assert command("checkpoints", "download", paths[1], target, "--adapter", "--overwrite").exit_code == 0
    wrong = command("checkpoints", "download", paths[1], target, "--overwrite")
    assert wrong.exit_code == 2
    assert "--overwrite needs --adapter" in wrong.stderr


def test_ttl(command, saved):
    run_id, paths = saved

    def expiry():
        return lines_of(command("checkpoints", "list", "--run", run_id, "--json"))[2]["expires_at"]

    assert lines_of(command("checkpoints", "ttl", paths[0], "3600", "--json")) == [
        {"path": paths[0], "ttl_seconds": 3600}
    ]
    assert expiry() is not None
    result = command("checkpoints", "ttl", paths[0], "--never")
    assert (result.exit_code, result.stdout) == (0, f"{paths[0]} never expires\n")
    assert expiry() is None
    for arguments in ((), ("60", "--never"), ("0",), ("soon",)):
        assert command("checkpoints", "ttl", paths[0], *arguments).exit_code == 2


def test_delete_with_yes(command, saved):
    run_id, paths = saved
    result = command("checkpoints", "delete", paths[0], paths[1], paths[0], "--yes", "--json")
    assert lines_of(result) == [{"path": path, "deleted": True} for path in paths[:2]]
    assert paths_left(command, run_id) == [paths[2]]
    result = command("checkpoints", "delete", paths[0], "--yes")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


def test_delete_without_a_terminal_deletes_nothing(command, saved):
    run_id, paths = saved
    result = command("checkpoints", "delete", paths[0], stdin="y\n")
    assert result.exit_code == 2
    assert "stdin is not a terminal: pass --yes" in result.stderr
    result = command("checkpoints", "delete", paths[0], "nonsense", "--yes")
    assert result.exit_code == 2
    assert paths_left(command, run_id) == paths[::-1]


def on_a_terminal(address, *arguments, typed):
    """The real command in a process of its own, with a terminal as its stdin: exit code, stdout and stderr."""
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tinkex_py", *arguments],
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TINKER_BASE_URL": address, "TINKER_API_KEY": KEY},
        )
        os.write(master, typed)
        out, err = process.communicate(timeout=60)
    finally:
        os.close(master)
        os.close(slave)
    assert KEY not in out + err
    return process.returncode, out, err


@pytest.mark.parametrize(("typed", "code"), [(b"n\n", 130), (b"y\n", 0)])
def test_delete_asks(command, address, saved, typed, code):
    run_id, paths = saved
    got, out, err = on_a_terminal(address, "checkpoints", "delete", paths[0], typed=typed)
    assert (got, out) == (code, "" if code else f"deleted {paths[0]}\n")
    assert f"{paths[0]}\nDelete 1 checkpoint(s) permanently? [y/N]: " in err
    assert paths_left(command, run_id) == (paths[::-1] if code else [paths[2], paths[1]])


def test_what_a_service_says_cannot_steer_the_terminal():
    assert cell_text("a\x1b[2Jb\nc") == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c"
    assert [cell_text(value) for value in (None, True, False, 3)] == ["", "yes", "no", "3"]


def test_sizes():
    sizes = [0, 1023, 1024, 1536, 1024**2, 3 * 1024**4, 1024**6]
    assert [size_text(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "3.0 TiB",
        "1048576.0 TiB",
    ]
    assert size_text(None) is None
