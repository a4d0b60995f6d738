"""Fine-tune on answers under a bound: the model may move away from the base model by at most 0.2 nats per token.

No weight has to be found: the multiplier of the bound rises while the KL is above it, and falls while it is below. The
multiplier at the end is the price of the bound. Runs on the embedded service, or on TINKER_BASE_URL with
TINKER_API_KEY.
"""

import asyncio

from tinkex_py import AdamParams, AsyncServiceClient, Pipeline, RegularizerSpec
from tinkex_py.base_losses import NLL
from tinkex_py.data import text_datum, with_reference
from tinkex_py.regularizers import SampledKL

STEPS = 60
BOUND = 0.2  # nats per answer token


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=4, seed=0)
        datum = text_datum(await training.get_tokenizer(), " Ahoy!\n", prompt="Q: Hello?\nA:", append_end=False)

        # A new adapter does not change the output, so the reference is the base model.
        data = await with_reference(training, [datum])

        # These are the data's tokens, not the model's own samples, so the value is a distance on them.
        kl = SampledKL(reference_field="reference_logprobs", estimator="k2", mask="weights", reduction="token-mean")
        nll = NLL(mask="weights", reduction="token-mean")
        pipeline = Pipeline(nll, [RegularizerSpec(fn=kl, at_most=BOUND, name="kl")])

        print("step  loss    KL      multiplier  bound")
        for step in range(STEPS):
            output, _ = await asyncio.gather(
                training.forward_backward_custom(data, pipeline),
                training.optim_step(AdamParams(learning_rate=5e-3)),
            )
            term = output.regularizers["kl"]
            holds = "holds" if term.constraint and term.constraint.feasible else "violated"
            if step % 4 == 3:
                print(f"{step + 1:4}  {output.base_loss.value:.3f}  {term.value:.4f}  {term.weight:10.3f}  {holds}")
    print(f"KL at the end: {term.value:.4f}, bound {BOUND}, price {term.weight:.3f}")


asyncio.run(main())
