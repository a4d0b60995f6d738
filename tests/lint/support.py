"""Data for the linter: answers of several lengths after prompts, with all fields that losses read."""

from typing import Any

import numpy as np
import torch

from tests.objectives.entries import Batch, batch

LENGTHS = (4, 6, 3, 7, 5, 8)


def answers(*, sampler_gap: float = 0.1) -> Batch:
    """Six datums. The first position of each is a prompt's: weight 0, advantage 0, and logprob 0 of the sampler.

    Args:
        sampler_gap: standard deviation of the difference between model and sampler, in nats.
    """
    random = np.random.default_rng(3)

    def negative(length: int) -> Any:
        return -0.5 - np.abs(random.normal(size=length))

    def on_answer(values: Any, length: int) -> Any:
        return np.where(np.arange(length) == 0, 0.0, values)

    sampled = [negative(length) for length in LENGTHS]
    return batch(
        [np.minimum(own + sampler_gap * random.normal(size=len(own)), -0.01) for own in sampled],
        logprobs=[on_answer(own, len(own)) for own in sampled],
        reference_logprobs=[negative(length) for length in LENGTHS],
        advantages=[on_answer(1.5 - index, length) for index, length in enumerate(LENGTHS)],
        weights=[on_answer(1.0, length) for length in LENGTHS],
    )


def texts() -> Batch:
    """The same without advantages, and without the sampler's logprobs."""
    return without(answers(), "advantages", "logprobs")


def pairs(*, labels: bool = False) -> Batch:
    """Three pairs; `labels` are 1 and -1."""
    given = without(answers(), "advantages", "logprobs")
    fields = fields_of(given)
    if labels:
        fields["label"] = [[1.0], [-1.0]] * 3
    return batch(given.logprobs, **fields)


def without(given: Batch, *names: str) -> Batch:
    return batch(given.logprobs, **{name: values for name, values in fields_of(given).items() if name not in names})


def fields_of(given: Batch) -> dict[str, Any]:
    names = [name for name in given.data[0].loss_fn_inputs if name != "target_tokens"]
    return {name: [datum.loss_fn_inputs[name].to_numpy() for datum in given.data] for name in names}


def packed(data: Any, name: str, like: torch.Tensor) -> torch.Tensor:
    return torch.cat([datum.loss_fn_inputs[name].to_torch() for datum in data]).to(like)
