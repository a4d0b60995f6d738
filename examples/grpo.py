"""GRPO with two steps per round of samples, truncated importance sampling and a bound on the KL.

The reward is the share of letters in a sample. Every round samples a group of answers to each prompt, turns the rewards
into group advantages, and makes two optimizer steps on them. PPO limits the ratio to the trainer at the start of the
round, and truncated weights correct for the sampler. No weight of the KL has to be found: its multiplier rises while
the KL to the initial model is above the bound. Runs on the embedded service, or on TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio
import statistics

from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, Pipeline, RegularizerSpec, SamplingParams
from tinkex_py.base_losses import PPO, Corrected, TruncatedIS, group_advantages
from tinkex_py.regularizers import SampledKL

ROUNDS = 10
STEPS = 2  # optimizer steps on the samples of a round
GROUP = 16  # answers to each prompt in a round
PROMPTS = ["A: ", "Q: "]
LENGTH = 3
BOUND = 1.0  # nats per token

POLICY = PPO(mask="weights", reduction="token-mean")
KL = SampledKL(reference_field="reference_logprobs", mask="weights", reduction="token-mean")
PIPELINE = Pipeline(
    Corrected(policy=POLICY, corrections=[TruncatedIS(cap=2.0)], old_field="old_logprobs"),
    [RegularizerSpec(fn=KL, at_most=BOUND, name="kl")],
)


def reward(text):
    """1.0 if every character is a letter from a to z, 0.0 if none is."""
    return sum(character.isascii() and character.isalpha() for character in text) / max(1, len(text))


def make_datum(prompt, sequence, advantage):
    before, count = len(prompt) - 1, len(sequence.tokens)
    tokens = [*prompt, *sequence.tokens]
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
    prompts = [list(tokenizer.encode(prompt)) for prompt in PROMPTS]
    async with await training.save_weights_and_get_sampling_client() as sampler:
        responses = await asyncio.gather(
            *(sampler.sample(ModelInput.from_ints(p), num_samples=GROUP, sampling_params=params) for p in prompts)
        )
    answers = [(p, s) for p, response in zip(prompts, responses, strict=True) for s in response.sequences]
    rewards = [reward(tokenizer.decode(sequence.tokens)) for _, sequence in answers]
    advantages = group_advantages(rewards, groups=GROUP)
    data = [make_datum(prompt, sequence, own) for (prompt, sequence), own in zip(answers, advantages, strict=True)]
    return data, statistics.fmean(rewards)


async def with_logprobs(data, **models):
    """Returns the datums with the logprobs of some models, each in the field of its name."""
    passes = await asyncio.gather(*(model.forward(data) for model in models.values()))
    extended = []
    for datum, *outputs in zip(data, *(one.loss_fn_outputs for one in passes), strict=True):
        fields = {field: output["logprobs"] for field, output in zip(models, outputs, strict=True)}
        extended.append(Datum(model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, **fields}))
    return extended


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=16, seed=0)
        initial = await service.create_lora_training_client(model, rank=1, seed=0)  # a new adapter changes no output
        tokenizer = await training.get_tokenizer()
        print("round  reward  KL     multiplier  clipped  kept")
        for number in range(ROUNDS):
            data, mean_reward = await draw(training, tokenizer, seed=number)
            data = await with_logprobs(data, old_logprobs=training, reference_logprobs=initial)
            for _ in range(STEPS):
                output, _ = await asyncio.gather(
                    training.forward_backward_custom(data, PIPELINE),
                    training.optim_step(AdamParams(learning_rate=5e-3)),
                )
            kl, metrics = output.regularizers["kl"], output.base_loss.metrics
            print(
                f"{number + 1:5}  {mean_reward:.3f}   {kl.value:.3f}  {kl.weight:10.3f}  "
                f"{metrics['clip_fraction']:7.2f}  {metrics['ess_fraction']:.2f}"
            )


asyncio.run(main())
