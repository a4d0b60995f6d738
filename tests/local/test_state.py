"""The state folder: what survives a restart, and a folder that cannot be used."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from tests.client.data import datum
from tests.client.recorder import QUICK
from tests.support.served import serving
from tinkex_py import AsyncServiceClient, NotFound, RequestFailed, TinkexConfig
from tinkex_py.errors import ConfigError, TinkexError
from tinkex_py.local import LocalOptions, LocalService
from tinkex_py.local.checkpoints import STATE_FILE, CheckpointStore
from tinkex_py.local.database import VERSION, Database
from tinkex_py.local.records import CheckpointInfo, SessionInfo, TrainingRunInfo
from tinkex_py.local.results import ResultBook


@pytest.mark.asyncio
async def test_a_client_resumes_from_its_checkpoint_after_a_restart(tmp_path):
    """One client over both lives of a service, whose process is killed in between."""
    state = ("--state-dir", str(tmp_path))
    with serving(*state) as (process, url):
        client = AsyncServiceClient(TinkexConfig(base_url=url, api_key="tml-x", retry=QUICK))
        training = await client.create_lora_training_client("tiny", rank=4, seed=1)
        await training.forward_backward([datum(4, 1)])
        await training.optim_step()
        path = (await training.save_state("kept")).path
        expected = (await training.forward([datum(4, 2)])).metrics["loss:sum"]
        sampler = await training.save_weights_and_get_sampling_client()
        await training.forward_backward([datum(4, 1)])  # accumulated, not applied
        session_id = training.model_id.partition(":")[0]
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    with serving(*state, port=int(url.rpartition(":")[2])):
        for call in (training.optim_step(), training.forward([datum(4, 1)]), training.save_state("lost")):
            with pytest.raises(NotFound, match="restarted.*unsaved weights and gradients are gone"):
                await call
        with pytest.raises(TinkexError):
            await sampler.compute_logprobs(datum(4, 1).model_input)
        rest = client.create_rest_client()
        assert [run.training_run_id async for run in rest.training_runs()] == [training.model_id]
        assert [checkpoint.tinker_path async for checkpoint in rest.checkpoints()] == [path]
        assert [found async for found in rest.sessions()] == [session_id]
        assert (await rest.get_session(session_id)).training_run_ids == (training.model_id,)
        again = await client.create_training_client_from_state(path, with_optimizer=True)
        assert (await again.forward([datum(4, 2)])).metrics["loss:sum"] == expected
        folder = await rest.download_checkpoint(path, tmp_path / "download")
        assert len(list(folder.iterdir())) == 3
        await client.aclose()
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 1  # the unsaved model of the second life left no folder
    assert [entry.name.rpartition(".")[0] for entry in runs[0].glob("*/*")] == ["kept"]


@pytest.mark.asyncio
async def test_a_failure_on_the_way_to_a_checkpoint_is_the_clients_to_see(tmp_path):
    async with AsyncServiceClient.local(state_dir=tmp_path) as client:
        training = await client.create_lora_training_client("tiny", rank=4)
        (tmp_path / "runs").write_text("a file where a folder should be")
        with pytest.raises(RequestFailed, match=r"cannot use its state folder \((Not a directory|File exists)\)"):
            await training.save_state("x")
        (tmp_path / "runs").unlink()
        assert (await training.save_state("x")).path.endswith("/weights/x")


@pytest.mark.asyncio
async def test_futures_of_an_earlier_run_find_no_result_of_this_one():
    """Each run counts its requests from 1: the same count must not be the same id."""
    earlier, later = ResultBook(9, 9), ResultBook(9, 9)
    ids = [earlier.open().request_id for _ in range(3)]
    assert all(later.open() for _ in range(3))
    for request_id in ids:
        assert earlier.find(request_id) is not None
        assert later.find(request_id) is None
        assert not later.was_given(request_id)


@pytest.mark.asyncio
async def test_two_services_cannot_share_a_folder(tmp_path):
    first, second = (LocalService(LocalOptions(state_dir=tmp_path)) for _ in range(2))
    await first.start()
    with pytest.raises(ConfigError, match=r"in use by another service: give each service its own folder"):
        await second.start()
    await first.stop()
    await second.start()
    await second.stop()


def test_another_process_cannot_share_a_folder_either(tmp_path):
    file = str(tmp_path / "x")
    program = f"from pathlib import Path; from tinkex_py.local.database import Database; Database(Path({file!r}))"
    with closing(Database(tmp_path / "x")):
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "in use by another service" in ended.stderr


def test_files_that_are_no_state_files_are_refused_and_left_alone(tmp_path):
    notes = tmp_path / STATE_FILE
    notes.write_text("my notes, which are not a database " * 40)
    with pytest.raises(ConfigError, match="is not a state file"):
        CheckpointStore(tmp_path)
    assert notes.read_text().startswith("my notes")
    notes.unlink()
    with closing(sqlite3.connect(notes)) as other:
        other.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(ConfigError, match="newer version"):
        CheckpointStore(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="state_dir.*file"):
        CheckpointStore(tmp_path / "file" / "state")


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    mine = [tmp_path / "runs" / "a" / "weights" / "notes", tmp_path / "archives" / "photos.tar", tmp_path / "x.txt"]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    CheckpointStore(tmp_path).close()
    assert all(file.read_text() == "mine" for file in mine)


def run(run_id: str, created: datetime) -> TrainingRunInfo:
    kinds = {"train_unembed": True, "train_mlp": True, "train_attn": True}
    return TrainingRunInfo(run_id=run_id, base_model="tiny", rank=4, created=created, **kinds)


def test_records_come_back_as_they_were_in_order_and_in_pages(tmp_path):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    moments = [start + timedelta(microseconds=number // 2) for number in range(7)]  # pairs of the same moment
    runs = [run(f"s{number % 2}:train:{number}", moment) for number, moment in enumerate(moments)]
    sessions = [SessionInfo(session_id=f"s{number}", created=moment) for number, moment in enumerate(moments)]
    with closing(Database(tmp_path / "x")) as records:
        for item in runs:
            records.put_run(item)
        for item in sessions:
            records.put_session(item)
    with closing(Database(tmp_path / "x")) as records:
        everything, count = records.runs(100, 0)
        assert count == 7
        assert sorted(everything, key=lambda item: item.run_id) == sorted(runs, key=lambda item: item.run_id)
        assert [item.created for item in everything] == sorted(moments, reverse=True)
        paged = [records.runs(2, offset) for offset in range(0, 8, 2)]
        assert [item for page, _ in paged for item in page] == everything
        assert {total for _, total in paged} == {7}
        assert records.run_ids("s1") == ["s1:train:1", "s1:train:3", "s1:train:5"]
        listed = list(records.sessions())
        assert [item.session_id for item in listed] == records.session_ids(100, 0)
        for index, item in enumerate(listed):
            assert list(records.sessions((item.created, item.session_id))) == listed[index + 1 :]


def test_a_replaced_checkpoint_is_not_changed_or_dropped_by_the_old_one(tmp_path):
    owner = run("a", datetime.now(UTC))
    old = CheckpointInfo(run=owner, kind="weights", name="x", folder="old", time=datetime.now(UTC))
    new = old.model_copy(update={"folder": "new"})
    with closing(Database(tmp_path / "x")) as records:
        records.put_checkpoint(old)
        records.put_checkpoint(new)
        assert records.change_checkpoint(old, public=True) is None
        records.drop_checkpoint(old)
        assert records.checkpoint("a", "weights", "x") == new
        assert records.change_checkpoint(new, public=True).public
        records.drop_checkpoint(new)
        assert records.change_checkpoint(new, public=True) is None


def test_a_failed_change_leaves_the_record_and_the_file_usable(tmp_path, monkeypatch):
    owner = run("a", datetime.now(UTC))
    info = CheckpointInfo(run=owner, kind="weights", name="x", folder="f", time=datetime.now(UTC))
    with closing(Database(tmp_path / "x")) as records:
        records.put_checkpoint(info)
        with monkeypatch.context() as patch:
            patch.setattr(records, "put_checkpoint", lambda changed: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                records.change_checkpoint(info, public=True)
        assert records.checkpoint("a", "weights", "x") == info
        assert records.change_checkpoint(info, public=True).public
