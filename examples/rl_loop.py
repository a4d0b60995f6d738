"""A small policy-gradient loop with a verifiable reward: the share of letters in a sample.

Every round samples answers with the current weights, computes each reward relative to its group, and trains with
importance sampling and a KL penalty to the initial model. Runs on the embedded service, or on TINKER_BASE_URL with
TINKER_API_KEY.
"""

import asyncio
import statistics

from tinkex_py import AdamParams, AsyncServiceClient, RegularizerSpec, SamplingParams
from tinkex_py.base_losses import ImportanceSampling, group_advantages
from tinkex_py.data import datum_from_sample, sample_groups, with_reference
from tinkex_py.regularizers import SampledKL

PROMPTS = ["Write a word: ", "Say something: "]
GROUP = 32  # answers to each prompt in a round


def reward(text):
    """1.0 if every character is a letter from a to z, 0.0 if none is."""
    return sum(character.isascii() and character.isalpha() for character in text) / max(1, len(text))


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=16, seed=0)
        initial = await service.create_lora_training_client(model, rank=1, seed=0)  # a new adapter changes no output
        tokenizer = await training.get_tokenizer()
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        policy = ImportanceSampling(mask="weights", reduction="token-mean")
        kl = SampledKL(reference_field="reference_logprobs", estimator="k3+", mask="weights", reduction="token-mean")
        regularizers = [RegularizerSpec(fn=kl, weight=0.01, name="kl")]
        for number in range(15):
            async with await training.save_weights_and_get_sampling_client() as sampler:
                params = SamplingParams(max_tokens=8, seed=number)
                groups = await sample_groups(sampler, prompts, GROUP, sampling_params=params)
            samples = [(prompt, sample) for prompt, group in zip(prompts, groups, strict=True) for sample in group]
            rewards = [reward(tokenizer.decode(sample.tokens)) for _, sample in samples]
            advantages = group_advantages(rewards, GROUP)
            data = [datum_from_sample(*sample, own) for sample, own in zip(samples, advantages, strict=True)]
            data = await with_reference(initial, data)
            output, _ = await asyncio.gather(
                training.forward_backward_custom(data, policy, regularizers=regularizers),
                training.optim_step(AdamParams(learning_rate=1e-2)),
            )
            mean = statistics.fmean(rewards)
            print(f"round {number}  reward {mean:.3f}  KL {output.regularizers['kl'].value:.3f}")


asyncio.run(main())
