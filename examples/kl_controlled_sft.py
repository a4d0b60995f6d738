"""Fine-tune on answers while an adaptive controller keeps the model near the base model.

Trains twice with the same initial weights: with a fixed weight, and with a weight that follows the measured KL. Runs on
the embedded service, or on TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio

from tinkex_py import AdamParams, AsyncServiceClient, RegularizerSpec
from tinkex_py.base_losses import NLL
from tinkex_py.data import text_datum, with_reference
from tinkex_py.losses.controllers import AdaptiveKL
from tinkex_py.regularizers import SampledKL

STEPS = 30
TARGET = 0.5  # nats per answer token
PAIRS = [
    ("What is the capital of France?", "Ahoy friend, it is Paris!"),
    ("What is the capital of Japan?", "Ahoy friend, it is Tokyo!"),
    ("What do cows eat?", "Ahoy friend, they eat grass!"),
]


def make_datum(tokenizer, prompt, answer):
    return text_datum(tokenizer, f" {answer}\n", prompt=f"Q: {prompt}\nA:", append_end=False)


async def train(service, model, weight):
    """Trains with this weight of the KL term. Returns (loss, KL, weight) of each step."""
    training = await service.create_lora_training_client(model, rank=16, seed=0)
    tokenizer = await training.get_tokenizer()
    # A new adapter does not change the output, so the reference is the base model.
    data = await with_reference(training, [make_datum(tokenizer, *pair) for pair in PAIRS])
    # These are the data's tokens, not the model's own samples, so the value is a distance on them, not the true KL.
    kl = SampledKL(reference_field="reference_logprobs", estimator="k2", mask="weights", reduction="token-mean")
    regularizers = [RegularizerSpec(fn=kl, weight=weight, name="kl")]
    nll = NLL(mask="weights", reduction="token-mean")

    steps = []
    for _ in range(STEPS):
        output, _ = await asyncio.gather(
            training.forward_backward_custom(data, nll, regularizers=regularizers),
            training.optim_step(AdamParams(learning_rate=3e-3)),
        )
        term = output.regularizers["kl"]
        steps.append((output.base_loss.value, term.value, term.weight))
    return steps


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        fixed = await train(service, model, 0.01)
        held = await train(service, model, AdaptiveKL(initial=0.5, target=TARGET, horizon=1.0))

    print("      fixed weight          adaptive weight")
    print("step  loss    KL            loss    KL      weight")
    for step, (one, other) in enumerate(zip(fixed, held, strict=True)):
        print(f"{step:4}  {one[0]:.3f}  {one[1]:6.3f}        {other[0]:.3f}  {other[1]:6.3f}  {other[2]:.4f}")
    print(f"KL without controller: {fixed[-1][1]:.3f}")
    print(f"KL with controller: {held[-1][1]:.3f}, target {TARGET}")


asyncio.run(main())
