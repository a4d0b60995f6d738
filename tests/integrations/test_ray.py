"""Terms on Ray: a local Ray of two nodes, of which one is killed. `make ray` runs these; without Ray most skip."""

import asyncio
import gc
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.docs.test_docs_run import ON_RAY, blocks_of, run_block
from tests.integrations import ray_terms as terms
from tests.losses.support import datum, nll
from tinkex_py import (
    AsyncServiceClient,
    ConfigError,
    InPlaceMutation,
    InvalidData,
    InvalidSpec,
    MissingExtra,
    Pipeline,
    RegularizerError,
    RegularizerSpec,
    RegularizerTimeout,
    per_datum,
    sum_over_datums,
)
from tinkex_py.integrations import ray as integration
from tinkex_py.integrations.ray import RayTerm
from tinkex_py.lint import lint

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: make ray")
ROOT = Path(__file__).parents[2]
DATA = [datum(2), datum(3), datum(4), datum(1)]
LOGPROBS = torch.tensor([-0.5, -1.2, -0.8, -2.1, -0.3, -0.7, -1.9, -0.1, -0.4, -3.0])
PATIENCE = 120.0  # seconds; a new Ray worker imports torch first
pytestmark = pytest.mark.timeout(2 * PATIENCE)
# Shorter than a lost node needs by default, which is 20 s.
HEALTH = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A local Ray whose head does no work, so that all work is on one other node, which can be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.worker = self.cluster.add_node(num_cpus=4)

    def lose_one(self) -> None:
        """Kills the node with all its processes, and adds another one."""
        self.cluster.remove_node(self.worker, allow_graceful=False)
        self.worker = self.cluster.add_node(num_cpus=4)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("PYTHONPATH", str(ROOT))
        import ray

        made = Nodes()
        ray.init(address=made.cluster.address, logging_level="error", log_to_driver=False)
        yield made
        ray.shutdown()
        made.cluster.shutdown()


@pytest.fixture(autouse=True)
def clean_process() -> None:
    """Replaces the check for descriptors: the connections of Ray belong to the module."""


def ray_spec(fn: Any, name: str = "own", **settings: Any) -> RegularizerSpec:
    return RegularizerSpec(fn=fn, weight=0.5, name=name, **settings)


async def output_of(*specs: RegularizerSpec) -> Any:
    pipeline = Pipeline(nll, specs, track_grad_norms=True, timeout=PATIENCE)
    logprobs = LOGPROBS.clone().requires_grad_()
    (await pipeline.loss(DATA, logprobs)).backward()
    return await pipeline.compute(DATA, LOGPROBS), logprobs.grad


def noted(folder: Path) -> list[int]:
    """The processes that left their id in a folder."""
    return [int(file.name) for file in folder.iterdir()]


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what another process does."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # other processes set no asyncio.Event
            await asyncio.sleep(0.02)


