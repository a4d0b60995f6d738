"""A small policy-gradient run with a verifiable reward: the share of letters in a sample.

Every step samples answers with the current weights, computes each reward relative to its group, and trains with
importance sampling and a KL penalty to the initial model. Runs on the embedded service, or on TINKER_BASE_URL with
TINKER_API_KEY.
"""

import asyncio
import statistics
import time
from functools import partial

from tinkex_py import AsyncServiceClient, Pipeline, RegularizerSpec, SamplingParams
from tinkex_py.base_losses import ImportanceSampling, group_advantages
from tinkex_py.data import datum_from_sample, sample_groups, with_reference
from tinkex_py.regularizers import SampledKL
from tinkex_py.runs import read_steps, train

PROMPTS = ["Write a word: ", "Say something: "]
GROUP = 32  # answers to each prompt in a step


def reward(text):
    """1.0 if every character is a letter from a to z, 0.0 if none is."""
    return sum(character.isascii() and character.isalpha() for character in text) / max(1, len(text))


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        initial = await service.create_lora_training_client(model, rank=1, seed=0)  # a new adapter changes no output
        tokenizer = await initial.get_tokenizer()
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]

        async def answers(run):
            params = SamplingParams(max_tokens=8, seed=run.seed())
            groups = await sample_groups(run.sampler, prompts, GROUP, sampling_params=params)
            samples = [(prompt, sample) for prompt, group in zip(prompts, groups, strict=True) for sample in group]
            rewards = [reward(tokenizer.decode(sample.tokens)) for _, sample in samples]
            run.metrics["reward"] = statistics.fmean(rewards)
            advantages = group_advantages(rewards, GROUP)
            data = [datum_from_sample(*sample, own) for sample, own in zip(samples, advantages, strict=True)]
            return await with_reference(initial, data)

        make_model = partial(service.create_lora_training_client, model, rank=16, seed=0)
        policy = ImportanceSampling(mask="weights", reduction="token-mean")
        kl = SampledKL(reference_field="reference_logprobs", estimator="k3+", mask="weights", reduction="token-mean")
        loss = Pipeline(policy, [RegularizerSpec(fn=kl, weight=0.01, name="kl")])
        folder = f"runs/rl-{time.strftime('%Y%m%d-%H%M%S')}"
        run = await train(service, make_model, answers, loss, folder=folder, optimizer=1e-2, settings={"steps": 15})
        for step in read_steps(run.folder):
            kl_value = step.losses[0].regularizers["kl"].value
            print(f"step {step.step}  reward {step.rollout['reward']:.3f}  KL {kl_value:.3f}")


asyncio.run(main())
