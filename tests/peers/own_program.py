"""Runs the flows of this package's client against a service. Prints one JSON line per flow.

python -m tests.peers.own_program BASE_URL API_KEY BASE_MODEL GRADIENT_VIEW [--made-up-numbers] [--half-precision]
"""

import asyncio
import itertools
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import torch

from tests.peers.flows import FLOWS, report
from tests.peers.gradients import Gradients
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    AsyncTrainingClient,
    Datum,
    ModelInput,
    RegularizerSpec,
    RetryPolicy,
    SamplingParams,
    TinkexConfig,
    UnsupportedFeature,
)
from tinkex_py.client.sampling import AsyncSamplingClient
from tinkex_py.errors import APIStatusError, RequestFailed, TimeoutExceeded
from tinkex_py.regularizers import L2

TOKENS = [104, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
STEP = AdamParams(learning_rate=1e-2)
PATIENCE = 120.0


# What the error of an unsupported flow must name. Every server supports the other flows.
FEATURES = {
    "forward_backward_custom": "custom loss",
    "custom loss with regularizers": "custom loss",
    "gradient of a custom loss arrives as computed": "custom loss",
    "save_weights_and_get_sampling_client": "sampling",
    "sample": "sampling",
    "compute_logprobs": "sampling",
    "topk_prompt_logprobs": "(topk_prompt_logprobs|sampling[.])",
    "concurrent samplers": "sampling",
    "save_weights_for_sampler, sample by path": "(sampling|save_weights_for_sampler)",
    "sample from the base model": "sampling",
    "list training runs": "listing training runs",
    "list checkpoints of a run": "listing checkpoints",
    "list all checkpoints": "listing the checkpoints of all runs",
    "list sessions": "listing sessions",
    "checkpoint archive URL": "(checkpoints as archives|save_weights_for_sampler)",
}


class SilentServerError(Exception):
    """No response of the server says that it cannot do this."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def datum(ids: list[int], **inputs: object) -> Datum:
    return Datum(model_input=ModelInput.from_ints(ids[:-1]), loss_fn_inputs={"target_tokens": ids[1:], **inputs})


def weighted(ids: list[int]) -> Datum:
    return datum(ids, weights=[1.0] * (len(ids) - 1))


def nll(data: list[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.sum()


class Flows:
    """The flows and the clients that they share. A failed flow drops the clients."""

    def __init__(
        self, service: AsyncServiceClient, model: str, gradient_view: str, *, made_up: bool, tolerance: float
    ) -> None:
        self.service = service
        self.model = model
        self.gradient_view = gradient_view
        self.made_up = made_up
        self.tolerance = tolerance
        self.rest = service.create_rest_client()
        self.data = [weighted(TOKENS), weighted(TOKENS[:5])]
        self.prompt = ModelInput.from_ints(TOKENS)
        self._training: AsyncTrainingClient | None = None
        self._sampler: AsyncSamplingClient | None = None
        self._state: str | None = None

    async def training(self) -> AsyncTrainingClient:
        if self._training is None:
            self._training = await self.service.create_lora_training_client(self.model, rank=8, seed=3)
        return self._training

    async def sampler(self) -> AsyncSamplingClient:
        if self._sampler is None:
            self._sampler = await (await self.training()).save_weights_and_get_sampling_client()
        return self._sampler

    async def state(self) -> str:
        if self._state is None:
            self._state = (await (await self.training()).save_state("state")).path
        return self._state

    def drop(self) -> None:
        self._training = self._sampler = None

    def number(self, holds: bool, what: str) -> None:
        if not holds and self.made_up:
            raise SilentServerError("this server makes up its numbers")
        check(holds, what)

    async def loss(self, training: AsyncTrainingClient | None = None) -> float:
        output = await (training or await self.training()).forward(self.data)
        return sum(-float(item["logprobs"].to_torch().sum()) for item in output.loss_fn_outputs)

    async def create(self) -> None:
        info = await (await self.training()).get_info()
        check(info.model_data.model_name == self.model, f"the model's name is {info.model_data.model_name!r}")

    async def unknown_model(self) -> None:
        try:
            await self.service.create_lora_training_client("no-such-model", rank=8)
        except (APIStatusError, RequestFailed, UnsupportedFeature) as error:
            check("no-such-model" in str(error), f"the error does not name the model: {error}")
        except TimeoutExceeded:
            raise SilentServerError("this server does not respond to a request for an unknown model") from None
        else:
            raise AssertionError("an unknown model was created")

    async def forward(self) -> None:
        output = await (await self.training()).forward(self.data)
        lengths = [len(item["logprobs"].data) for item in output.loss_fn_outputs]
        check(lengths == [10, 4], f"logprobs of lengths {lengths}")
        before = await self.loss()
        self.number(before == await self.loss(), "a forward pass changed something")

    async def forward_backward(self) -> None:
        output = await (await self.training()).forward_backward(self.data)
        given = sum(-float(item["logprobs"].to_torch().sum()) for item in output.loss_fn_outputs)
        self.number(abs(given - await self.loss()) < self.tolerance, "forward and forward_backward differ")

    async def policy_losses(self) -> None:
        inputs = {"logprobs": [-5.0] * 10, "advantages": torch.linspace(-1, 1, 10)}
        for name in ("importance_sampling", "ppo", "cispo"):
            output = await (await self.training()).forward_backward([datum(TOKENS, **inputs)], name)
            check(len(output.loss_fn_outputs[0]["logprobs"].data) == 10, f"{name}: wrong logprobs")

    async def optim_step(self) -> None:
        training, before = await self.training(), await self.loss()
        await training.forward_backward(self.data)
        await training.optim_step(STEP)
        self.number(await self.loss() != before, "the step changed nothing")

    async def custom(self) -> None:
        training, before = await self.training(), await self.loss()
        output = await training.forward_backward_custom(self.data, nll)
        self.number(abs(output.loss_total - before) < self.tolerance, f"loss {output.loss_total}, expected {before}")
        await training.optim_step(STEP)
        self.number(await self.loss() < before, "the custom loss did not fall")

    async def with_regularizers(self) -> None:
        training = await self.training()
        terms = [RegularizerSpec(fn=L2(), weight=0.01, name="l2")]
        totals = []
        for _ in range(2):
            output = await training.forward_backward_custom(
                self.data, nll, regularizers=terms, track_grad_norms=True, timeout=60.0
            )
            check(output.regularizers["l2"].grad_norm is not None, "no norm")
            totals.append(output.loss_total)
            await training.optim_step(AdamParams(learning_rate=1e-3))
        self.number(totals[1] < totals[0], f"totals {totals}")

    async def gradient(self) -> None:
        gradients = Gradients(self.service, await self.state(), self.gradient_view)
        problems = await gradients.problems()
        check(not problems, "; ".join(problems))

    async def many_datums(self) -> None:
        training = await self.training()
        output = await training.forward_backward([weighted(TOKENS)] * 300)
        check(len(output.loss_fn_outputs) == 300, f"{len(output.loss_fn_outputs)} outputs")
        await training.optim_step(AdamParams(learning_rate=1e-6))

    async def lowers(self) -> None:
        self.drop()  # a fresh model, without momentum of earlier steps
        training = await self.training()
        losses = []
        for _ in range(4):
            losses.append(await self.loss())
            await asyncio.gather(
                training.forward_backward(self.data), training.optim_step(AdamParams(learning_rate=1e-3))
            )
        self.number(all(later < earlier for earlier, later in itertools.pairwise(losses)), f"losses {losses}")

    async def save_state(self) -> None:
        check((await self.state()).startswith("tinker://"), f"the path is {await self.state()!r}")

    async def from_state(self) -> None:
        training, expected = await self.training(), await self.loss()
        path = (await training.save_state("plain")).path
        again = await self.service.create_training_client_from_state(path)
        loaded = await self.loss(again)
        self.number(abs(loaded - expected) < self.tolerance, f"loss {loaded} after loading, {expected} before")

    async def with_optimizer(self) -> None:
        training = await self.training()
        path = (await training.save_state("optimizer")).path
        again = await self.service.create_training_client_from_state(path, with_optimizer=True)
        losses = []
        for client in (training, again):
            await client.forward_backward(self.data)
            await client.optim_step(STEP)
            losses.append(await self.loss(client))
        self.number(abs(losses[0] - losses[1]) < self.tolerance, f"next losses {losses}")

    async def get_sampler(self) -> None:
        await self.sampler()

    async def sample(self) -> None:
        sampler = await self.sampler()
        greedy = [await sampler.sample(self.prompt, sampling_params=GREEDY) for _ in range(2)]
        tokens = [list(response.sequences[0].tokens) for response in greedy]
        check(all(tokens), f"drew {tokens}")
        self.number(tokens[0] == tokens[1], f"greedy samples differ: {tokens}")
        drawn = await sampler.sample(self.prompt, num_samples=2, sampling_params=SamplingParams(max_tokens=6))
        check(len(drawn.sequences) == 2, f"{len(drawn.sequences)} sequences")

    async def compute_logprobs(self) -> None:
        scored = await (await self.sampler()).compute_logprobs(self.prompt)
        self.number(len(scored) == len(TOKENS) and scored[0] is None, f"scores {scored}")
        output = await (await self.training()).forward([self.data[0]])
        expected = output.loss_fn_outputs[0]["logprobs"].to_torch()
        close = torch.allclose(torch.tensor(scored[1:]), expected, atol=self.tolerance)
        self.number(close, f"scores {scored} against {expected.tolist()}")

    async def topk(self) -> None:
        drawn = await (await self.sampler()).sample(
            self.prompt,
            sampling_params=SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=3,
        )
        counts = [row and len(row) for row in drawn.topk_prompt_logprobs or []]
        self.number(counts == [None] + [3] * 10, f"{counts} tokens per position")

    async def concurrent(self) -> None:
        training = await self.training()
        samplers = [await training.save_weights_and_get_sampling_client() for _ in range(3)]
        requests = [client.sample(self.prompt, sampling_params=GREEDY) for client in samplers for _ in range(4)]
        drawn = {tuple(response.sequences[0].tokens) for response in await asyncio.gather(*requests)}
        self.number(len(drawn) == 1, f"greedy samples differ: {drawn}")

    async def by_path(self) -> None:
        path = (await (await self.training()).save_weights_for_sampler("sampler")).path
        sampler = await self.service.create_sampling_client(model_path=path)
        drawn = await sampler.sample(self.prompt, sampling_params=GREEDY)
        check(len(drawn.sequences[0].tokens) > 0, "drew nothing")

    async def from_base(self) -> None:
        sampler = await self.service.create_sampling_client(base_model=self.model)
        drawn = await sampler.sample(self.prompt, sampling_params=GREEDY)
        check(len(drawn.sequences[0].tokens) > 0, "drew nothing")

    async def run(self) -> str:
        return (await self.state()).split("/")[2]

    async def runs(self) -> None:
        run = await self.run()
        check(run in [item.training_run_id async for item in self.rest.training_runs()], "the run is missing")

    async def checkpoints(self) -> None:
        listed = [item.checkpoint_id async for item in self.rest.checkpoints(await self.run())]
        check(any(name.endswith("state") for name in listed), f"the checkpoint is missing: {listed}")

    async def all_checkpoints(self) -> None:
        path = await self.state()
        listed = [item.tinker_path async for item in self.rest.checkpoints()]
        check(path in listed, f"the checkpoint is missing: {listed}")

    async def sessions(self) -> None:
        sessions = [item async for item in self.rest.sessions()]
        check(len(sessions) > 0, "no session")

    async def info(self) -> None:
        info = await self.rest.get_weights_info(await self.state())
        check(info.base_model == self.model and info.lora_rank in (8, None), f"{info}")

    async def archive(self) -> None:
        path = (await (await self.training()).save_weights_for_sampler("archive")).path
        check(bool((await self.rest.get_archive_url(path)).url), "no URL")


async def attempt(flow: str, step: Callable[[], Awaitable[None]], host: str) -> bool:
    try:
        async with asyncio.timeout(PATIENCE):
            await step()
    except UnsupportedFeature as error:
        names_both = flow in FEATURES and re.match(
            rf"{re.escape(host)} does not support .*{FEATURES[flow]}", str(error)
        )
        report(flow, "unsupported" if names_both else "fail", str(error)[:500])
    except SilentServerError as error:
        report(flow, "silent", str(error))
    except Exception as error:  # noqa: BLE001  # any error of the client is the outcome
        report(flow, "fail", f"{type(error).__name__}: {error}"[:500])
        return False
    else:
        report(flow, "pass")
    return True


@asynccontextmanager
async def opened(base_url: str, api_key: str) -> AsyncIterator[AsyncServiceClient]:
    retry = RetryPolicy(deadline=60.0, max_attempts=3)
    async with AsyncServiceClient(TinkexConfig(base_url=base_url, api_key=api_key, retry=retry)) as service:
        yield service


async def main(base_url: str, api_key: str, model: str, gradient_view: str, *options: str) -> None:
    async with opened(base_url, api_key) as service:
        tolerance = 0.2 if "--half-precision" in options else 1e-3
        made_up = "--made-up-numbers" in options
        flows = Flows(service, model, gradient_view, made_up=made_up, tolerance=tolerance)
        host = base_url.removeprefix("http://")
        for flow, method in FLOWS.items():
            if not await attempt(flow, getattr(flows, method), host):
                flows.drop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
