"""Sample from a model: stop sequences, seeds, many samples at once, and the logprobs of texts.

Runs on the embedded service, whose tiny model has random weights, or on TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio
import math

from tinkex_py import AsyncServiceClient, ModelInput, SamplingParams

PROMPTS = ["The capital of France is", "Cows eat", "Two and two is"]


async def one_prompt(sampler, tokenizer):
    prompt = ModelInput.from_text(PROMPTS[0], tokenizer)
    params = SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9, seed=1)
    response = await sampler.sample(prompt, num_samples=2, sampling_params=params, topk_sample_logprobs=3)
    for number, sequence in enumerate(response.sequences):
        total = sum(sequence.logprobs)
        print(f"sample {number}: {tokenizer.decode(sequence.tokens)!r}  {sequence.stop_reason}  logprob {total:.3f}")
    again = await sampler.sample(prompt, num_samples=2, sampling_params=params)
    repeated = [sequence.tokens for sequence in again.sequences] == [one.tokens for one in response.sequences]
    print(f"the same seed gives the same samples: {repeated}")


async def many_prompts(sampler, tokenizer):
    """Samples all prompts at once. The client limits requests in flight and resubmits those that are refused."""
    params = SamplingParams(max_tokens=6, temperature=0.0, stop=["\n"])
    prompts = [ModelInput.from_text(text, tokenizer) for text in PROMPTS]
    responses = await asyncio.gather(*(sampler.sample(prompt, sampling_params=params) for prompt in prompts))
    for text, response in zip(PROMPTS, responses, strict=True):
        print(f"{text!r} -> {tokenizer.decode(response.sequences[0].tokens)!r}")


async def score(sampler, tokenizer):
    """Computes the perplexity of a text, and compares two endings."""
    tokens = list(tokenizer.encode(PROMPTS[0] + " Paris"))
    logprobs = (await sampler.compute_logprobs(ModelInput.from_ints(tokens)))[1:]  # the first token has none
    print(f"perplexity {math.exp(-sum(logprobs) / len(logprobs)):.2f} over {len(logprobs)} tokens")

    # Logprobs of given tokens at a position of the prompt: row i is scored at position i + 1, -1 is ignored.
    candidates = [tokenizer.encode(text)[-1] for text in (" Paris", " Rome")]
    rows = [[-1, -1] for _ in tokens[1:]]
    rows[-1] = candidates
    response = await sampler.sample(
        ModelInput.from_ints(tokens), sampling_params=SamplingParams(max_tokens=1), target_prompt_logprobs=rows
    )
    paris, rome = response.target_prompt_logprobs.tolist()[-1]
    print(f"as the last token: Paris {paris:.3f}, Rome {rome:.3f}")


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=8)
        tokenizer = await training.get_tokenizer()
        async with await service.create_sampling_client(base_model=model) as sampler:
            await one_prompt(sampler, tokenizer)
            await many_prompts(sampler, tokenizer)
            await score(sampler, tokenizer)


asyncio.run(main())
