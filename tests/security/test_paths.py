"""Names, paths, files and archives that try to lead out of their folder."""

import contextlib
import io
import shutil
import tarfile
import zipfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from tinkex_py.client.archive import extract
from tinkex_py.errors import InvalidData, InvalidResponse
from tinkex_py.local import LocalOptions
from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.records import CheckpointInfo, TrainingRunInfo
from tinkex_py.types.checkpoint_path import CheckpointPath, url_segment

# Every way out that a name could take, look-alikes of dots and slashes among them.
WAYS_OUT = [
    *("..", ".", "../x", "a/../../x", "/etc/passwd", "//x", "~", "~root", "a/b", "./x", "x/", "x/.."),
    *("..\\x", "C:\\x", "C:x", "\\\\host\\share", "x\0y", "x\0/../y", "\0", "x\ny", "x\ty", "\u202ex", "x\u200b"),
    *("\u2024\u2024", "\uff0e\uff0e", "\uff0e\uff0e\uff0fx", "\u2025/x", "\u2215x", "\u2044x", "\uff0fx", "\u29f8x"),
    *("%2e%2e%2fx", "..%2fx", "%2e%2e", "%00", "..;/x", ".hidden", "-flag", "", " ", "x ", "x" * 129, "\ud800", "é"),
    *("CON", "x:y", "x*", "x?", "$(x)", "`x`", "x|y"),
]


def everything_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def run_of(run_id: str) -> TrainingRunInfo:
    kinds = {"train_unembed": True, "train_mlp": True, "train_attn": True}
    return TrainingRunInfo(run_id=run_id, base_model="tiny", rank=4, created=datetime.now(UTC), **kinds)


def checkpoint_of(run_id: str, name: str, kind: str = "weights") -> CheckpointInfo:
    return CheckpointInfo(run=run_of(run_id), kind=kind, name=name, folder="", time=datetime.now(UTC))


@pytest.fixture
def store(tmp_path):
    (tmp_path / "state").mkdir()
    with closing(CheckpointStore(tmp_path / "state")) as made:
        yield made


def test_names_of_runs_and_checkpoints_stay_in_their_folder(store, tmp_path):
    before = everything_below(tmp_path)
    refused = [("run", name) for name in WAYS_OUT if name != "CON"]
    refused += [(name, "x") for name in WAYS_OUT if name not in ("CON", "-flag")]
    for run_id, name in refused:
        with pytest.raises(InvalidData):
            store.write(checkpoint_of(run_id, name), {}, {"x.txt": "content"}, overwrite=True)
        with pytest.raises(InvalidData):
            store.copy(checkpoint_of("run", "x"), checkpoint_of(run_id, name))
        with pytest.raises(InvalidData):
            store.find(f"tinker://{run_id}/weights/{name}")
    assert everything_below(tmp_path) == before


def test_any_name_is_refused_or_stays_in_its_folder(store, tmp_path):
    @settings(max_examples=100)
    @given(st.text(max_size=12) | st.text("./\\~:%\0\u2024\uff0e\uff0fab", max_size=12))
    def check(name):
        try:
            info = store.write(checkpoint_of("run", name), {}, {"x.txt": ""}, overwrite=True)
        except InvalidData:
            return
        folder = tmp_path / "state" / "runs" / "run" / "weights"
        assert store.file(info, "x.txt").resolve().is_relative_to(folder)
        assert {entry.name for entry in tmp_path.iterdir()} == {"state"}

    check()


def test_addresses_of_checkpoints_on_the_client_have_plain_parts():
    """The client puts the parts into a URL: none may become another path there."""
    for name in WAYS_OUT:
        try:
            path = CheckpointPath("run", "weights", name)
        except InvalidData:
            continue
        segment = url_segment(path.name)
        assert "/" not in segment
        assert segment not in ("", ".", "..")
        assert segment.isascii()


