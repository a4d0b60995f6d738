"""Preference training (DPO) with a loss function that was written for the official SDK.

`dpo_loss` takes `(data, logprobs_list)`, one tensor per datum. `tinker.TrainingClient.forward_backward_custom` accepts
it directly (see official_sdk.py); this package accepts it with `per_datum`. Runs on the embedded service, or on
TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio

import torch
from torch.nn.functional import logsigmoid

from tinkex_py import AdamParams, AsyncServiceClient, RegularizerSpec, per_datum
from tinkex_py.data import text_datum, with_reference
from tinkex_py.regularizers import SampledKL

STEPS = 12
BETA = 0.1
PREFERENCES = [  # prompt, chosen, rejected
    ("Say hello.", "Hello, dear friend!", "Go away."),
    ("May I sit here?", "Yes, please do!", "No."),
    ("Is it raining?", "I fear it is, friend.", "Look outside."),
]


def dpo_loss(data, logprobs_list):
    """Pairs of datums, chosen before rejected. Rafailov et al., "Direct Preference Optimization" (2023), equation 7."""
    rewards = []
    for datum, logprobs in zip(data, logprobs_list, strict=True):
        mask = datum.loss_fn_inputs["weights"].to_torch()
        reference = datum.loss_fn_inputs["reference_logprobs"].to_torch()
        rewards.append(BETA * ((logprobs - reference) * mask).sum())
    margins = torch.stack(rewards[0::2]) - torch.stack(rewards[1::2])
    return -logsigmoid(margins).mean(), {"accuracy": (margins > 0).float().mean().item()}


def texts():
    return [(prompt, answer) for prompt, *answers in PREFERENCES for answer in answers]


def make_datum(tokenizer, prompt, answer):
    return text_datum(tokenizer, answer, prompt=f"{prompt}\n", append_end=False)


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=16, seed=0)
        tokenizer = await training.get_tokenizer()
        data = await with_reference(training, [make_datum(tokenizer, *text) for text in texts()])
        drift = SampledKL(reference_field="reference_logprobs", estimator="k2", mask="weights", reduction="token-mean")
        regularizers = [RegularizerSpec(fn=drift, weight=0.01, name="drift")]
        losses = []
        for step in range(STEPS):
            output = await training.forward_backward_custom(data, per_datum(dpo_loss), regularizers=regularizers)
            await training.optim_step(AdamParams(learning_rate=2e-3))
            losses.append(output.base_loss.value)
            accuracy, moved = output.base_loss.metrics["accuracy"], output.regularizers["drift"].value
            print(f"step {step}  DPO loss {losses[-1]:.4f}  accuracy {accuracy:.2f}  drift {moved:.4f}")
        print(f"DPO loss: {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    asyncio.run(main())
