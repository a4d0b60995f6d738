"""Checkpoints: whole or not at all, and exact."""

import gc
import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tinkex_py.errors import InvalidData
from tinkex_py.local.engine import read_tensors
from tinkex_py.local.records import expiry
from tinkex_py.types import AdamParams


def steps(bench, model_id: str, kit, count: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + count):
        losses.append(bench.passed(model_id, [kit.datum(9, step % 3)]).metrics["loss:sum"])
        bench.engine.optim_step(model_id, AdamParams(learning_rate=0.01))
    return losses


def test_a_restored_run_goes_on_exactly(bench, kit):
    model_id = bench.create("a")
    steps(bench, model_id, kit, 3)
    saved = bench.checkpoint(model_id, "three")
    expected = steps(bench, model_id, kit, 3, first=3)
    bench.engine.create_from_checkpoint(bench.run("b"), saved, with_optimizer=True)
    bench.engine.create_from_checkpoint(bench.run("c"), saved, with_optimizer=False)
    assert steps(bench, "b", kit, 3, first=3) == expected
    without = steps(bench, "c", kit, 3, first=3)
    assert without[0] == expected[0]
    assert without[1:] != expected[1:]


def test_load_into_only_as_the_first_request(bench, kit):
    bench.create("a")
    steps(bench, "a", kit, 2)
    saved = bench.checkpoint("a", "two")
    expected = steps(bench, "a", kit, 1)
    bench.create("b", seed=9)
    bench.engine.load_into("b", saved, with_optimizer=True)
    assert steps(bench, "b", kit, 1) == expected
    with pytest.raises(InvalidData, match="must be its first request"):
        bench.engine.load_into("b", saved, with_optimizer=True)


def test_the_folder_is_a_peft_adapter(bench, kit, tmp_path):
    """peft itself reads the files and gives the engine's logprobs."""
    from peft import PeftModel
    from safetensors.torch import save_file

    model_id = bench.create("a", rank=8)
    steps(bench, model_id, kit, 2)
    saved = bench.checkpoint(model_id, "x", "sampler_weights")
    folder = bench.store.file(saved, "adapter_config.json").parent
    datum = kit.datum(7, 5)
    expected = bench.passed(model_id, [datum], forward_only=True).logprobs[0]
    from tinkex_py.local.models import load_model

    fresh = load_model("tiny", "cpu", tmp_path / "other").network
    fresh.config.name_or_path = ""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 32)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        wrapped = PeftModel.from_pretrained(fresh, str(tmp_path))
    with torch.no_grad():
        table = wrapped(input_ids=torch.tensor(datum.tokens)[None]).logits[0].log_softmax(-1)
    targets = torch.tensor(datum.inputs["target_tokens"])
    np.testing.assert_allclose(table[torch.arange(7), targets].numpy(), expected, atol=2e-5)


def test_a_failed_write_leaves_the_old_checkpoint_whole(bench, kit, monkeypatch):
    model_id = bench.create("a")
    old = bench.checkpoint(model_id, "x")
    folder = bench.store.file(old, "").parent
    before = {file.name for file in folder.iterdir()}
    weights = load_file(bench.store.file(old, "adapter_model.safetensors"))
    steps(bench, model_id, kit, 1)
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        bench.store.write(old, {"bad.safetensors": {"a": shared, "b": shared}}, {}, overwrite=True)
    assert {file.name for file in folder.iterdir()} == before
    found = bench.store.find(old.path)
    assert found == old
    again = load_file(bench.store.file(found, "adapter_model.safetensors"))
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_a_half_written_folder_is_not_a_checkpoint_and_is_removed_at_the_next_start(bench, bench_with):
    """What a killed process leaves behind: a folder that is not in the state file."""
    model_id = bench.create("a")
    saved = bench.checkpoint(model_id, "x")
    folder = bench.store.file(saved, "").parent
    for half in (f".y.{'0' * 32}", f"y.{'1' * 32}"):
        (folder / half).mkdir()
        (folder / half / "adapter_model.safetensors").write_bytes(b"half")
    (folder / "of the user").mkdir()
    with pytest.raises(InvalidData, match="there is no checkpoint"):
        bench.store.find("tinker://a/weights/y")
    bench.close()
    again = bench_with()
    assert [info.name for info in again.store.records.checkpoints()[0]] == ["x"]
    assert {entry.name for entry in folder.iterdir()} == {saved.folder, "of the user"}


def test_overwriting_replaces_and_cleans_up(bench, kit):
    model_id = bench.create("a")
    old = bench.checkpoint(model_id, "x")
    steps(bench, model_id, kit, 1)
    with pytest.raises(InvalidData, match="exists already"):
        bench.checkpoint(model_id, "x")
    new = bench.checkpoint(model_id, "x", overwrite=True)
    folder = bench.store.file(new, "").parent
    assert [file.name for file in folder.iterdir()] == [new.folder]
    assert bench.store.find(old.path) == new


def test_kinds_expiry_and_deletion(bench):
    model_id = bench.create("a")
    training = bench.checkpoint(model_id, "x")
    sampler = bench.checkpoint(model_id, "x", "sampler_weights")
    with pytest.raises(InvalidData, match="is of kind 'sampler_weights'; needed here: weights"):
        bench.store.find(sampler.path, "weights")
    with pytest.raises(InvalidData, match="no optimizer state"):
        bench.engine.create_from_checkpoint(bench.run("b"), sampler, with_optimizer=True)
    listed = bench.store.records.checkpoints
    assert {info.path for info in listed("a")[0]} == {training.path, sampler.path}
    hour = expiry(3600)
    assert bench.store.set_expiry(training, hour).expires_at == hour
    assert len(listed()[0]) == 2
    bench.store.set_expiry(training, expiry(-1))
    assert [info.path for info in listed()[0]] == [sampler.path]
    with pytest.raises(InvalidData, match="there is no checkpoint"):
        bench.store.find(training.path)
    assert bench.store.file(training, "").exists()
    assert bench.store.delete_expired() is None
    assert not bench.store.file(training, "").exists()
    bench.store.delete(sampler)
    assert listed() == ([], 0)


def test_a_damaged_file_is_named(bench):
    model_id = bench.create("a")
    saved = bench.checkpoint(model_id, "x")
    bench.store.file(saved, "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InvalidData, match=r"adapter_model.safetensors is damaged"):
        bench.engine.create_from_checkpoint(bench.run("b"), saved, with_optimizer=False)
    assert bench.engine.run_info("b") is None


def test_files_that_are_read_again_and_again_cost_no_memory(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"layer{number}": torch.full((2, 300), float(number)) for number in range(100)}, file)
    read_tensors(file, "it")
    tracemalloc.start()
    try:
        read_tensors(file, "it")
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20):
            tensors = read_tensors(file, "it")
            assert float(tensors["layer7"].sum()) == 7 * 600
            del tensors
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20 * 100 * 10  # bytes: not ten for each tensor read
