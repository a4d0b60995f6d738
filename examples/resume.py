"""Stop a training in the middle and resume it in a new client, with the numbers of an uninterrupted training.

Three things are kept: the service's checkpoint with the optimizer, the number of steps, and the state of the weight
controllers. Runs on the embedded service, or on TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio
import json

from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, Pipeline, RegularizerSpec
from tinkex_py.base_losses import NLL
from tinkex_py.losses.controllers import TargetGradientRatio
from tinkex_py.losses.schedules import Linear
from tinkex_py.regularizers import L2, Entropy

STEPS = 8
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs."]


def make_datum(text, tokenizer):
    tokens = list(tokenizer.encode(text))
    return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})


def make_pipeline():
    return Pipeline(
        NLL(reduction="token-mean"),
        [
            RegularizerSpec(fn=L2(reduction="token-mean"), weight=TargetGradientRatio(ratio=0.2)),
            RegularizerSpec(fn=Entropy(over="tokens", reduction="mean"), weight=Linear(0.1, 0.0, STEPS)),
        ],
    )


async def train(training, pipeline, data, steps):
    losses = []
    for _ in range(steps):
        output, _ = await asyncio.gather(
            training.forward_backward_custom(data, pipeline), training.optim_step(AdamParams(learning_rate=5e-3))
        )
        losses.append(output.loss_total)
    return losses


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=8, seed=0)
        data = [make_datum(text, await training.get_tokenizer()) for text in TEXTS]
        whole = await train(training, make_pipeline(), data, STEPS)

        training = await service.create_lora_training_client(model, rank=8, seed=0)
        pipeline = make_pipeline()
        losses = await train(training, pipeline, data, STEPS // 2)
        checkpoint = await training.save_state("half-way")
        saved = json.dumps({"path": checkpoint.path, "step": training.step, "weights": pipeline.state_dict()})
        await training.aclose()
        print(f"stopped after {len(losses)} steps")

        # The code below could run in another process.
        state = json.loads(saved)
        resumed = await service.create_training_client_from_state(state["path"], with_optimizer=True)
        resumed.step = state["step"]
        pipeline = make_pipeline()
        pipeline.load_state_dict(state["weights"])
        losses += await train(resumed, pipeline, data, STEPS - STEPS // 2)

    for step, (one, other) in enumerate(zip(whole, losses, strict=True)):
        print(f"step {step}  uninterrupted {one:.6f}  resumed {other:.6f}")
    print(f"largest difference: {max(abs(one - other) for one, other in zip(whole, losses, strict=True)):.1e}")


asyncio.run(main())
