"""The real model: its tokenizer's chat template, and an adapter of it in peft. It is loaded once."""

import contextlib
import copy
import io
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from tests.integrations.chat_tokenizers import chatml_by_hand, learnt_text, whole
from tinkex_py import AdamParams, LoraConfig
from tinkex_py.integrations.huggingface import chat_datum, export_adapter
from tinkex_py.local import LocalOptions
from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.data import EncodedDatum, EnginePass, SampleRequest
from tinkex_py.local.engine import Engine
from tinkex_py.local.models import load_model
from tinkex_py.local.records import CheckpointInfo, TrainingRunInfo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Which matters to those who merge the adapter into the model.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "Is it wet?"},
    {"role": "assistant", "content": "Yes, é 🌧"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with contextlib.redirect_stderr(io.StringIO()) as shown, contextlib.redirect_stdout(shown):
        loaded = load_model("smollm2", "cpu", tmp_path_factory.mktemp("smollm2"))
    assert shown.getvalue() == ""
    return loaded


def test_the_capital_of_france(model, tmp_path: Path):
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        engine = Engine(model, store, LocalOptions(), threading.Event())
        prompt = np.array(model.tokenizer.encode("The capital of France is"))
        sampled = engine.sample(None, SampleRequest(prompt, max_tokens=3, temperature=0.0))
    assert model.tokenizer.decode(sampled.sequences[0].tokens.tolist()).startswith(" Paris")


@pytest.mark.parametrize("turns", ["all", "last"])
def test_the_tokenizer(model, turns):
    inner = model.tokenizer.inner
    for tokenizer in (inner, model.tokenizer):  # the second is what the embedded service gives
        datum = chat_datum(tokenizer, CONVERSATION, turns=turns)
        tokens, mask = chatml_by_hand(inner, CONVERSATION, turns)
        assert whole(inner, datum) == tokens
        assert datum.loss_fn_inputs["weights"].tolist() == mask[1:]
    # Its template puts a system message of its own where there is none.
    datum = chat_datum(inner, CONVERSATION[1:], turns=turns)
    assert "named SmolLM" in inner.decode(whole(inner, datum))
    expected = ["Hello there<|im_end|>", "Yes, é 🌧<|im_end|>"]
    assert learnt_text(inner, datum) == (expected if turns == "all" else expected[1:])


def test_peft_gives_the_logprobs_of_the_engine(model, tmp_path: Path):
    """SmolLM2 ties its output layer to its embeddings, and the adapter is on it too."""
    base = copy.deepcopy(model.network)
    datum = chat_datum(model.tokenizer, CONVERSATION)
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    given = [
        EncodedDatum(
            tokens=torch.tensor(datum.model_input.to_ints()).numpy(), inputs={"target_tokens": targets.numpy()}
        )
    ]
    store = CheckpointStore(tmp_path / "state")
    try:
        engine = Engine(model, store, LocalOptions(), threading.Event())
        kinds = {"train_unembed": True, "train_mlp": True, "train_attn": True}
        run = TrainingRunInfo(run_id="run", base_model="smollm2", rank=4, created=datetime.now(UTC), **kinds)
        engine.create_model(run, LoraConfig(rank=4), 1)
        engine.run_pass("run", EnginePass(lambda: given, "cross_entropy", {}, False, False))
        engine.optim_step("run", AdamParams(learning_rate=1e-3))
        (expected,) = engine.run_pass("run", EnginePass(lambda: given, "cross_entropy", {}, True, False)).logprobs
        info = CheckpointInfo(run=run, kind="weights", name="one", folder="", time=datetime.now(UTC))
        checkpoint = store.file(engine.save("run", info, overwrite=False), "")
        adapter = export_adapter(checkpoint, tmp_path / "adapter", network=base)
    finally:
        store.close()
    tuned = peft.PeftModel.from_pretrained(base, str(adapter)).eval()

    def logprobs():
        with torch.no_grad():
            logits = tuned(torch.tensor([datum.model_input.to_ints()])).logits[0]
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    torch.testing.assert_close(logprobs(), torch.from_numpy(expected), atol=1e-4, rtol=0)
    with tuned.disable_adapter():
        assert (logprobs() - torch.from_numpy(expected)).abs().max() > 0.1
