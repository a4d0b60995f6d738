"""Faults of services, injected into the engine of the embedded service, which has none of them.

Each changes what the service does with the gradient of a backward pass, or with the optimizer, and nothing that its
answers show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import EncodedDatum, EnginePass, PassResult
from tinkex_py.local.engine import Engine
from tinkex_py.types import AdamParams

Numbers = list[np.ndarray]
"""The weights of cross_entropy, or the advantages of importance_sampling, of every datum of a request."""


@dataclass(frozen=True)
class Fault:
    """A fault and the check that is meant to find it.

    Attributes:
        inject: changes an engine.
        check: name of the check.
        state: what the check says.
        surrogate: the surrogate under test.
    """

    inject: Callable[[Engine], None]
    check: str
    state: str = "fail"
    surrogate: str = "cross_entropy"


def changing(change: Callable[[Numbers], Sequence[np.ndarray]]) -> Callable[[Engine], None]:
    """Returns a fault that changes the numbers of every backward request."""

    def inject(engine: Engine) -> None:
        run_pass = engine.run_pass

        def changed(model_id: str, request: EnginePass) -> PassResult:
            return run_pass(model_id, request if request.forward_only else with_numbers(request, change))

        engine.run_pass = changed

    return inject


def with_numbers(request: EnginePass, change: Callable[[Numbers], Sequence[np.ndarray]]) -> EnginePass:
    name = "weights" if request.loss_fn == "cross_entropy" else "advantages"

    def data() -> list[EncodedDatum]:
        datums = list(request.data())
        numbers = [np.asarray(datum.inputs.get(name, np.ones(len(datum.tokens)))) for datum in datums]
        changed = change(numbers)
        return [
            EncodedDatum(datum.tokens, {**datum.inputs, name: values.astype(np.float32)})
            for datum, values in zip(datums, changed, strict=True)
        ]

    return replace(request, data=data)


def masked(numbers: Numbers) -> list[np.ndarray]:
    count = sum(int((part != 0).sum()) for part in numbers)
    return [(part != 0) / max(count, 1) for part in numbers]


def per_used_token(numbers: Numbers) -> list[np.ndarray]:
    count = sum(int((part != 0).sum()) for part in numbers)
    return [part / max(count, 1) for part in numbers]


def per_token_of_request(numbers: Numbers) -> list[np.ndarray]:
    return [part / sum(map(len, numbers)) for part in numbers]


def dropout(engine: Engine) -> None:
    """Forward passes in eval mode and backward passes in train mode, with a dropout of 0.05 on the adapter's input."""
    run_pass, backward = engine.run_pass, False

    def drop(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return (torch.nn.functional.dropout(inputs[0], 0.05), *inputs[1:]) if backward else None

    def changed(model_id: str, request: EnginePass) -> PassResult:
        nonlocal backward
        for name, module in engine.model.network.named_modules():
            if ".lora_A." in name and not module._forward_pre_hooks:
                module.register_forward_pre_hook(drop)
        backward = not request.forward_only
        return run_pass(model_id, replace(request, keep_graph=False))

    engine.run_pass = changed


def half_precision(engine: Engine) -> None:
    """Logprobs that are rounded to half precision."""
    run_pass = engine.run_pass

    def rounded(model_id: str, request: EnginePass) -> PassResult:
        result = run_pass(model_id, replace(request, keep_graph=False))
        return replace(result, logprobs=[part.astype(np.float16).astype(np.float32) for part in result.logprobs])

    engine.run_pass = rounded


def limited_settings(engine: Engine) -> None:
    """No eps above 1, as hatchery has it."""
    optim_step = engine.optim_step

    def limited_step(model_id: str, settings: AdamParams) -> Mapping[str, float]:
        if settings.eps > 1:
            raise InvalidData(f"eps must be at most 1, not {settings.eps}")
        return optim_step(model_id, settings)

    engine.optim_step = limited_step


def not_accumulated(engine: Engine) -> None:
    run_pass = engine.run_pass

    def changed(model_id: str, request: EnginePass) -> PassResult:
        if not request.forward_only:
            engine._model(model_id).adapter.take_gradients()
        return run_pass(model_id, request)

    engine.run_pass = changed


def stepping(change: Callable[[AdamParams], AdamParams]) -> Callable[[Engine], None]:
    """Returns a fault that changes the parameters of every optimizer step."""

    def inject(engine: Engine) -> None:
        optim_step = engine.optim_step
        engine.optim_step = lambda model_id, settings: optim_step(model_id, change(settings))

    return inject


def with_settings(**fixed: float) -> Callable[[Engine], None]:
    return stepping(lambda params: AdamParams(**{**params.model_dump(), **fixed}))


def per_datum_of_step(engine: Engine) -> None:
    """The gradient is divided by the datums since the last optimizer step."""
    run_pass, optim_step, counts = engine.run_pass, engine.optim_step, dict[str, int]()

    def counted(model_id: str, request: EnginePass) -> PassResult:
        if not request.forward_only:
            counts[model_id] = counts.get(model_id, 0) + len(request.data())
        return run_pass(model_id, request)

    def divided(model_id: str, settings: AdamParams) -> Mapping[str, float]:
        count = counts.pop(model_id, 1)
        for gradient in engine._model(model_id).adapter.gradients.values():
            gradient.div_(count)
        return optim_step(model_id, settings)

    engine.run_pass, engine.optim_step = counted, divided


def limited(numbers: Numbers) -> list[np.ndarray]:
    return [part.clip(-2, 2) for part in numbers]


def skyrl(engine: Engine) -> None:
    """SkyRL's JAX backend: each datum by the sum of its weights, or by its length; the step by its datums."""
    per_datum_of_step(engine)
    by_weights = changing(lambda numbers: [part / max(part.sum(), 1e-9) for part in numbers])
    by_length = changing(lambda numbers: [part / len(part) for part in numbers])
    by_loss(cross_entropy=by_weights, importance_sampling=by_length)(engine)


def hatchery(engine: Engine) -> None:
    """Each request by the sum of its weights, if that is above 1, or by its tokens."""

    def by_weights(numbers: Numbers) -> list[np.ndarray]:
        return [part / max(sum(other.sum() for other in numbers), 1.0) for part in numbers]

    by_loss(cross_entropy=changing(by_weights), importance_sampling=changing(per_token_of_request))(engine)


def twinkle(engine: Engine) -> None:
    """Weights are a mask and the loss a mean; advantages are divided by the length and the datums of the request."""

    def by_length(numbers: Numbers) -> list[np.ndarray]:
        return [part / len(part) / len(numbers) for part in numbers]

    by_loss(cross_entropy=changing(masked), importance_sampling=changing(by_length))(engine)


def by_loss(**faults: Callable[[Engine], None]) -> Callable[[Engine], None]:
    """Returns a fault that depends on the loss."""

    def inject(engine: Engine) -> None:
        plain, changed = engine.run_pass, dict[str, Callable[[str, EnginePass], PassResult]]()
        for loss, fault in faults.items():
            fault(engine)
            changed[loss], engine.run_pass = engine.run_pass, plain
        engine.run_pass = lambda model_id, request: changed[request.loss_fn](model_id, request)

    return inject


NORMALIZING: Mapping[Callable[[Engine], None], str] = {
    skyrl: "importance_sampling",
    hatchery: "importance_sampling_per_token",
    twinkle: "importance_sampling_per_request",
    by_loss(
        cross_entropy=changing(masked), importance_sampling=changing(lambda numbers: numbers)
    ): "importance_sampling_sum",
}
"""Services that normalize, and the surrogate that each needs."""

FAULTS: Mapping[str, Fault] = {
    "mask instead of weights": Fault(changing(masked), "scale and sign"),
    "mean over the tokens of each datum": Fault(
        changing(lambda numbers: [part / len(part) for part in numbers]), "symmetric"
    ),
    "mean over the tokens of the request": Fault(changing(per_token_of_request), "alone and together"),
    "mean over the tokens with a weight": Fault(changing(per_used_token), "additive"),
    "mean over the datums of the request": Fault(
        changing(lambda numbers: [part / len(numbers) for part in numbers]), "alone and together"
    ),
    "mean over the datums of the step": Fault(per_datum_of_step, "alone and together"),
    "dropout in the backward pass": Fault(dropout, "noise"),
    "weights limited to 2": Fault(changing(limited), "weights are weights"),
    "advantages limited to 2": Fault(changing(limited), "weights are weights", surrogate="importance_sampling_sum"),
    "sign of the gradient": Fault(changing(lambda numbers: [-part for part in numbers]), "descending"),
    "last datum of a request dropped": Fault(
        changing(lambda numbers: [*numbers[:-1], numbers[-1] * (len(numbers) < 2)]), "every position counts"
    ),
    "last position dropped": Fault(
        changing(lambda numbers: [part * (np.arange(len(part)) < len(part) - 1) for part in numbers]),
        "every position counts",
    ),
    "candidates after the first dropped": Fault(
        changing(
            lambda numbers: [part * (np.arange(part.shape[-1]) < 1) if part.ndim == 2 else part for part in numbers]
        ),
        "[T, K]",
    ),
    "gradients not accumulated": Fault(not_accumulated, "accumulation"),
    "eps ignored": Fault(with_settings(eps=1e-12), "optimizer", state="note"),
    "norm of gradients clipped": Fault(with_settings(grad_clip_norm=1.0), "clipping", state="note"),
}
