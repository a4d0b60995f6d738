"""Runs in a process of its own: the unmodified official SDK trains fresh models. Reads what to do as JSON from stdin.

For every run a model with a custom loss that is written out by hand: the weighted negative log-likelihood, plus 0.5
times the mean squared distance from the reference, plus 0.2 times the mean absolute logprob. Prints one JSON line with
the path of every run's checkpoint.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tinker
import torch
from tinker import types


def made(told: Mapping[str, Any]) -> types.Datum:
    inputs = {
        "target_tokens": torch.tensor(told["targets"]),
        "weights": torch.tensor(told["weights"]),
        "reference": torch.tensor(told["reference"]),
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(told["tokens"]),
        loss_fn_inputs={name: types.TensorData.from_torch(values) for name, values in inputs.items()},
    )


def composed(data: Sequence[types.Datum], logprobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    count = sum(len(item) for item in logprobs)
    loss = torch.zeros(())
    for datum, item in zip(data, logprobs, strict=True):
        weights, reference = (datum.loss_fn_inputs[name].to_torch() for name in ("weights", "reference"))
        loss = loss - (weights * item).sum()
        loss = loss + 0.5 * ((item - reference) ** 2).sum() / count
        loss = loss + 0.2 * item.abs().sum() / count
    return loss, {}


def trained(address: str, wanted: Mapping[str, Any]) -> str:
    service = tinker.ServiceClient(base_url=address, api_key="tml-test-client")
    data = [made(told) for told in wanted["data"]]
    training = service.create_lora_training_client(base_model="tiny", rank=wanted["rank"], seed=wanted["seed"]).result()
    for _ in range(wanted["steps"]):
        training.forward_backward_custom(data, composed).result()
        training.optim_step(types.AdamParams(**wanted["adam"])).result()
    path = training.save_state("after").result().path
    service.close("success")
    return path


def main() -> None:
    wanted = json.load(sys.stdin)
    paths = [trained(sys.argv[1], wanted) for _ in range(wanted["runs"])]
    sys.stdout.write(json.dumps(paths) + "\n")


if __name__ == "__main__":
    main()
