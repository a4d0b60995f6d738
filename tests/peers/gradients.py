"""Checks that the gradient of a custom loss arrives at a service as computed: size, sign and sum over calls.

Services report little about a gradient, so there are three ways to measure it:

- `metric:NAME`: the service reports its norm with an optimizer step.
- `folder:PATH`: the service stores it in files below this folder (hatchery).
- `step`: the change of the loss by a step of Adam with an eps so large that the step is linear in the gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tinkex_py import AdamParams, AsyncServiceClient, AsyncTrainingClient, Datum, ModelInput

LINEAR = AdamParams(learning_rate=0.1, eps=1e4)
# hatchery accepts no eps above 1.
SMALL = AdamParams(learning_rate=1e-3, eps=1.0)
LENGTHS = (3, 9, 4, 6)
FACTORS = (2.0, -0.5)
TOLERANCES = {"metric": 1e-3, "folder": 0.02, "step": 0.05}

Loss = Callable[[Sequence[Datum], torch.Tensor], torch.Tensor]


def make_data() -> list[Datum]:
    """Random tokens."""
    random = np.random.default_rng(7)
    return [
        Datum(
            model_input=ModelInput.from_ints(random.integers(0, 256, length)),
            loss_fn_inputs={"target_tokens": random.integers(0, 256, length), "weights": np.ones(length, np.float32)},
        )
        for length in LENGTHS
    ]


def signed(start: int = 0, factor: float = 1.0) -> Loss:
    """Returns a loss over positions from `start` that reveals a division by the sum of weights.

    The negated gradient has both signs and a sum well above 1, because some services divide by max(sum, 1).
    """

    def loss(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        pattern = torch.cos(torch.arange(start, start + len(logprobs))) - 0.7
        return factor * (logprobs * pattern).sum()

    return loss


@dataclass(frozen=True)
class Measured:
    """The measured gradient of one step.

    Attributes:
        size: proportional to the norm of the gradient.
        change: change of the loss by a step against the gradient.
    """

    size: float
    change: float


@dataclass(frozen=True)
class Gradients:
    """Measurements on models that all start from one checkpoint.

    Attributes:
        service: the service client.
        start: path of the checkpoint.
        view: how a gradient is measured; see the module.
    """

    service: AsyncServiceClient
    start: str
    view: str

    @property
    def kind(self) -> str:
        return self.view.partition(":")[0]

    async def measure(self, *calls: tuple[Sequence[Datum], Loss]) -> Measured:
        """Sends the calls of one step to a fresh model and measures their accumulated gradient."""
        training = await self.service.create_training_client_from_state(self.start)
        everything = make_data()
        before = await loss_of(training, everything)
        count = sum(len(data) for data, _ in calls)
        for data, loss in calls:
            await training.forward_backward_custom(data, loss, sequences_per_step=count)
        kind, _, where = self.view.partition(":")
        stored = norm_in_files(Path(where), training.model_id) if kind == "folder" else 0.0
        params = LINEAR if kind == "step" else SMALL
        step = await training.optim_step(params, grad_norm=kind == "metric")
        change = await loss_of(training, everything) - before
        sizes = {"metric": step.grad_norm or 0.0, "folder": stored, "step": -change}
        return Measured(sizes[kind], change)

    async def problems(self) -> list[str]:
        """Returns what does not hold; empty if the gradient arrives as computed."""
        data = make_data()
        whole = await self.measure((data, signed()))
        found = (
            []
            if whole.size > 0 and whole.change < 0
            else [f"a step against the gradient changes the loss by {whole.change:+g}"]
        )
        for factor in FACTORS:
            scaled = await self.measure((data, signed(factor=factor)))
            expected = factor if self.kind == "step" else abs(factor)
            if not self._close(scaled.size, expected * whole.size):
                found.append(f"the loss times {factor} has a gradient of {scaled.size:g}, times 1 of {whole.size:g}")
            if not scaled.change * factor < 0:
                found.append(f"a step for the loss times {factor} changes it by {scaled.change:+g}")
        parts = await self.measure((data[:1], signed()), (data[1:], signed(start=LENGTHS[0])))
        if not self._close(parts.size, whole.size):
            found.append(f"two calls have a gradient of {parts.size:g}, one of {whole.size:g}")
        return found

    def _close(self, size: float, expected: float) -> bool:
        return abs(size - expected) <= TOLERANCES[self.kind] * abs(expected)


async def loss_of(training: AsyncTrainingClient, data: Sequence[Datum]) -> float:
    logprobs = (await training.forward(data)).packed["logprobs"].values.astype(np.float64)
    return float(signed()(data, torch.from_numpy(logprobs)))


def norm_in_files(folder: Path, model_id: str) -> float:
    """Returns the norm of the gradient that hatchery has accumulated for a model."""
    (file,) = folder.rglob(f"{model_id}/live_state/grad_accum.pt")
    gradients = torch.load(file, weights_only=True)
    return float(torch.cat([values.flatten() for values in gradients.values()]).norm())
