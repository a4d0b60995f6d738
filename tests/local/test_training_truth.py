"""Training through the protocol is training: the same steps in plain torch and peft give the same losses."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.asyncio

TEXTS = [
    "the sea is blue and wide",
    "tea is hot",
    "a bird sings at dawn in the old tree",
    "snow falls",
    "the mill stands by the river",
    "bread and salt",
]
STEPS = 20
LEARNING_RATE = 5e-3
RANK = 8


def token_lists() -> list[list[int]]:
    return [[256, *text.encode(), 257] for text in TEXTS]


def plain_losses(start: dict[str, torch.Tensor], folder) -> list[float]:
    """The reference: peft's own model, one sequence at a time, torch's own loss and optimizer."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from tinkex_py.local.models import load_model

    base = load_model("tiny", "cpu", folder).network
    config = LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
        task_type="CAUSAL_LM",
    )
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    trainable = {
        name.replace(".default.", "."): value for name, value in model.named_parameters() if value.requires_grad
    }
    assert trainable.keys() == start.keys()
    with torch.no_grad():
        for name, value in trainable.items():
            value.copy_(start[name])
    model.eval()
    adamw = torch.optim.AdamW(trainable.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for ids in token_lists():
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            loss.backward()
            total += loss.item()
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    return losses


async def test_twenty_steps_lower_the_loss_and_equal_plain_torch(client, kit, tmp_path):
    from tinkex_py.local.data import EncodedDatum

    model_id = await client.model(rank=RANK, seed=7)
    await client.done("save_weights", {"model_id": model_id, "seq_id": 1, "path": "start"})
    store = client.service.core.store
    saved = store.find(f"tinker://{model_id}/weights/start")
    start = load_file(store.file(saved, "adapter_model.safetensors"))
    data = [EncodedDatum(np.array(ids[:-1]), {"target_tokens": np.array(ids[1:])}) for ids in token_lists()]
    losses = []
    for step in range(STEPS):
        output = await client.pass_result(kit.message(model_id, 2 * step + 2, data))
        losses.append(output.metrics["loss:sum"])
        adam = {"learning_rate": LEARNING_RATE}
        await client.done("optim_step", {"model_id": model_id, "seq_id": 2 * step + 3, "adam_params": adam})
    assert losses[-1] <= 0.8 * losses[0]
    np.testing.assert_allclose(losses, plain_losses(start, tmp_path), rtol=1e-4)
