"""Runs in a process of its own: a loop of the official SDK, with and without regularizers, and our own client."""

import asyncio
import json
import sys
import warnings

import tinker
import torch
from tinker import types

from tinkex_py import AdamParams, AsyncServiceClient, InvalidBaseLoss, RegularizerSpec, controllers
from tinkex_py.integrations.tinker import regularize_recipe, regularized
from tinkex_py.regularizers import L2

STEPS, RATE = 3, 1e-2
TEXTS = ([256, *b"hello world"], [256, *b"tea"])


def datum(ids, **inputs):
    numbers = {"target_tokens": torch.tensor(ids[1:]), **inputs}
    return types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=numbers)


def datums(loss):
    if loss == "cross_entropy":
        return [datum(ids, weights=torch.linspace(0.5, 1.0, len(ids) - 1)) for ids in TEXTS]
    # The tiny model's first logprobs are about -6: some ratios are inside of the limits, some outside.
    sampled = {
        "logprobs": lambda n: torch.linspace(-6.5, -5.0, n),
        "advantages": lambda n: torch.linspace(-1.0, 1.0, n),
    }
    return [datum(ids, **{name: make(len(ids) - 1) for name, make in sampled.items()}) for ids in TEXTS]


def logprobs(training):
    outputs = training.forward(datums("cross_entropy"), "cross_entropy").result().loss_fn_outputs
    return [number for output in outputs for number in output["logprobs"].data]


def recipe(address, loss, config=None, wrap=lambda training: training):
    """An official program that sends each optimizer step before the gradient is there."""
    service = tinker.ServiceClient(base_url=address, api_key="tml-local")
    training = wrap(service.create_lora_training_client(base_model="tiny", rank=4, seed=3).result())
    metrics = []
    for _ in range(STEPS):
        gradient = training.forward_backward(datums(loss), loss, config)
        update = training.optim_step(types.AdamParams(learning_rate=RATE))
        metrics.append(gradient.result().metrics)
        update.result()
    assert type(gradient.result()) is types.ForwardBackwardOutput
    return logprobs(training), metrics


def l2(weight):
    return [RegularizerSpec(fn=L2(mask=None), weight=weight, name="l2")]


async def own(address):
    async with AsyncServiceClient(base_url=address, api_key="tml-local") as service:
        training = await service.create_lora_training_client(rank=4, seed=3)
        for _ in range(STEPS):
            await training.forward_backward_custom(datums("cross_entropy"), "cross_entropy", regularizers=l2(0.1))
            await training.optim_step(AdamParams(learning_rate=RATE))
        result = await training.forward(datums("cross_entropy"))
        return [number for output in result.loss_fn_outputs for number in output["logprobs"].tolist()]


def far(first, second):
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def main(address):
    seen = {}
    before = {name: getattr(tinker.TrainingClient, name) for name in ("forward_backward", "optim_step")}
    plain, _ = recipe(address, "cross_entropy")
    with regularize_recipe([]):
        assert tinker.TrainingClient.forward_backward is before["forward_backward"]
        seen["nothing"] = far(plain, recipe(address, "cross_entropy")[0])
    for loss, config in (
        ("cross_entropy", None),
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3}),
        ("cispo", None),
        ("dro", {"beta": 0.1}),
    ):
        service = recipe(address, loss, config)[0]
        with regularize_recipe(l2(0.0)):
            seen[f"here: {loss}"] = far(service, recipe(address, loss, config)[0])
    with regularize_recipe(l2(0.1)):
        penalized, metrics = recipe(address, "cross_entropy")
    seen["moved by l2"] = far(penalized, plain)
    seen["l2 of our own client"] = far(penalized, asyncio.run(own(address)))
    one = recipe(address, "cross_entropy", wrap=lambda training: regularized(training, l2(0.1)))[0]
    seen["one client"] = far(penalized, one)
    seen["weight"] = [step["l2.weight"] for step in metrics]
    with regularize_recipe(l2(lambda step: 0.1 * step)):
        seen["schedule"] = [step["l2.weight"] for step in recipe(address, "cross_entropy")[1]]
    held = controllers.AdaptiveKL(initial=0.1, target=1e-3, horizon=1.0)
    with regularize_recipe(l2(held)):
        seen["controller"] = [step["l2.weight"] for step in recipe(address, "cross_entropy")[1]]
    seen["controller at the end"] = held.weights["l2"]
    try:
        with regularize_recipe(l2(0.1)):
            recipe(address, "stable_reinforce")
    except InvalidBaseLoss as error:
        seen["refused"] = "not published" in str(error)
    seen["undone"] = all(getattr(tinker.TrainingClient, name) is before[name] for name in before)
    return seen


if __name__ == "__main__":
    warnings.simplefilter("error")
    sys.stdout.write(json.dumps(main(sys.argv[1])) + "\n")
