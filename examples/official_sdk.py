"""Train with the official SDK (`pip install tinker`) and this package's composed loss.

Three runs with the same initial weights: a plain loss function as the official SDK takes it, the same loss as a
pipeline, which gives the same numbers, and that pipeline with regularizers. Runs against `tinkex-py serve --model
tiny`, which it starts, or against TINKER_BASE_URL with TINKER_API_KEY.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import tinker
from dpo import dpo_loss, make_datum, texts
from tinker import types

from tinkex_py import Pipeline, RegularizerSpec, per_datum
from tinkex_py.regularizers import L2, SampledKL

STEPS = 6


@contextmanager
def some_service():
    """Yields the address of a service and its key."""
    if "TINKER_BASE_URL" in os.environ:
        yield os.environ["TINKER_BASE_URL"], os.environ["TINKER_API_KEY"]
        return
    command = [sys.executable, "-m", "tinkex_py", "serve", "--model", "tiny", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().removeprefix("Listening on ").strip(), "tml-local"
        finally:
            server.terminate()


def official_datum(tokenizer, prompt, answer, **inputs):
    datum = make_datum(tokenizer, prompt, answer)
    fields = {name: tensor.tolist() for name, tensor in datum.loss_fn_inputs.items()} | inputs
    model_input = types.ModelInput.from_ints(datum.model_input.to_ints())
    # The official types convert lists, which their annotations do not say.
    return types.Datum(model_input=model_input, loss_fn_inputs=fields)  # pyright: ignore[reportArgumentType]


def train(service, model, loss_of_step):
    """Trains a new adapter. Returns the loss of every step."""
    training = service.create_lora_training_client(base_model=model, rank=16, seed=0).result()
    tokenizer = training.get_tokenizer()
    reference = training.forward([official_datum(tokenizer, *text) for text in texts()], "cross_entropy").result()
    data = [
        official_datum(tokenizer, *text, reference_logprobs=output["logprobs"])
        for text, output in zip(texts(), reference.loss_fn_outputs, strict=True)
    ]
    losses = []
    for step in range(STEPS):
        result = training.forward_backward_custom(data, loss_of_step(step)).result()
        training.optim_step(types.AdamParams(learning_rate=2e-3)).result()
        losses.append(result.metrics["loss:sum"])
    return losses


def main():
    drift = SampledKL(reference_field="reference_logprobs", estimator="k2", mask="weights", reduction="token-mean")
    alone = Pipeline(per_datum(dpo_loss))
    composed = Pipeline(
        per_datum(dpo_loss),
        [
            RegularizerSpec(fn=drift, weight=0.05, name="drift"),
            RegularizerSpec(fn=L2(mask="weights", reduction="token-mean"), weight=0.001, name="l2"),
        ],
    )
    with some_service() as (address, key):
        service = tinker.ServiceClient(base_url=address, api_key=key)
        rest = tinker.RestClient(base_url=address, api_key=key)
        model = rest.get_server_capabilities().result().supported_models[0].model_name
        runs = {
            "plain function": train(service, model, lambda step: dpo_loss),
            "pipeline": train(service, model, lambda step: alone.as_tinker_loss(step=step)),
            "with regularizers": train(service, model, lambda step: composed.as_tinker_loss(step=step)),
        }
        service.close("success")
    for name, losses in runs.items():
        print(f"{name}: " + " ".join(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