def doubled(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return 2 * logprobs.square().sum()


def weighted(logprobs: torch.Tensor, target_tokens: torch.Tensor) -> torch.Tensor:
    return (logprobs * (target_tokens + 1)).sum()


LAMBDA = lambda data, logprobs: logprobs.exp().mean()  # noqa: E731


class NoTerm:
    pass


class Awaits:
    async def compute(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.sum()


async def awaits(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.sum()


@pytest.mark.parametrize(
    ("fn", "settings", "message"),
    [
        (3, {}, "fn must be a sync function, an object with a sync compute, or a class, got 3"),
        (awaits, {}, "fn must be a sync function"),
        (NoTerm, {}, "fn is the class NoTerm, which needs a sync compute or __call__"),
        (Awaits, {}, "fn is the class Awaits, which needs a sync compute"),
        (terms.Model, {}, "init does not fit the class Model: missing a required argument: 'folder'"),
        (terms.Model, {"init": {"folder": "x", "size": 3}}, "init does not fit the class Model: .*'size'"),
        (terms.squares, {"init": {"folder": "x"}}, "init={'folder': 'x'} is for a class"),
        (terms.squares, {"replicas": 2}, "replicas=2 of a function need shard='datums'"),
        (terms.squares, {"replicas": 0}, "replicas must be an int >= 1, got 0"),
        (terms.squares, {"max_retries": -1}, "max_retries must be an int >= 0, got -1"),
        (terms.squares, {"num_gpus": -0.5}, "num_gpus must be a number >= 0, got -0.5"),
        (terms.squares, {"num_gpus": 1.5}, "num_gpus must be at most 1 or a whole number, got 1.5"),
        (terms.squares, {"shard": "tokens"}, "shard must be one of 'datums', got 'tokens'"),
    ],
)
def test_wrong_arguments(fn: Any, settings: dict[str, Any], message: str):
    with pytest.raises(InvalidSpec, match=message):
        RayTerm(fn, **settings)


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray():
    with pytest.raises(MissingExtra, match=r"pip install 'tinkex-py\[ray\]'"):
        RayTerm(terms.squares)


@needs_ray
@pytest.mark.asyncio
async def test_without_a_connection():
    with pytest.raises(RegularizerError, match=r"not connected with Ray: call ray.init") as caught:
        await Pipeline(nll, [ray_spec(RayTerm(terms.squares))]).compute(DATA, LOGPROBS)
    assert isinstance(caught.value.__cause__, ConfigError)


@needs_ray
@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("term", "usual", "options"),
    [
        (lambda: RayTerm(terms.entropy), terms.entropy, {"scale": 0.3}),
        (lambda: RayTerm(doubled), doubled, {}),
        (
            lambda: RayTerm(lambda data, logprobs: logprobs.exp().mean()),
            lambda data, logprobs: logprobs.exp().mean(),
            {},
        ),
        (lambda: per_datum(RayTerm(terms.parts)), per_datum(terms.parts), {}),
        (lambda: RayTerm(per_datum(terms.parts)), per_datum(terms.parts), {}),
        (lambda: RayTerm(sum_over_datums(weighted)), sum_over_datums(weighted), {}),
        (lambda: RayTerm(terms.constant), terms.constant, {}),
        (lambda: RayTerm(terms.scored), terms.scored, {}),
    ],
    ids=["module", "by value", "lambda", "per datum", "per datum inside", "sum over datums", "constant", "scored"],
)
async def test_equals_a_thread_to_the_last_bit(nodes: Nodes, term: Any, usual: Any, options: dict[str, Any]):
    own, gradient = await output_of(ray_spec(term(), options=options))
    expected, expected_gradient = await output_of(ray_spec(usual, options=options))
    assert torch.equal(gradient, expected_gradient)
    one, other = own.regularizers["own"], expected.regularizers["own"]
    if "pid" in other.custom_metrics:
        assert one.custom_metrics.pop("pid") != other.custom_metrics.pop("pid") == os.getpid()
    assert one == other


@needs_ray
@pytest.mark.asyncio
@pytest.mark.parametrize("wrap", [lambda term: term, per_datum], ids=["packed", "per datum"])
async def test_shards_add_up(nodes: Nodes, wrap: Any, tmp_path: Path):
    fn = terms.parts if wrap is per_datum else terms.squares
    own, gradient = await output_of(ray_spec(wrap(RayTerm(fn, shard="datums", replicas=3))))
    expected, expected_gradient = await output_of(ray_spec(wrap(fn)))
    assert torch.equal(gradient, expected_gradient)
    one, other = own.regularizers["own"], expected.regularizers["own"]
    assert one.value == pytest.approx(other.value, rel=1e-6)
    one.custom_metrics.pop("pid", None)
    other.custom_metrics.pop("pid", None)
    assert one.custom_metrics == pytest.approx(other.custom_metrics, rel=1e-6)


@needs_ray
@pytest.mark.asyncio
async def test_shards_run_on_actors_that_load_once(nodes: Nodes, tmp_path: Path):
    term = RayTerm(terms.Model, init={"folder": str(tmp_path), "factor": 2.0}, replicas=2, shard="datums", num_cpus=1)
    await term.ready()
    loaded = noted(tmp_path)
    assert len(loaded) == 2
    for _ in range(3):
        own, gradient = await output_of(ray_spec(term))
    _, expected = await output_of(ray_spec(doubled))
    assert torch.equal(gradient, expected)
    assert own.regularizers["own"].custom_metrics["pid"] == sum(loaded)
    assert noted(tmp_path) == loaded


@needs_ray
@pytest.mark.asyncio
@pytest.mark.parametrize("parallel", [True, False])
async def test_a_step_is_stored_once(nodes: Nodes, monkeypatch: pytest.MonkeyPatch, parallel: bool):
    import ray

    stored: list[str] = []
    put = ray.put

    def counted(value: Any) -> Any:
        reference = put(value)
        stored.append(reference.hex())
        return reference

    monkeypatch.setattr(ray, "put", counted)
    kinds = [
        RayTerm(terms.squares),
        RayTerm(doubled),
        per_datum(RayTerm(terms.parts)),
        RayTerm(terms.squares, shard="datums", replicas=2),
    ]
    specs = [ray_spec(term, f"term {number}") for number, term in enumerate(kinds)]
    pipeline = Pipeline(nll, specs, parallel=parallel, timeout=PATIENCE)
    for step in range(1, 4):
        await pipeline.compute(DATA, LOGPROBS * step)
        assert len(stored) == step
    gc.collect()
    assert list(integration._STEPS._stored.values()) == []  # the objects went with their steps


@needs_ray
@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fn", "kind", "message"),
    [
        (terms.names, RegularizerError, "failed with LookupError: .*tinkex.regularizer.own"),
        (terms.writes, InPlaceMutation, "'own' modified the shared logprobs in place"),
        (terms.returns_text, RegularizerError, "term 'own' must return the loss as a tensor, got str"),
        (terms.Broken, RegularizerError, "could not make the object: .*the weights are not there"),
    ],
)
async def test_a_failure_is_that_of_a_thread_and_the_call_has_the_name(nodes: Nodes, fn: Any, kind: type, message: str):
    with pytest.raises(kind, match=message):
        await output_of(ray_spec(RayTerm(fn)))


@needs_ray
@pytest.mark.asyncio
@pytest.mark.parametrize("as_actor", [False, True])
@pytest.mark.parametrize("ends", ["timeout", "cancellation", "failure of another term"])
async def test_what_ends_a_term_ends_its_work(nodes: Nodes, as_actor: bool, ends: str, tmp_path: Path):
    (tmp_path / "loads").mkdir()
    (napping := tmp_path / "naps").mkdir()
    term, options = RayTerm(terms.naps), {"folder": str(napping)}
    if as_actor:
        term, options = RayTerm(terms.Model, init={"folder": str(tmp_path / "loads")}), {"nap_in": str(napping)}
    await output_of(ray_spec(RayTerm(terms.squares)))  # a worker that has imported torch is left
    await term.ready()
    own = ray_spec(term, options=options, timeout=8.0 if ends == "timeout" else PATIENCE)
    failed = asyncio.Event()

    async def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await failed.wait()
        raise ValueError("another one")

    others = [ray_spec(fails, "other")] if ends == "failure of another term" else []
    step = asyncio.ensure_future(output_of(own, *others))
    await until(lambda: bool(noted(napping)))
    (pid,) = noted(napping)
    if ends == "timeout":
        with pytest.raises(RegularizerTimeout):
            await step
    elif ends == "cancellation":
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
    else:
        failed.set()
        with pytest.raises(RegularizerError, match="another one"):
            await step
    await until(lambda: is_gone(pid))
    assert noted(napping) == [pid]  # it was not repeated
    output, _ = await output_of(ray_spec(term, options=options, timeout=PATIENCE))
    assert output.regularizers["own"].value == pytest.approx(float(LOGPROBS.square().sum()), rel=1e-6)


@needs_ray
@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray 2.50 keeps logs of nodes open
@pytest.mark.parametrize("as_actor", [False, True])
@pytest.mark.parametrize("max_retries", [0, 2])
async def test_a_node_is_lost_in_the_middle_of_a_step(nodes: Nodes, as_actor: bool, max_retries: int, tmp_path: Path):
    (tmp_path / "loads").mkdir()
    (napping := tmp_path / "naps").mkdir()
    term, options = RayTerm(terms.naps, max_retries=max_retries), {"folder": str(napping)}
    if as_actor:
        term = RayTerm(terms.Model, init={"folder": str(tmp_path / "loads")}, max_retries=max_retries)
        options = {"nap_in": str(napping)}
    own = ray_spec(term, options=options, timeout=PATIENCE)
    expected = pytest.approx(float(LOGPROBS.square().sum()), rel=1e-6)
    async with AsyncServiceClient.local(model="tiny", device="cpu") as service:
        training = await service.create_lora_training_client("tiny", rank=1)
        first = asyncio.ensure_future(training.forward_backward_custom(DATA, nll, regularizers=[own]))
        await until(lambda: bool(noted(napping)))
        nodes.lose_one()
        if max_retries:
            assert (await first).regularizers["own"].value > 0
        else:
            with pytest.raises(RegularizerError, match=r"'own' was lost in Ray .*increase max_retries"):
                await first
        again = await training.forward_backward_custom(DATA, nll, regularizers=[own])
        assert again.regularizers["own"].value > 0
    output, _ = await output_of(own)
    assert output.regularizers["own"].value == expected


@needs_ray
@pytest.mark.asyncio
async def test_the_linter_finds_what_cannot_be_sharded(nodes: Nodes):
    sharded = {"shard": "datums", "replicas": 4}
    specs = [ray_spec(RayTerm(terms.mean, **sharded)), ray_spec(RayTerm(doubled, **sharded), "ok")]
    findings = await lint(Pipeline(nll, specs, timeout=PATIENCE), DATA, accumulate=1)
    assert [(found.term, found.rule, found.severity) for found in findings] == [("own", "accumulation", "error")]
    assert re.search("sharded over 4 replicas", str(findings[0]))


@needs_ray
@pytest.mark.asyncio
async def test_the_page_runs(nodes: Nodes):
    page = ROOT / "docs" / "guides" / "beyond_one_process.md"
    (block,) = [block for block in blocks_of(page) if block.info == ON_RAY]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    await run_block(page, block, namespace)
    regularizers = namespace["output"].regularizers
    # by hand: -(1/e + 1/e^2); the sample variance of -1 and -2
    assert regularizers["RewardModel"].value == pytest.approx(-0.5032147, rel=1e-6)
    assert regularizers["dispersion"].value == pytest.approx(0.5, rel=1e-6)


@needs_ray
@pytest.mark.asyncio
async def test_data_that_cannot_be_sharded(nodes: Nodes):
    with pytest.raises(RegularizerError, match="shard='datums' needs datums") as caught:
        await Pipeline(nll, [ray_spec(RayTerm(terms.squares, shard="datums", replicas=2))]).compute([], LOGPROBS)
    assert isinstance(caught.value.__cause__, InvalidData)
