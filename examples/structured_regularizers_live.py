"""The composed loss on real logprobs, for several steps.

Runs on TINKER_BASE_URL with TINKER_API_KEY, or on the embedded service:

    tinkex-py serve --model tiny --port 8000
    TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python structured_regularizers_live.py
"""

import asyncio
import os

from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, RegularizerSpec

STEPS = 5
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs."]


def nll(data, logprobs):
    return -logprobs.mean(), {}


def l1(data, logprobs):
    return logprobs.abs().mean(), {"largest": logprobs.abs().max()}


def l2(data, logprobs):
    return logprobs.pow(2).mean(), {}


def negative_entropy(data, logprobs):
    return (logprobs.exp() * logprobs).mean(), {}


REGULARIZERS = [
    RegularizerSpec(fn=l1, weight=0.01, name="l1_sparsity"),
    RegularizerSpec(fn=l2, weight=0.005, name="l2_weight_decay"),
    RegularizerSpec(fn=negative_entropy, weight=0.001, name="entropy"),
]


def make_datum(text, tokenizer):
    tokens = list(tokenizer.encode(text))
    return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})


def show(step, output):
    print(f"=== Step {step} ===")
    print(f"Total Loss: {round(output.loss_total, 6)}")
    print(f"Base Loss: {round(output.base_loss.value, 6)}")
    print(f"Regularizer Total: {round(output.regularizer_total, 6)}")
    if output.total_grad_norm is not None:
        print(f"Total Grad Norm: {round(output.total_grad_norm, 6)}")
    for name, reg in output.regularizers.items():
        print(f"  {name}: value {reg.value:.6f}, contribution {reg.contribution:.6f}, grad_norm {reg.grad_norm:.6f}")


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        print(f"Training {model} on {os.environ.get('TINKER_BASE_URL', 'the embedded service')}")
        training = await service.create_lora_training_client(model, rank=16)
        tokenizer = await training.get_tokenizer()
        data = [make_datum(text, tokenizer) for text in TEXTS]

        losses = []
        for step in range(1, STEPS + 1):
            output = await training.forward_backward_custom(data, nll, regularizers=REGULARIZERS, track_grad_norms=True)
            await training.optim_step(AdamParams(learning_rate=5e-3))
            show(step, output)
            losses.append(output.loss_total)

        print(f"\nLoss: {losses[0]:.4f} -> {losses[-1]:.4f}")


asyncio.run(main())
