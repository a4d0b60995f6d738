"""Checkpoints as peft adapters: peft reproduces the logprobs of the service, and files are never damaged."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tinkex_py import AdamParams, AsyncServiceClient, Datum, InvalidData, InvalidResponse, ModelInput, TinkexError
from tinkex_py.integrations.huggingface import adapters, download_adapter, export_adapter
from tinkex_py.local.models import load_model, quiet_loading
from tinkex_py.local.tokenizers import save_byte_tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

pytestmark = [
    # peft still reads the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Only relevant to merging the adapter into the model.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def datum(length: int, seed: int) -> Datum:
    ids = np.random.default_rng(seed).integers(0, 256, length + 1).tolist()
    return Datum(model_input=ModelInput.from_ints(ids[:-1]), loss_fn_inputs={"target_tokens": ids[1:]})


DATA = [datum(12, 0), datum(5, 1)]


def tiny_network(folder: Path):
    return load_model("tiny", "cpu", folder).network


def tied_model(folder: Path) -> str:
    """A model in files whose output layer is its embedding, as in SmolLM2."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=258, max_position_embeddings=64, tie_word_embeddings=True, **sizes)
    with quiet_loading():
        LlamaForCausalLM(config).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return str(folder)


def logprobs_of(network, data):
    """By transformers and peft alone."""
    rows = []
    for one in data:
        targets = torch.tensor(one.loss_fn_inputs["target_tokens"].tolist())
        with torch.no_grad():
            logits = network(torch.tensor([one.model_input.to_ints()])).logits[0]
        rows.append(torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("tied", "kinds"), [(False, {}), (False, {"train_unembed": False, "train_mlp": False}), (True, {})]
)
async def test_peft_gives_the_logprobs_of_the_service(tmp_path, tied, kinds):
    model = tied_model(tmp_path / "model") if tied else "tiny"
    with quiet_loading():
        network = AutoModelForCausalLM.from_pretrained(model) if tied else tiny_network(tmp_path)
    async with AsyncServiceClient.local(model=model) as service:
        training = await service.create_lora_training_client(model, rank=4, seed=1, **kinds)
        for _ in range(3):
            await training.forward_backward_custom(DATA, lambda data, logprobs: -logprobs.mean())
            await training.optim_step(AdamParams(learning_rate=2e-2))
        expected = torch.cat([out["logprobs"].to_torch() for out in (await training.forward(DATA)).loss_fn_outputs])
        saved = await training.save_state("trained")
        rest = service.create_rest_client()
        progress = []
        adapter = await download_adapter(
            rest, saved.path, tmp_path / "new" / "adapter", network=network, on_progress=progress.append
        )
        checkpoint = await rest.download_checkpoint(saved.path, tmp_path / "checkpoint")
        sampler = await training.save_weights_for_sampler("sampler")
        await download_adapter(rest, sampler.path, tmp_path / "sampler")
    assert adapter == tmp_path / "new" / "adapter"
    assert progress[-1].received_bytes == progress[-1].total_bytes
    assert sorted(file.name for file in adapter.iterdir()) == [CONFIG, WEIGHTS]
    assert sorted(file.name for file in adapter.parent.iterdir()) == ["adapter"]  # nothing hidden is left
    config = json.loads((adapter / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (Path(model).name, 4, 32)

    tuned = peft.PeftModel.from_pretrained(network, str(adapter)).eval()
    own = logprobs_of(tuned, DATA)
    torch.testing.assert_close(own, expected, atol=1e-4, rtol=0)
    with tuned.disable_adapter():
        assert (own - logprobs_of(tuned, DATA)).abs().max() > 0.1  # so the adapter is what makes them equal

    saved_weights = load_file(checkpoint / WEIGHTS)
    for made in (adapter, tmp_path / "sampler", export_adapter(checkpoint, tmp_path / "again")):
        weights = load_file(made / WEIGHTS)
        assert weights.keys() == saved_weights.keys()
        assert all(torch.equal(weights[key], saved_weights[key]) for key in weights)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a checkpoint of the embedded service, with random numbers."""
    folder = tmp_path_factory.mktemp("checkpoints") / "one"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.1.mlp.down_proj": (64, 128),
        "lm_head": (258, 64),
    }
    weights = {}
    for layer, (outputs, inputs) in shapes.items():
        weights[f"{PREFIX}{layer}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        weights[f"{PREFIX}{layer}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    save_file(weights, folder / WEIGHTS)
    save_file({"step": torch.zeros(1)}, folder / "optimizer.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 32, "base_model_name_or_path": "mine", "bias": "none"}
    (folder / CONFIG).write_text(json.dumps({**config, "target_modules": "all-linear"}))
    return folder


def changed(checkpoint, folder, *, weights=None, config=None):
    """A copy of the checkpoint with something changed."""
    folder.mkdir()
    given = load_file(checkpoint / WEIGHTS)
    save_file(given if weights is None else weights(given), folder / WEIGHTS)
    described = json.loads((checkpoint / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**described, **(config or {})}))
    return folder


def test_every_adapted_layer_is_named_so_that_peft_loads_all(checkpoint, tmp_path):
    """To peft "all-linear", which such a checkpoint contains, excludes the output layer."""
    adapter = export_adapter(checkpoint, tmp_path / "adapter", base_model="other")
    tuned = peft.PeftModel.from_pretrained(tiny_network(tmp_path), str(adapter))
    state = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    weights = load_file(checkpoint / WEIGHTS)
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    assert peft.PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path == "other"


def test_the_hosted_services_name_of_the_output_layer(checkpoint, tmp_path):
    source = changed(
        checkpoint,
        tmp_path / "hosted",
        weights=lambda given: {key.replace("lm_head", "model.unembed_tokens"): value for key, value in given.items()},
    )
    adapter = export_adapter(source, tmp_path / "adapter", network=tiny_network(tmp_path))
    assert f"{PREFIX}lm_head.lora_A.weight" in load_file(adapter / WEIGHTS)


def archive_of(folder: Path, archive: Path, *, mode="w", inside="", extra=()):
    with tarfile.open(archive, mode) as tar:
        for file in folder.iterdir():
            tar.add(file, arcname=f"{inside}{file.name}")
        for name in extra:
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
    return archive


@pytest.mark.parametrize("inside", ["", "deep/inside/"])
def test_an_archive_gives_the_same_adapter_as_a_folder(checkpoint, tmp_path, inside):
    archive = archive_of(checkpoint, tmp_path / "checkpoint.tar.gz", mode="w:gz", inside=inside)
    adapter = export_adapter(archive, tmp_path / "adapter")
    folder = export_adapter(checkpoint, tmp_path / "other")
    for name in (CONFIG, WEIGHTS):
        assert (adapter / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_names_that_lead_out_of_the_folder(checkpoint, tmp_path, name):
    archive = archive_of(checkpoint, tmp_path / "checkpoint.tar", extra=[name])
    with pytest.raises(InvalidResponse, match="no file was kept"):
        export_adapter(archive, tmp_path / "new" / "adapter")
    assert list((tmp_path / "new").iterdir()) == []
    assert not list(tmp_path.rglob("*evil*"))


def test_nothing_is_overwritten_without_overwrite(checkpoint, tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    export_adapter(checkpoint, target)  # an empty folder is accepted
    before = (target / CONFIG).read_bytes()
    with pytest.raises(InvalidData, match="is not empty: choose another one, or pass overwrite=True"):
        export_adapter(checkpoint, target, base_model="other")
    assert (target / CONFIG).read_bytes() == before
    export_adapter(checkpoint, target, base_model="other", overwrite=True)
    assert json.loads((target / CONFIG).read_text())["base_model_name_or_path"] == "other"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InvalidData, match="contains more than an adapter and is not replaced"):
        export_adapter(checkpoint, target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(InvalidData, match="is not a folder"):
            export_adapter(checkpoint, tmp_path / name, overwrite=True)


def test_a_failure_leaves_what_was_there(checkpoint, tmp_path, monkeypatch):
    target = export_adapter(checkpoint, tmp_path / "new" / "adapter")
    before = (target / CONFIG).read_bytes()

    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "write_adapter", full_disk)
    for folder in (target, target.with_name("other")):
        with pytest.raises(OSError, match="No space left"):
            export_adapter(checkpoint, folder, overwrite=True)
    assert [file.name for file in target.parent.iterdir()] == ["adapter"]
    assert (target / CONFIG).read_bytes() == before


def test_the_old_adapter_is_restored_if_the_new_one_cannot_be_moved(checkpoint, tmp_path, monkeypatch):
    target = export_adapter(checkpoint, tmp_path / "new" / "adapter")
    real = Path.rename

    def failing(self, to):
        if self.name == "adapter" and to == target:
            raise OSError(13, "Permission denied")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Permission denied"):
        export_adapter(checkpoint, target, base_model="other", overwrite=True)
    assert [file.name for file in target.parent.iterdir()] == ["adapter"]
    assert json.loads((target / CONFIG).read_text())["base_model_name_or_path"] == "mine"


def without(layer, half):
    return lambda given: {key: value for key, value in given.items() if key != f"{PREFIX}{layer}.lora_{half}.weight"}


def with_tensor(key, shape):
    return lambda given: {**given, key: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("weights", "config", "reason"),
    [
        (without("lm_head", "B"), {}, r"matrices of layer 'lm_head' do not match: \{'A': \(2, 64\)\}"),
        (with_tensor(f"{PREFIX}lm_head.lora_B.weight", (258, 3)), {}, "'lm_head' do not match"),
        (with_tensor(f"{PREFIX}m.experts.w1.lora_A.weight", (8, 2, 4)), {}, r"experts.* of shape \(8, 2, 4\)"),
        (with_tensor("model.embed_tokens.weight", (4, 4)), {}, "contains 'model.embed_tokens.weight'"),
        (lambda given: {}, {}, "is empty"),
        (None, {"r": 4}, "layer '.*' has rank 2, but adapter_config.json says 4"),
        (None, {"r": None}, "is invalid: r: Input should be a valid integer"),
        (None, {"lora_alpha": "a"}, "is invalid: lora_alpha: .*Input should be a valid integer"),
        (None, {"use_dora": True}, "sets use_dora=True; only plain LoRA can be exported"),
        (None, {"bias": "all"}, "sets bias='all'"),
        (None, {"unheard_of": [1]}, "sets unheard_of="),
        (None, {"peft_type": "IA3"}, "of type 'IA3'"),
    ],
)
def test_only_plain_lora_is_exported(checkpoint, tmp_path, weights, config, reason):
    source = changed(checkpoint, tmp_path / "source", weights=weights, config=config)
    with pytest.raises(InvalidData, match=reason):
        export_adapter(source, tmp_path / "adapter")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (CONFIG, b"{", "adapter_config.json of the checkpoint is invalid: Invalid JSON"),
        (CONFIG, b"[]", "adapter_config.json of the checkpoint is invalid: Input should be an object"),
        (WEIGHTS, b"\0", "adapter_model.safetensors of the checkpoint is damaged"),
        (WEIGHTS, None, "contains 0 LoRA adapters"),
    ],
)
def test_damaged_files(checkpoint, tmp_path, name, content, reason):
    source = changed(checkpoint, tmp_path / "source")
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    with pytest.raises(InvalidData, match=reason):
        export_adapter(source, tmp_path / "adapter")
    with pytest.raises(InvalidData, match="there is no checkpoint"):
        export_adapter(tmp_path / "nowhere", tmp_path / "adapter")


def test_another_base_model_raises(checkpoint, tmp_path):
    network = tiny_network(tmp_path)
    renamed = {key.replace("layers.1", "layers.9"): value for key, value in load_file(checkpoint / WEIGHTS).items()}
    source = changed(checkpoint, tmp_path / "source", weights=lambda given: renamed)
    with pytest.raises(InvalidData, match=r"the base model has no layer 'model.layers.9.mlp.down_proj'"):
        export_adapter(source, tmp_path / "adapter", network=network)
    network.lm_head = torch.nn.Linear(64, 300, bias=False)
    with pytest.raises(InvalidData, match=r"'lm_head' is \(300, 64\) in the base model, but \(258, 64\)"):
        export_adapter(checkpoint, tmp_path / "adapter", network=network)


@pytest.mark.asyncio
async def test_a_download_that_fails_leaves_nothing(tmp_path):
    target = tmp_path / "new" / "adapter"

    def stop(_progress):
        raise RuntimeError("enough")

    async with AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=2)
        saved = await training.save_state("first")
        rest = service.create_rest_client()
        with pytest.raises(RuntimeError, match="enough"):
            await download_adapter(rest, saved.path, target, on_progress=stop)
        assert list(target.parent.iterdir()) == []
        with pytest.raises(TinkexError, match="no-such"):
            await download_adapter(rest, saved.path.replace("first", "no-such"), target)
        target.mkdir()
        (target / "notes.txt").touch()
        with pytest.raises(InvalidData, match="is not empty"):
            await download_adapter(rest, saved.path, target)
    assert [file.name for file in target.parent.rglob("*")] == ["adapter", "notes.txt"]
