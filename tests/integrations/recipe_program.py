"""Runs in a process of its own: a loop of the official SDK, with and without regularizers, and our own client."""

import asyncio
import json
import sys
import warnings
from pathlib import Path

import tinker
import torch
from tinker import types

from tinkex_py import AdamParams, AsyncServiceClient, ConfigError, InvalidBaseLoss, RegularizerSpec, controllers
from tinkex_py.integrations.tinker import regularize_recipe, regularized
from tinkex_py.regularizers import L2
from tinkex_py.runs import read_run, read_steps, scalars

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


def recorded(address, folder, plain):
    """What a run folder says about recipes that end, fail, are cancelled, are continued, and have two clients."""
    seen = {}
    with regularize_recipe(l2(lambda step: 0.1 * step), record=folder / "whole"):
        _, metrics = recipe(address, "cross_entropy")
    steps = [scalars(step) for step in read_steps(folder / "whole")]
    for own, official in (
        ("loss/total", "loss:sum"),
        ("loss/base", "base_loss.value"),
        ("term/l2/weight", "l2.weight"),
    ):
        seen[own] = [[step[own] for step in steps], [step[official] for step in metrics]]
    seen["learning rates"] = [step["optimizer/learning_rate"] for step in steps]
    seen["sizes"] = [[step["data/datums"], step["data/tokens"]] for step in steps]
    seen["norms"] = min(step["optimizer/grad_norm"] for step in steps)
    seen["times"] = min(step["time/step"] for step in steps)
    with regularize_recipe([], record=folder / "plain"):
        seen["same weights"] = far(plain, recipe(address, "cross_entropy")[0])

    class BugInRecipe(Exception):
        pass

    def interrupted(name, error):
        try:
            with regularize_recipe(l2(0.1), record=folder / name):
                recipe(address, "cross_entropy")
                raise error
        except type(error):
            pass

    async def cancelled():
        with regularize_recipe(l2(0.1), record=folder / "cancelled"):
            await asyncio.to_thread(recipe, address, "cross_entropy")
            reached.set()
            await asyncio.Event().wait()

    async def cancel():
        task = asyncio.create_task(cancelled())
        await reached.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    interrupted("failed", BugInRecipe("text of a prompt"))
    seen["outcome"] = read_run(folder / "failed").outcome
    reached = asyncio.Event()
    asyncio.run(cancel())
    with regularize_recipe(l2(0.1), step=2, record=folder / "failed"):
        recipe(address, "cross_entropy")
        recipe(address, "cross_entropy")
    seen["status"] = {
        path.name: [read_run(path).outcome, read_run(path).model, [step.step for step in read_steps(path)]]
        for path in sorted(folder.iterdir())
    }
    ended = False
    try:
        with regularize_recipe(l2(0.1), record=folder / "unwritable"):
            (folder / "unwritable" / "steps.jsonl").mkdir()
            recipe(address, "cross_entropy")
            ended = True
    except ConfigError as error:
        seen["not written"] = [ended, read_run(folder / "unwritable").outcome, "cannot be written" in str(error)]
    seen["refused"] = []
    for step, name in ((0, "whole"), (4, "whole"), (0, "whole/run.json")):
        try:
            with regularize_recipe([], step=step, record=folder / name):
                seen["refused"].append("entered")
        except ConfigError as error:
            seen["refused"].append(str(error).replace(str(folder), "FOLDER"))
    return seen


def main(address, folder):
    seen = {}
    before = {name: getattr(tinker.TrainingClient, name) for name in ("forward_backward", "optim_step")}
    plain, _ = recipe(address, "cross_entropy")
    seen["record"] = recorded(address, Path(folder), plain)
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
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
