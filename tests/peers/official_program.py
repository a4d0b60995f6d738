"""Runs the flows of an official SDK against a service, with the Python of its venv. Prints one JSON line per flow.

python official_program.py BASE_URL API_KEY BASE_MODEL GRADIENT_VIEW
"""

import itertools
import sys
from collections.abc import Callable

import tinker
import torch
from flows import FLOWS, report
from tinker import types

TOKENS = [104, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0)
STEP = types.AdamParams(learning_rate=1e-2)


class AbsentInSdkError(Exception):
    """This version of the SDK has no such call."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def datum(ids: list[int], **fields: torch.Tensor) -> types.Datum:
    inputs = {"target_tokens": torch.tensor(ids[1:]), **fields}
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={name: types.TensorData.from_torch(value) for name, value in inputs.items()},
    )


def weighted(ids: list[int]) -> types.Datum:
    return datum(ids, weights=torch.ones(len(ids) - 1))


def summed(batch: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = -sum(item.sum() for item in logprobs)
    return loss, {"tokens": float(sum(len(item) for item in logprobs))}


def signed(start: int, factor: float) -> Callable[..., tuple[torch.Tensor, dict[str, float]]]:
    def loss(batch: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        packed = torch.cat(logprobs)
        return factor * (packed * torch.cos(torch.arange(start, start + len(packed)))).sum(), {}

    return loss


class Flows:
    """The flows and the clients that they share. A failed flow drops the training client: it may be unusable."""

    def __init__(self, base_url: str, api_key: str, model: str, gradient_view: str) -> None:
        self.model = model
        self.gradient_view = gradient_view
        self.service = tinker.ServiceClient(base_url=base_url, api_key=api_key)
        self.rest = self.service.create_rest_client()
        self.data = [weighted(TOKENS), weighted(TOKENS[:5])]
        self.prompt = types.ModelInput.from_ints(TOKENS)
        self._training: tinker.TrainingClient | None = None
        self._sampler: tinker.SamplingClient | None = None
        self._state: str | None = None

    @property
    def training(self) -> tinker.TrainingClient:
        if self._training is None:
            created = self.service.create_lora_training_client(base_model=self.model, rank=8, seed=3)
            self._training = created.result() if hasattr(created, "result") else created
        return self._training

    @property
    def sampler(self) -> tinker.SamplingClient:
        if self._sampler is None:
            self._sampler = done(self.training.save_weights_and_get_sampling_client())
        return self._sampler

    @property
    def state(self) -> str:
        if self._state is None:
            self._state = self.training.save_state("state").result().path
        return self._state

    def drop(self) -> None:
        self._training = self._sampler = None

    def loss(self, training: tinker.TrainingClient | None = None) -> float:
        output = (training or self.training).forward(self.data, "cross_entropy").result()
        return sum(-float(item["logprobs"].to_torch().sum()) for item in output.loss_fn_outputs)

    def create(self) -> None:
        info = self.training.get_info()
        check(info.model_data.model_name == self.model, f"the model's name is {info.model_data.model_name!r}")

    def unknown_model(self) -> None:
        try:
            done(self.service.create_lora_training_client(base_model="no-such-model", rank=8))
        except (tinker.APIStatusError, tinker.RequestFailedError, ValueError) as error:
            check("no-such-model" in str(error), f"the error does not name the model: {error}")
        else:
            raise AssertionError("an unknown model was created")

    def forward(self) -> None:
        output = self.training.forward(self.data, "cross_entropy").result()
        lengths = [len(item["logprobs"].data) for item in output.loss_fn_outputs]
        check(lengths == [10, 4], f"logprobs of lengths {lengths}")
        again = self.training.forward(self.data, "cross_entropy").result()
        check(again.metrics == output.metrics, "a forward pass changed something")

    def forward_backward(self) -> None:
        output = self.training.forward_backward(self.data, "cross_entropy").result()
        check(abs(output.metrics["loss:sum"] - self.loss()) < 1e-3, f"loss:sum is {output.metrics}")

    def policy_losses(self) -> None:
        fields = {"logprobs": torch.full((10,), -5.0), "advantages": torch.linspace(-1, 1, 10)}
        for name in ("importance_sampling", "ppo", "cispo"):
            output = self.training.forward_backward([datum(TOKENS, **fields)], name).result()
            check(len(output.loss_fn_outputs[0]["logprobs"].data) == 10, f"{name}: wrong logprobs")

    def optim_step(self) -> None:
        before = self.loss()
        self.training.forward_backward(self.data, "cross_entropy").result()
        self.training.optim_step(STEP).result()
        check(self.loss() != before, "the step changed nothing")

    def custom(self) -> None:
        expected = self.loss()
        output = self.training.forward_backward_custom(self.data, summed).result()
        check(output.metrics["tokens"] == 14, f"metrics are {output.metrics}")
        self.training.optim_step(STEP).result()
        check(self.loss() < expected, "the custom loss did not fall")

    def with_regularizers(self) -> None:
        raise AbsentInSdkError("composed losses")

    def gradient(self) -> None:
        """Checks that the reported norms are proportional to the loss, and equal for one call and for two."""

        def norm(*calls: tuple[list[types.Datum], int], factor: float = 1.0) -> float:
            for data, start in calls:
                self.training.forward_backward_custom(data, signed(start, factor)).result()
            step = self.training.optim_step(types.AdamParams(learning_rate=0.0)).result()
            return step.metrics[self.gradient_view.partition(":")[2]]

        first = len(TOKENS) - 1
        norms = [norm((self.data, 0), factor=factor) for factor in (1.0, 2.0, -0.5)]
        parts = norm((self.data[:1], 0), (self.data[1:], first))
        expected = [norms[0], 2 * norms[0], 0.5 * norms[0], norms[0]]
        close = all(abs(a - b) < 1e-3 * b for a, b in zip([*norms, parts], expected, strict=True))
        check(close, f"norms {norms} of the loss times 1, 2, -0.5; {parts} in two calls")

    def many_datums(self) -> None:
        output = self.training.forward_backward([weighted(TOKENS)] * 300, "cross_entropy").result()
        check(len(output.loss_fn_outputs) == 300, f"{len(output.loss_fn_outputs)} outputs")
        first = -float(output.loss_fn_outputs[0]["logprobs"].to_torch().sum())
        check(abs(output.metrics["loss:sum"] - 300 * first) < 1e-2 * 300, f"loss:sum is {output.metrics}")
        self.training.optim_step(types.AdamParams(learning_rate=1e-6)).result()

    def lowers(self) -> None:
        self.drop()  # a fresh model, without momentum of earlier steps
        passes = []
        for _ in range(5):
            passes.append(self.training.forward_backward(self.data, "cross_entropy"))
            self.training.optim_step(types.AdamParams(learning_rate=1e-3))
        losses = [item.result().metrics["loss:sum"] for item in passes]
        check(all(later < earlier for earlier, later in itertools.pairwise(losses)), f"losses {losses}")

    def save_state(self) -> None:
        check(self.state.startswith("tinker://"), f"the path is {self.state!r}")

    def from_state(self) -> None:
        expected = self.loss()
        path = self.training.save_state("plain").result().path
        again = done(self.service.create_training_client_from_state(path))
        check(abs(self.loss(again) - expected) < 1e-4, "the loss differs after loading")

    def with_optimizer(self) -> None:
        path = self.training.save_state("optimizer").result().path
        again = done(self.service.create_training_client_from_state_with_optimizer(path))
        losses = []
        for client in (self.training, again):
            client.forward_backward(self.data, "cross_entropy").result()
            client.optim_step(STEP).result()
            losses.append(self.loss(client))
        check(abs(losses[0] - losses[1]) < 1e-4, f"next losses {losses}")

    def get_sampler(self) -> None:
        check(self.sampler is not None, "no sampler")

    def sample(self) -> None:
        drawn = self.sampler.sample(self.prompt, num_samples=2, sampling_params=GREEDY).result()
        tokens = [sequence.tokens for sequence in drawn.sequences]
        check(len(tokens) == 2 and tokens[0] == tokens[1] and len(tokens[0]) > 0, f"drew {tokens}")

    def compute_logprobs(self) -> None:
        scored = self.sampler.compute_logprobs(self.prompt).result()
        output = self.training.forward([self.data[0]], "cross_entropy").result()
        expected = output.loss_fn_outputs[0]["logprobs"].to_torch()
        close = scored[0] is None and torch.allclose(torch.tensor(scored[1:]), expected, atol=1e-3)
        check(close, f"scores {scored} against {expected.tolist()}")

    def topk(self) -> None:
        drawn = self.sampler.sample(
            self.prompt,
            num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=3,
        ).result()
        counts = [row and len(row) for row in drawn.topk_prompt_logprobs]
        check(counts == [None] + [3] * 10, f"{counts} tokens per position")

    def concurrent(self) -> None:
        samplers = [done(self.training.save_weights_and_get_sampling_client()) for _ in range(3)]
        futures = [client.sample(self.prompt, 1, GREEDY) for client in samplers for _ in range(8)]
        drawn = {tuple(future.result().sequences[0].tokens) for future in futures}
        check(len(drawn) == 1, f"greedy samples differ: {drawn}")

    def by_path(self) -> None:
        path = self.training.save_weights_for_sampler("sampler").result().path
        sampler = done(self.service.create_sampling_client(model_path=path))
        check(len(sampler.sample(self.prompt, 1, GREEDY).result().sequences[0].tokens) > 0, "drew nothing")

    def from_base(self) -> None:
        sampler = done(self.service.create_sampling_client(base_model=self.model))
        check(len(sampler.sample(self.prompt, 1, GREEDY).result().sequences[0].tokens) > 0, "drew nothing")

    def runs(self) -> None:
        runs = self.rest.list_training_runs().result().training_runs
        check(self.run in {item.training_run_id for item in runs}, "the run is missing")

    @property
    def run(self) -> str:
        return self.state.split("/")[2]

    def checkpoints(self) -> None:
        listed = self.rest.list_checkpoints(self.run).result().checkpoints
        check(any(item.checkpoint_id.endswith("state") for item in listed), "the checkpoint is missing")

    def all_checkpoints(self) -> None:
        if not hasattr(self.rest, "list_user_checkpoints"):
            raise AbsentInSdkError("list_user_checkpoints")
        listed = self.rest.list_user_checkpoints().result().checkpoints
        check(self.state in {item.tinker_path for item in listed}, "the checkpoint is missing")

    def sessions(self) -> None:
        if not hasattr(self.rest, "list_sessions"):
            raise AbsentInSdkError("list_sessions")
        sessions = self.rest.list_sessions().result().sessions
        check(len(sessions) > 0, "no session")
        training_runs = [self.rest.get_session(item).result().training_run_ids for item in sessions]
        check(any(self.run in runs for runs in training_runs), "the session does not have the run")

    def info(self) -> None:
        if not hasattr(self.rest, "get_weights_info_by_tinker_path"):
            raise AbsentInSdkError("get_weights_info_by_tinker_path")
        info = self.rest.get_weights_info_by_tinker_path(self.state).result()
        check(info.lora_rank == 8 and info.base_model == self.model, f"{info}")

    def archive(self) -> None:
        if not hasattr(self.rest, "get_checkpoint_archive_url_from_tinker_path"):
            raise AbsentInSdkError("get_checkpoint_archive_url_from_tinker_path")
        path = self.training.save_weights_for_sampler("archive").result().path
        answer = self.rest.get_checkpoint_archive_url_from_tinker_path(path).result()
        check(bool(answer.url), "no URL")


def done(made: object) -> object:
    """Resolves a client: old versions return the client itself, new ones a future of it."""
    return made.result() if callable(getattr(made, "result", None)) else made


def run(flows: Flows) -> None:
    for flow, method in FLOWS.items():
        try:
            getattr(flows, method)()
        except AbsentInSdkError as error:
            report(flow, "absent", str(error))
        except Exception as error:  # noqa: BLE001  # any error of the SDK is the outcome
            report(flow, "fail", f"{type(error).__name__}: {error}"[:500])
            flows.drop()
        else:
            report(flow, "pass")


if __name__ == "__main__":
    run(Flows(*sys.argv[1:5]))
