"""The unmodified official SDK, as a part of `official_programs.py`."""

import itertools

import tinker
import torch
from tinker import types


def datum(ids: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_torch(torch.tensor(ids[1:])),
            "weights": types.TensorData.from_torch(torch.ones(len(ids) - 1)),
        },
    )


def main(address: str) -> dict[str, object]:
    seen: dict[str, object] = {}
    service = tinker.ServiceClient(base_url=address, api_key="tml-local")
    rest = tinker.RestClient(base_url=address, api_key="tml-local")
    seen["models"] = [model.model_name for model in rest.get_server_capabilities().result().supported_models]
    training = service.create_lora_training_client(base_model="tiny", rank=8, seed=3).result()
    info = training.get_info()
    seen["info"] = [info.model_data.model_name, info.lora_rank, info.is_lora]
    tokenizer = training.get_tokenizer()
    seen["tokens"] = tokenizer.encode("hé")
    data = [datum([256, *b"hello world"]), datum([256, *b"tea"])]

    forward = training.forward(data, "cross_entropy").result()
    seen["forward_shapes"] = [output["logprobs"].shape for output in forward.loss_fn_outputs]
    first = training.forward_backward(data, "cross_entropy").result()
    seen["loss_equal"] = forward.metrics["loss:sum"] == first.metrics["loss:sum"]
    step = training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    seen["grad_norm_positive"] = step.metrics["grad_norm"] > 0

    def custom(batch, logprobs):
        loss = -sum(item.sum() for item in logprobs)
        return loss, {"tokens": float(sum(len(item) for item in logprobs))}

    losses = [first.metrics["loss:sum"]]
    for _ in range(3):
        result = training.forward_backward_custom(data, custom).result()
        losses.append(result.metrics["loss:sum"])
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    seen["losses_fall"] = all(later < earlier for earlier, later in itertools.pairwise(losses))
    seen["surrogate_equal"] = abs(result.metrics["surrogate_loss:sum"] - losses[-1]) < 1e-3

    path = training.save_state("s1").result().path
    seen["path_end"] = path.split("/", 3)[3]
    again = service.create_training_client_from_state_with_optimizer(path).result()
    plain = service.create_training_client_from_state(path).result()
    next_losses = []
    for client in (training, again, plain):
        client.forward_backward(data, "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        next_losses.append(client.forward(data, "cross_entropy").result().metrics["loss:sum"])
    seen["resumed_equal"] = next_losses[0] == next_losses[1]
    seen["without_optimizer_differs"] = next_losses[0] != next_losses[2]

    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([256, *b"he"])
    params = types.SamplingParams(max_tokens=5, temperature=0.0, stop=[])
    drawn = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    seen["sequences"] = [len(sequence.tokens) for sequence in drawn.sequences]
    seen["greedy_same"] = drawn.sequences[0].tokens == drawn.sequences[1].tokens
    scored = sampler.compute_logprobs(types.ModelInput.from_ints([256, *b"hello world"])).result()
    reference = training.forward([data[0]], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()
    seen["scores_match"] = scored[0] is None and torch.allclose(torch.tensor(scored[1:]), reference, atol=1e-4)

    named = training.save_weights_for_sampler("final").result().path
    base = service.create_sampling_client(base_model="tiny").result()
    trained = service.create_sampling_client(model_path=named).result()
    seen["base_differs"] = base.compute_logprobs(prompt).result()[1:] != trained.compute_logprobs(prompt).result()[1:]

    run_id = path.split("/")[2]
    seen["checkpoints"] = sorted(item.checkpoint_id for item in rest.list_checkpoints(run_id).result().checkpoints)
    runs = rest.list_training_runs().result().training_runs
    seen["runs"] = len([run for run in runs if run.training_run_id.partition(":")[0] == run_id.partition(":")[0]])
    seen["info_rank"] = rest.get_weights_info_by_tinker_path(path).result().lora_rank
    try:
        service.create_lora_training_client(base_model="nope").result()
    except tinker.RequestFailedError as error:
        seen["unknown_model"] = "'nope'" in str(error) and "'tiny'" in str(error)
    service.close("success")
    return seen
