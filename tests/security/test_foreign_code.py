"""Files, archives and responses never run code: no pickles, no code from a model folder."""

import ast
import contextlib
import importlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

import tinkex_py
from tinkex_py.client import service_models
from tinkex_py.errors import ConfigError, InvalidData, PipelineError
from tinkex_py.local.checkpoints import STATE_FILE
from tinkex_py.local.models import load_model, quiet_loading
from tinkex_py.losses.recording import TENSORS_NAME, read_record

PACKAGE = Path(tinkex_py.__file__).parent
OPENS_PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas", "jsonpickle"}
# Between a program and the workers that it started, on a socket that nobody else can open.
CROSSES_TO_WORKERS = PACKAGE / "processes" / "crossing.py"


class Planted:
    """Makes the folder `run` when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture
def planted(tmp_path):
    """Two pickles that leave a mark when they are opened; checked at the end."""
    mark = tmp_path / "it was run"
    torch.save(Planted(mark), tmp_path / "planted.bin")
    made = (pickle.dumps(Planted(mark)), (tmp_path / "planted.bin").read_bytes())
    yield made
    assert not mark.exists()
    pickle.loads(made[0])
    assert mark.exists(), "the trap itself does not work"


def calls_of(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_package_opens_no_pickles_and_runs_no_text():
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if file != CROSSES_TO_WORKERS:
                assert not {name.partition(".")[0] for name in names} & OPENS_PICKLES, file
        for call in calls_of(tree):
            called = ast.unparse(call.func)
            assert called not in ("eval", "exec", "compile", "yaml.load", "np.load", "numpy.load"), file
            if called in ("torch.load", "torch.jit.load", "load_state_dict_from_url"):
                assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
            assert all(word.arg != "allow_pickle" for word in call.keywords), file
            assert all(
                word.arg != "trust_remote_code" or ast.unparse(word.value) == "False" for word in call.keywords
            ), file


def test_a_pickle_in_the_place_of_a_checkpoint_is_refused(bench, planted):
    model_id = bench.create("a")
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        for number, content in enumerate(planted):
            saved = bench.checkpoint(model_id, f"x{number}", overwrite=True)
            bench.store.file(saved, name).write_bytes(content)
            with pytest.raises(InvalidData, match=f"{name} is damaged"):
                bench.engine.create_from_checkpoint(bench.run("b"), saved, with_optimizer=True)
            assert bench.engine.run_info("b") is None


def test_a_pickle_in_the_place_of_the_state_file_is_refused(bench_with, tmp_path, planted):
    (tmp_path / STATE_FILE).write_bytes(planted[0])
    with pytest.raises(ConfigError, match="is not a state file"):
        bench_with()


def test_a_pickle_in_the_place_of_a_recorded_step_is_refused(tmp_path, planted):
    for content in planted:
        (tmp_path / TENSORS_NAME).write_bytes(content)
        (tmp_path / "record.json").write_bytes(content)
        with pytest.raises(PipelineError, match="cannot read the record"):
            read_record(tmp_path)


@pytest.fixture
def model_folder(tmp_path, bench):
    """The tiny model as a Hugging Face folder."""
    folder = tmp_path / "model"
    bench.model.network.config.save_pretrained(folder)
    library = importlib.import_module("tinkex_py.local.tokenizers")
    library.save_byte_tokenizer(folder)
    return folder


def test_a_model_folder_with_safetensors_is_loaded(bench, model_folder, tmp_path):
    with quiet_loading():
        bench.model.network.save_pretrained(model_folder)
    loaded = load_model(str(model_folder), "cpu", tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.network(tokens).logits, bench.model.network(tokens).logits)


def test_a_model_folder_with_pickled_weights_is_refused(model_folder, tmp_path, planted):
    for content in planted:
        (model_folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be loaded: .*must be safetensors files"):
            load_model(str(model_folder), "cpu", tmp_path)


def test_honest_pickled_weights_are_refused_too(bench, model_folder, tmp_path):
    torch.save(bench.model.network.state_dict(), model_folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="neither pickles nor code from the folder are run"):
        load_model(str(model_folder), "cpu", tmp_path)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_beside_a_model_is_not_run(bench, model_folder, tmp_path, kind):
    with quiet_loading():
        bench.model.network.save_pretrained(model_folder)
    mark = tmp_path / "it was run"
    (model_folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    name = "config.json" if kind == "model" else "tokenizer_config.json"
    config = json.loads((model_folder / name).read_text())
    if kind == "model":
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}}
    else:
        config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]}}
    (model_folder / name).write_text(json.dumps(config))
    with contextlib.suppress(ConfigError):
        load_model(str(model_folder), "cpu", tmp_path)
    assert not mark.exists()


def test_a_tokenizer_that_a_service_names_brings_no_code(model_folder, tmp_path, monkeypatch):
    """The name comes from a response: loading it must run nothing, and not prompt."""
    mark = tmp_path / "it was run"
    (model_folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    path = model_folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "Evil"}
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("input() was called"))
    with contextlib.suppress(tinkex_py.UnsupportedFeature):
        service_models.tokenizer_by_name(str(model_folder))
    assert not mark.exists()
