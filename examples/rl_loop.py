"""A small policy-gradient loop with a verifiable reward: the share of letters in a sample.

Every round samples answers with the current weights, computes each reward relative to its group, and trains with
importance sampling and a KL penalty to the initial model. Runs on the embedded service, or on TINKER_BASE_URL with
TINKER_API_KEY.
"""

import asyncio
import statistics

from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, RegularizerSpec, SamplingParams
from tinkex_py.base_losses import ImportanceSampling
from tinkex_py.regularizers import SampledKL

ROUNDS = 15
GROUP = 32  # answers to each prompt in a round
PROMPTS = ["Write a word: ", "Say something: "]
LENGTH = 8


def reward(text):
    """1.0 if every character is a letter from a to z, 0.0 if none is."""
    return sum(character.isascii() and character.isalpha() for character in text) / max(1, len(text))


def make_datum(prompt, sequence, advantage):
    before = len(prompt) - 1
    tokens = prompt + list(sequence.tokens)
    count = len(sequence.tokens)
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "weights": [0.0] * before + [1.0] * count,
            "logprobs": [0.0] * before + list(sequence.logprobs),
            "advantages": [0.0] * before + [advantage] * count,
        },
    )


async def draw(training, tokenizer, seed):
    """Returns the datums of one round with their advantages, and the mean reward."""
    params = SamplingParams(max_tokens=LENGTH, temperature=1.0, seed=seed)
    data, rewards = [], []
    async with await training.save_weights_and_get_sampling_client() as sampler:
        prompts = [list(tokenizer.encode(prompt)) for prompt in PROMPTS]
        responses = await asyncio.gather(
            *(sampler.sample(ModelInput.from_ints(p), num_samples=GROUP, sampling_params=params) for p in prompts)
        )
    for prompt, response in zip(prompts, responses, strict=True):
        group = [reward(tokenizer.decode(sequence.tokens)) for sequence in response.sequences]
        mean, spread = statistics.fmean(group), statistics.pstdev(group) or 1.0
        rewards += group
        data += [make_datum(prompt, s, (r - mean) / spread) for s, r in zip(response.sequences, group, strict=True)]
    return data, statistics.fmean(rewards)


async def with_reference(initial, data):
    """Returns the datums with the logprobs of the model before the training."""
    outputs = (await initial.forward(data)).loss_fn_outputs
    return [
        Datum(
            model_input=datum.model_input,
            loss_fn_inputs={**datum.loss_fn_inputs, "reference_logprobs": output["logprobs"]},
        )
        for datum, output in zip(data, outputs, strict=True)
    ]


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=16, seed=0)
        initial = await service.create_lora_training_client(model, rank=1, seed=0)  # a new adapter changes no output
        tokenizer = await training.get_tokenizer()
        policy = ImportanceSampling(mask="weights", reduction="token-mean")
        kl = SampledKL(reference_field="reference_logprobs", estimator="k3+", mask="weights", reduction="token-mean")
        regularizers = [RegularizerSpec(fn=kl, weight=0.01, name="kl")]
        for round_number in range(ROUNDS):
            data, mean_reward = await draw(training, tokenizer, seed=round_number)
            data = await with_reference(initial, data)
            output, _ = await asyncio.gather(
                training.forward_backward_custom(data, policy, regularizers=regularizers),
                training.optim_step(AdamParams(learning_rate=1e-2)),
            )
            print(f"round {round_number}  reward {mean_reward:.3f}  KL {output.regularizers['kl'].value:.3f}")


asyncio.run(main())
