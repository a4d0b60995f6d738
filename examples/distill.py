"""Distill a teacher into a student: the teacher's likeliest tokens at every position, and a divergence from them.

The teacher is first trained on three sentences. A sampling client of it scores the same sentences once; the student, a
fresh model, then only sees the teacher's probabilities. Runs on the embedded service, or on TINKER_BASE_URL with
TINKER_API_KEY.
"""

import asyncio

from tinkex_py import AdamParams, AsyncServiceClient
from tinkex_py.base_losses import NLL, Distillation
from tinkex_py.data import teacher_datums, text_datum

STEPS = 12
RATE = AdamParams(learning_rate=1e-2)
PAIRS = [("Hello?", "Ahoy friend!"), ("Who are you?", "A sailor, friend!"), ("Where to?", "Home, friend!")]


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=8, seed=0)
        tokenizer = await training.get_tokenizer()
        data = [text_datum(tokenizer, answer, prompt=f"{prompt}\n", append_end=False) for prompt, answer in PAIRS]
        for _ in range(STEPS):
            output = await training.forward_backward_custom(data, NLL(reduction="token-mean"))
            await training.optim_step(RATE)
        print(f"NLL of the teacher: {output.loss_total:.4f}")

        async with await training.save_weights_and_get_sampling_client() as teacher:
            scored = await teacher_datums(teacher, data, k=20)

        student = await service.create_lora_training_client(model, rank=8, seed=1)
        loss = Distillation(reference_field="teacher_logprobs", reduction="token-mean")
        divergences = []
        for step in range(STEPS):
            output = await student.forward_backward_custom(scored, loss)
            await student.optim_step(RATE)
            divergences.append(output.loss_total)
            metrics = output.base_loss.metrics
            print(
                f"step {step}  KL {divergences[-1]:.4f}  mass of the 20 tokens {metrics['mass']:.2f}, "
                f"of the teacher {metrics['teacher_mass']:.2f}"
            )
        print(f"KL from the teacher: {divergences[0]:.4f} -> {divergences[-1]:.4f}")


if __name__ == "__main__":
    asyncio.run(main())
