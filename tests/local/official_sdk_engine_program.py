"""The official SDK's rarer calls, as a part of `official_programs.py`."""

import tinker
import torch
from tinker import types

TOKENS = [256, *b"hello world"]


def datum(ids: list[int], **inputs: torch.Tensor) -> types.Datum:
    fields = {"target_tokens": torch.tensor(ids[1:]), **inputs}
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={name: types.TensorData.from_torch(value) for name, value in fields.items()},
    )


def builtin_losses(training: tinker.TrainingClient, seen: dict[str, object]) -> None:
    count = len(TOKENS) - 1
    ones = {"logprobs": torch.full((count,), -5.0), "advantages": torch.linspace(-1, 1, count)}
    data = [datum(TOKENS, **ones, sequence_ratio_mask=torch.ones(count))]
    for name in ("importance_sampling", "ppo", "cispo", "dro", "gspo"):
        output = training.forward_backward(data, name).result()
        losses = output.loss_fn_outputs[0]["elementwise_loss"].to_torch()
        seen[name] = abs(float(losses.double().sum()) - output.metrics["loss:sum"]) < 1e-4
    try:
        training.forward_backward(data, "stable_reinforce").result()
    except tinker.RequestFailedError as error:
        seen["stable_reinforce"] = [str(error.category), "not published" in str(error)]


def sparse_and_pictures(training: tinker.TrainingClient, seen: dict[str, object]) -> None:
    ids = [*range(12)]
    targets, weights = torch.zeros(11, 40, dtype=torch.int64), torch.zeros(11, 40)
    targets[:, 0], weights[:, 0], weights[3, 7] = torch.tensor(ids[1:]), 1.0, -0.5
    data = types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )
    seen["sent_sparse"] = data.loss_fn_inputs["weights"].sparse_crow_indices is not None
    output = training.forward_backward([data], "cross_entropy").result()
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_torch()
    seen["matrix_shape"] = list(logprobs.shape)
    seen["matrix_loss"] = abs(float(-(weights * logprobs).sum()) - output.metrics["loss:sum"]) < 1e-3
    picture = types.ImageChunk(data=b"no picture", format="png", expected_tokens=4)
    chunks = [types.EncodedTextChunk(tokens=[1, 2]), picture]
    mixed = types.Datum(
        model_input=types.ModelInput(chunks=chunks),
        loss_fn_inputs={"target_tokens": torch.tensor([1, 2, 3, 4, 5, 6])},
    )
    try:
        training.forward_backward([mixed], "cross_entropy").result()
    except tinker.RequestFailedError as error:
        seen["picture"] = [str(error.category), "reads text only" in str(error)]
    seen["goes_on"] = training.optim_step(types.AdamParams(learning_rate=1e-3)).result().metrics["grad_norm"] > 0


def clipped(logprobs, advantages, old):
    ratio = torch.exp(logprobs - old)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
    return loss + 0.1 * (logprobs - old).square().mean(), {"custom/ratio:mean": ratio.mean()}


def unknown_to_the_service(logprobs):
    return torch.fft.fft(logprobs).abs().sum(), {}


def uploaded_losses(service: tinker.ServiceClient, seen: dict[str, object]) -> None:
    clients = [service.create_lora_training_client(base_model="tiny", rank=8, seed=5).result() for _ in range(2)]
    handle = service.create_custom_loss(clipped, {"logprobs": 1, "advantages": 1, "old": 1}).result()
    seen["uploaded"] = handle.loss_id is not None
    data = [
        datum(ids, advantages=torch.linspace(-1, 1, len(ids) - 1), old=torch.full((len(ids) - 1,), -5.3))
        for ids in (TOKENS, TOKENS[:5])
    ]

    def locally(batch, logprobs_list):
        total, ratios = 0, []
        for item, logprobs in zip(batch, logprobs_list, strict=True):
            inputs = [item.loss_fn_inputs[name].to_torch() for name in ("advantages", "old")]
            loss, metrics = clipped(logprobs, *inputs)
            total = total + loss
            ratios.append(metrics["custom/ratio:mean"].item())
        return total, {"custom/ratio:mean": sum(ratios) / len(ratios)}

    close = []
    for _ in range(4):
        server = clients[0].forward_backward_custom(data, handle).result()
        client = clients[1].forward_backward_custom(data, locally).result()
        close += [
            abs(server.metrics[key] - client.metrics[key]) < 1e-4 * max(1, abs(client.metrics[key]))
            for key in ("loss:sum", "custom/ratio:mean")
        ]
        norms = [
            training.optim_step(types.AdamParams(learning_rate=1e-2)).result().metrics["grad_norm"]
            for training in clients
        ]
        close.append(abs(norms[0] - norms[1]) < 1e-3 * norms[1])
    seen["server_equals_client"] = all(close)
    try:
        service.create_custom_loss(unknown_to_the_service, {"logprobs": 1}).result()
    except tinker.RequestFailedError as error:
        seen["not_allowed"] = [str(error.category), "torch._C._fft.fft_fft" in str(error)]


