"""Fine-tune a model with a composed loss.

Runs on the embedded service, or on TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio

from tinkex_py import AdamParams, AsyncServiceClient, ModelInput, RegularizerSpec, SamplingParams, packed_field
from tinkex_py.data import text_datum

PAIRS = [
    ("What is the capital of France?", "Ahoy friend, it is Paris!"),
    ("What is the capital of Japan?", "Ahoy friend, it is Tokyo!"),
    ("What do cows eat?", "Ahoy friend, they eat grass!"),
]


def make_datum(tokenizer, prompt, answer):
    # Only the answer is learned: the weights of the prompt are 0.
    return text_datum(tokenizer, f" {answer}\n", prompt=f"Q: {prompt}\nA:", append_end=False)


def masked_nll(data, logprobs):
    mask = packed_field(data, "weights")
    return -(logprobs * mask).sum() / mask.sum()


def l2(data, logprobs):
    mask = packed_field(data, "weights")
    return (logprobs.pow(2) * mask).sum() / mask.sum()


def confidence(data, logprobs):
    """Mean of p log p over the answer tokens: lowest at p = 1/e, so it discourages overconfidence."""
    mask = packed_field(data, "weights")
    return (logprobs.exp() * logprobs * mask).sum() / mask.sum()


REGULARIZERS = [
    RegularizerSpec(fn=l2, weight=0.01, name="l2"),
    RegularizerSpec(fn=confidence, weight=0.001, name="confidence"),
]


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=16)
        tokenizer = await training.get_tokenizer()
        data = [make_datum(tokenizer, prompt, answer) for prompt, answer in PAIRS]

        for step in range(20):
            output = await training.forward_backward_custom(
                data, masked_nll, regularizers=REGULARIZERS, track_grad_norms=True
            )
            await training.optim_step(AdamParams(learning_rate=5e-3))
            terms = "  ".join(f"{name} {reg.contribution:+.4f}" for name, reg in output.regularizers.items())
            print(f"step {step}  loss {output.loss_total:.4f}  {terms}  gradient {output.total_grad_norm:.4f}")

        sampler = await training.save_weights_and_get_sampling_client()
        prompt = ModelInput.from_text("Q: What is the capital of France?\nA:", tokenizer)
        response = await sampler.sample(
            prompt, sampling_params=SamplingParams(max_tokens=32, temperature=0.0, stop=["\n"])
        )
        print(repr(tokenizer.decode(response.sequences[0].tokens)))


asyncio.run(main())
