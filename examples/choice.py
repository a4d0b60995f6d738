"""Teach a model to choose between 21 answers: the marks from 0 to 20, as the letters from "a" to "u".

Every prompt has a distribution over the 21 tokens at its last position, here a narrow bell around the right mark.
`Choice` compares it with the probabilities of the 21 tokens alone, whatever the rest of the vocabulary. Runs on the
embedded service, or on TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio
import math

from tinkex_py import AdamParams, AsyncServiceClient, ModelInput
from tinkex_py.base_losses import Choice
from tinkex_py.data import candidates_datum

STEPS = 14
LETTERS = "abcdefghijklmnopqrstu"
MARKS = {
    "rain": 3,
    "tea": 15,
    "snow": 9,
    "fog": 1,
    "wind": 6,
    "sun": 20,
    "bread": 17,
    "salt": 11,
    "mud": 0,
    "bells": 13,
}


def bell(mark):
    """Returns the probabilities of the marks: most for the right one, some for its neighbours."""
    weights = [math.exp(-((other - mark) ** 2)) for other in range(len(LETTERS))]
    return [weight / sum(weights) for weight in weights]


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=16, seed=0)
        tokenizer = await training.get_tokenizer()
        candidates = [tokenizer.encode(letter)[-1] for letter in LETTERS]
        data = [
            candidates_datum(ModelInput.from_text(f"How good is {thing}? ", tokenizer), candidates, bell(mark))
            for thing, mark in MARKS.items()
        ]
        seen = []
        for step in range(STEPS):
            output = await training.forward_backward_custom(data, Choice(score="kl", reduction="mean"))
            await training.optim_step(AdamParams(learning_rate=5e-3))
            seen.append(output.base_loss.metrics)
            accuracy, mass = seen[-1]["accuracy"], seen[-1]["mass"]
            print(f"step {step}  KL {output.loss_total:.4f}  accuracy {accuracy:.2f}  mass of the letters {mass:.2f}")
        print(f"accuracy: {seen[0]['accuracy']:.2f} -> {seen[-1]['accuracy']:.2f}")


if __name__ == "__main__":
    asyncio.run(main())