@pytest.mark.asyncio
@pytest.mark.parametrize("place", ["/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "tinker://../weights/x"])
async def test_paths_of_models_are_never_files(client, place):
    """Neither base models nor weights can be named by a place on the service's disk."""
    await client.session()
    body = {"session_id": client.session_id, "model_seq_id": 0, "base_model": place}
    assert "is not served here" in (await client.done("create_model", body))["error"]
    loaded = {"session_id": client.session_id, "model_seq_id": 1, "path": place}
    assert (await client.done("load_weights", loaded))["category"] == "user"
    sampler = {"session_id": client.session_id, "sampling_session_seq_id": 0, "model_path": place}
    assert (await client.post("create_sampling_session", sampler)).status_code == 404
    assert (await client.post("weights_info", {"tinker_path": place})).status_code == 404
    copied = {"source_path": place, "session_id": client.session_id, "model_seq_id": 2}
    assert (await client.post("copy_weights", copied)).status_code == 404


@pytest.mark.asyncio
async def test_urls_cannot_lead_out_of_a_checkpoint(run_service, tmp_path):
    (tmp_path / "secret").write_text("planted")
    async with run_service(LocalOptions(state_dir=tmp_path / "state")) as client:
        model_id = await client.model()
        await client.done("save_weights_external", {"model_id": model_id, "seq_id": 1, "path": "one"})
        listed = f"/api/v1/training_runs/{model_id}/checkpoints/external_weights/one/external_weights_urls"
        urls = (await client.http.get(listed)).json()["urls"]
        sign = client.service.core.links.sign
        # A link beside the files is in no listing, so its name opens nothing either.
        (folder,) = (tmp_path / "state").glob("runs/*/external_weights/one.*")
        (folder / "link").symlink_to(tmp_path / "secret")
        for name in ("..%2f..%2fstate.sqlite3", "%2fetc%2fpasswd", "..", "adapter_config.json%00", "link", "nothing"):
            plain = name.replace("%2f", "/").replace("%00", "\0")
            query, _ = sign(f"/api/v1/downloads/{model_id}/external_weights/one/{plain}")
            where = f"/api/v1/downloads/{model_id}/external_weights/one/{name}?{query}"
            assert (await client.http.get(where)).status_code in (403, 404), name
        assert (await client.http.get(urls["adapter_config.json"])).status_code == 200


@pytest.mark.asyncio
async def test_links_that_lie_in_the_state_folder_are_not_followed(run_service, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "adapter_model.safetensors").write_bytes(b"planted")
    async with run_service(LocalOptions(state_dir=tmp_path / "state")) as client:
        model_id = await client.model()
        for number, name in enumerate(("file", "folder", "elsewhere"), 1):
            await client.done("save_weights_external", {"model_id": model_id, "seq_id": number, "path": name})
        store: CheckpointStore = client.service.core.store
        infos = {info.name: info for info in store.records.checkpoints(model_id)[0]}
        linked = store.file(infos["file"], "adapter_model.safetensors")
        linked.unlink()
        linked.symlink_to(secret / "adapter_model.safetensors")
        folder = store.file(infos["folder"], "")
        shutil.rmtree(folder)
        folder.symlink_to(secret)
        store.records.put_checkpoint(infos["elsewhere"].model_copy(update={"folder": "../../../../secret"}))

        for name in infos:
            where = f"/api/v1/training_runs/{model_id}/checkpoints/external_weights/{name}"
            told = await client.http.get(f"{where}/archive")
            fetched = await client.http.get(told.headers["location"])
            assert b"planted" not in fetched.content
            single = await client.http.get(f"{where}/external_weights_urls")
            assert "adapter_model.safetensors" not in single.json().get("urls", {})
            number = 10 + list(infos).index(name)
            copied = {"source_path": infos[name].path, "session_id": client.session_id, "model_seq_id": number}
            answer = await client.post("copy_weights", copied)
            assert answer.status_code == (200 if name == "file" else 404)
            await client.http.delete(where)
        copies = [path for path in (tmp_path / "state").rglob("*") if path.is_file() and not path.is_symlink()]
        assert all(b"planted" not in path.read_bytes() for path in copies)
    assert (secret / "adapter_model.safetensors").read_bytes() == b"planted"


# Archives on the client


def tar_with(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("x")
        entry.pax_headers = {"path": name}
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"evil"))
    return buffer.getvalue()


LEAVE_THE_FOLDER = [
    *("..", "../evil", "a/../../evil", "/evil", "//evil", "..\\evil", "C:evil", "evil\0", "a\nb"),
    *(
        "\uff0e\uff0e/evil",
        "\uff0e\uff0e\uff0fevil",
        "\u2025/evil",
        "\uff0fevil",
        "a\uff0f\uff0e\uff0e\uff0f..\uff0fevil",
    ),
    *("\uff3cevil", "\u2024\u2024/evil", "C\uff1aevil", "\u202eevil", "."),
]


@pytest.mark.parametrize("name", LEAVE_THE_FOLDER)
def test_members_of_archives_stay_in_the_folder(tmp_path, name):
    (tmp_path / "archive").write_bytes(tar_with(name))
    with pytest.raises(InvalidResponse, match="no file was kept"):
        extract(tmp_path / "archive", tmp_path / "files", lambda: None)
    assert everything_below(tmp_path) == {"archive"}


def test_a_zip_is_not_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive", "w") as zipped:
        zipped.writestr("../evil", "evil")
        zipped.writestr("fine", "fine")
    with pytest.raises(InvalidResponse, match="damaged"):
        extract(tmp_path / "archive", tmp_path / "files", lambda: None)
    assert everything_below(tmp_path) == {"archive"}


def test_a_link_is_not_written_through(tmp_path):
    """A link first, then a file below it: the second of the two ways out that archives are known for."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        entry = tarfile.TarInfo("link/evil")
        tar.addfile(entry, io.BytesIO())
    (tmp_path / "archive").write_bytes(buffer.getvalue())
    with pytest.raises(InvalidResponse, match="a link or device"):
        extract(tmp_path / "archive", tmp_path / "files", lambda: None)
    assert everything_below(tmp_path) == {"archive"}


@settings(max_examples=100)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    | st.text("./\\:\uff0e\uff0fa", min_size=1, max_size=8)
    | st.sampled_from(["../evil", "a/../../evil", "\uff0e\uff0e/evil"])
)
def test_any_member_is_refused_or_stays_in_the_folder(tmp_path_factory, name):
    outer = tmp_path_factory.mktemp("outer")
    (outer / "archive").write_bytes(tar_with(name))
    with contextlib.suppress(InvalidResponse):
        extract(outer / "archive", outer / "files", lambda: None)
    assert {entry.name for entry in outer.iterdir()} <= {"archive", "files"}
