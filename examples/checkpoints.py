"""Save, list, download and delete checkpoints.

Runs on the embedded service, or on TINKER_BASE_URL with TINKER_API_KEY. The downloaded checkpoint is in the folder
`downloaded_checkpoint`.
"""

import asyncio

from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, UnsupportedFeature

DAY = 24 * 3600


async def train(training):
    """Trains a few steps on one sentence and saves two checkpoints."""
    tokens = list((await training.get_tokenizer()).encode("Ahoy friend, fair winds!"))
    data = [Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})]
    paths = []
    for name in ("early", "late"):
        for _ in range(3):
            await training.forward_backward_custom(data, lambda data, logprobs: -logprobs.mean())
            await training.optim_step(AdamParams(learning_rate=5e-3))
        paths.append((await training.save_state(name, ttl_seconds=DAY)).path)
    return paths


def show_progress(progress):
    print(f"downloaded {progress.received_bytes} of {progress.total_bytes} bytes")


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=8)
        early, late = await train(training)

        rest = service.create_rest_client()
        async for checkpoint in rest.checkpoints(training.model_id):
            print(f"{checkpoint.checkpoint_id}: {checkpoint.size_bytes} bytes, expires: {checkpoint.expires_at}")
        info = await rest.get_weights_info(late)
        print(f"base model {info.base_model}, rank {info.lora_rank}")

        try:
            await rest.set_checkpoint_ttl(late, None)
            print("late never expires")
        except UnsupportedFeature as error:
            print(error)

        folder = await rest.download_checkpoint(late, "downloaded_checkpoint", on_progress=show_progress)
        print("files:", ", ".join(sorted(file.name for file in folder.iterdir())))

        again = await service.create_training_client_from_state(late, with_optimizer=True)
        print("resumed training of", (await again.get_info()).model_data.model_name)

        await rest.delete_checkpoint(early)
        print("remaining:", [checkpoint.checkpoint_id async for checkpoint in rest.checkpoints(training.model_id)])


asyncio.run(main())
