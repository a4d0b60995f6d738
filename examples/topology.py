"""Smooth the logprobs of answers with a topological penalty, which GUDHI computes in worker processes.

The logprobs of an answer are a function on a path: its tokens. Raise a level from below, and look at the positions
under it: at each local minimum a component is born, and at a local maximum two of them merge, where the younger one
dies. The total persistence is the sum of `death - birth`, so it counts every dip by its depth. Trains twice with the
same initial weights: without the penalty, and with it.

Needs `pip install -e '.[local,processes]'` and `pip install gudhi`. Runs on the embedded
service, or on TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio

import gudhi
import torch

from tinkex_py import AdamParams, AsyncServiceClient, RegularizerSpec, per_datum
from tinkex_py.base_losses import NLL
from tinkex_py.data import text_datum

STEPS = 15
ANSWERS = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs.",
    "Sphinx of black quartz, judge my vow.",
]


def total_persistence(data, logprobs):
    """Mean over the datums of the sum of `death - birth`; the component that never dies does not count.

    A birth or death is the value of one position. GUDHI finds which, and autograd passes the gradient there.
    """
    totals, pairs = [], 0
    for curve in logprobs:
        levels = gudhi.CubicalComplex(top_dimensional_cells=curve.detach().double().numpy())
        levels.compute_persistence()
        finite, _ = levels.cofaces_of_persistence_pairs()
        births_and_deaths = torch.as_tensor(finite[0] if finite else []).reshape(-1, 2).long()
        births, deaths = births_and_deaths.unbind(1)
        totals.append((curve[deaths] - curve[births]).sum())
        pairs += len(births)
    return torch.stack(totals).mean(), {"pairs": pairs}


async def train(service, model, weight):
    """Trains with a weight of the penalty. Returns (loss, total persistence, pairs) of each step."""
    training = await service.create_lora_training_client(model, rank=16, seed=0)
    tokenizer = await training.get_tokenizer()
    data = [text_datum(tokenizer, answer, append_end=False) for answer in ANSWERS]
    smooth = RegularizerSpec(fn=per_datum(total_persistence), weight=weight, runs_in="process", timeout=20.0)

    steps = []
    for _ in range(STEPS):
        output, _ = await asyncio.gather(
            training.forward_backward_custom(data, NLL(reduction="token-mean"), regularizers=[smooth]),
            training.optim_step(AdamParams(learning_rate=5e-3)),
        )
        term = output.regularizers["total_persistence"]
        steps.append((output.base_loss.value, term.value, term.custom_metrics["pairs"]))
    return steps


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        plain = await train(service, model, 0.0)
        smooth = await train(service, model, 0.02)

    print("      without penalty              with penalty")
    print("step  loss   persistence  pairs    loss   persistence  pairs")
    for step, (one, other) in enumerate(zip(plain, smooth, strict=True)):
        print(f"{step:4}  {one[0]:.3f}  {one[1]:11.3f}  {one[2]:5}    {other[0]:.3f}  {other[1]:11.3f}  {other[2]:5}")
    print(f"total persistence without penalty: {plain[-1][1]:.3f}, loss {plain[-1][0]:.3f}")
    print(f"total persistence with penalty: {smooth[0][1]:.3f} -> {smooth[-1][1]:.3f}, loss {smooth[-1][0]:.3f}")


if __name__ == "__main__":
    asyncio.run(main())