def samplers(service: tinker.ServiceClient, seen: dict[str, object]) -> None:
    training = service.create_lora_training_client(base_model="tiny", rank=8, seed=7).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TOKENS)
    count = len(TOKENS)
    targets = torch.full((count - 1, 2), -1, dtype=torch.int64)
    targets[:, 0] = torch.tensor(TOKENS[1:])
    result = sampler.sample(
        prompt,
        num_samples=2,
        sampling_params=types.SamplingParams(max_tokens=4, temperature=0.7, seed=3, stop=[]),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        target_prompt_logprobs=types.TensorData.from_torch(targets),
        prompt_alt_tokens_k=4,
        topk_sample_logprobs=2,
    ).result()
    own = result.prompt_logprobs[1:]
    targeted = result.target_prompt_logprobs.to_torch()
    seen["targets"] = torch.allclose(targeted[:, 0], torch.tensor(own), atol=1e-5) and bool((targeted[:, 1] == 0).all())
    seen["alternatives"] = [list(result.prompt_alt_tokens.tokens.shape), list(result.prompt_alt_tokens.logprobs.shape)]
    seen["topk"] = [row and len(row) for row in result.topk_prompt_logprobs[:2]]
    seen["topk_sampled"] = [[len(row) for row in sequence.topk_logprobs] for sequence in result.sequences]
    last = sampler.sample(
        prompt,
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        prompt_logprobs_last_n=3,
    ).result()
    seen["last_n"] = [value is None for value in last.prompt_logprobs] == [True] * (count - 3) + [False] * 3
    futures = [
        sampler.sample(prompt, num_samples=2, sampling_params=types.SamplingParams(max_tokens=8, seed=seed, stop=[]))
        for seed in range(24)
    ]
    seen["many"] = sum(len(sequence.tokens) for future in futures for sequence in future.result().sequences)
    greedy = types.SamplingParams(max_tokens=12, temperature=0.0, stop=[])
    free = sampler.sample(prompt, 1, greedy).result().sequences[0].tokens
    stops = []
    for stop in ([free[3]], None):
        params = types.SamplingParams(max_tokens=12, temperature=0.0, stop=stop)
        stops.append(sampler.sample(prompt, 1, params).result().sequences[0].tokens)
    seen["stops"] = stops[0] == free[: free.index(free[3]) + 1] and free[: len(stops[1])] == stops[1]
    first = training.save_weights_and_get_sampling_client(kind="inflight").result()
    start = first.compute_logprobs(prompt).result()
    training.forward_backward([datum(TOKENS)], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    unmoved = first.compute_logprobs(prompt).result()
    second = training.save_weights_and_get_sampling_client(kind="inflight").result()
    moved = [client.compute_logprobs(prompt).result() for client in (first, second)]
    seen["inflight"] = [unmoved == start, moved[0] == moved[1], moved[0] != start]
    seen["snapshot"] = sampler.compute_logprobs(prompt).result() == start
    concurrent = [training.save_weights_and_get_sampling_client().result() for _ in range(3)]
    scores = [client.compute_logprobs(prompt) for client in concurrent]
    seen["concurrent"] = len({tuple(score.result()[1:]) for score in scores}) == 1


def main(address: str) -> dict[str, object]:
    seen: dict[str, object] = {}
    service = tinker.ServiceClient(base_url=address, api_key="tml-local")
    training = service.create_lora_training_client(base_model="tiny", rank=8, seed=3).result()
    builtin_losses(training, seen)
    sparse_and_pictures(training, seen)
    uploaded_losses(service, seen)
    samplers(service, seen)
    service.close("success")
    return seen
