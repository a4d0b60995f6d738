"""A composed loss on a tensor, offline: values, gradient norms, JSON. Run it as it is."""

import asyncio
from pathlib import Path

import torch

from tinkex_py import Pipeline, RegularizerSpec


def nll(data, logprobs):
    return -logprobs.mean(), {}


def l1(data, logprobs):
    return logprobs.abs().sum(), {}


def l2(data, logprobs):
    return logprobs.pow(2).sum(), {}


def negative_entropy(data, logprobs):
    return (logprobs.exp() * logprobs).sum(), {}


async def training_step():
    logprobs = torch.tensor([-0.5, -1.2, -0.8, -2.1, -0.3])
    data = []

    pipeline = Pipeline(
        nll,
        [
            RegularizerSpec(fn=l1, weight=0.01, name="l1_sparsity"),
            RegularizerSpec(fn=l2, weight=0.005, name="l2_weight_decay"),
            RegularizerSpec(fn=negative_entropy, weight=0.001, name="entropy"),
        ],
        track_grad_norms=True,
        parallel=True,
        timeout=30.0,
    )
    return await pipeline.compute(data, logprobs)


def show(output):
    print("=== Training Step Results ===")
    print(f"Total Loss: {round(output.loss_total, 6)}")
    print(f"Base Loss: {round(output.base_loss.value, 6)}")
    print(f"Regularizer Total: {round(output.regularizer_total, 6)}")
    if output.total_grad_norm is not None:
        print(f"Total Grad Norm: {round(output.total_grad_norm, 6)}")

    print("\n=== Per-Regularizer Breakdown ===")
    for name, reg in output.regularizers.items():
        print(f"\n{name}:")
        print(f"  value: {round(reg.value, 6)}")
        print(f"  weight: {reg.weight}")
        print(f"  contribution: {round(reg.contribution, 6)}")
        if reg.grad_norm is not None:
            print(f"  grad_norm: {round(reg.grad_norm, 6)}")
            print(f"  grad_norm_weighted: {round(reg.grad_norm_weighted, 6)}")


output = asyncio.run(training_step())
show(output)
Path("training_step.json").write_text(output.model_dump_json(indent=2))
print("\n✓ Saved to training_step.json")
