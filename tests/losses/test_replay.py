"""Records of single steps, and running them again."""

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from tests.losses.support import guide_logprobs, guide_specs, l1, nll, packed, spec
from tinkex_py import (
    Datum,
    MissingExtra,
    ModelInput,
    NonFiniteLoss,
    Pipeline,
    PipelineError,
    RegularizerError,
    RegularizerSpec,
    TensorData,
    packed_field,
    per_datum,
    split,
)
from tinkex_py.base_losses import NLL
from tinkex_py.cli import app
from tinkex_py.losses import replay
from tinkex_py.losses.recording import read_record
from tinkex_py.losses.schedules import Linear
from tinkex_py.regularizers import L1, L2, KLDivergence, SampledKL
from tinkex_py.types import EncodedTextChunk


def rich_data() -> list[Datum]:
    """Datums with chunks, dense and sparse inputs of both dtypes, and fields that not all of them have."""
    sparse = TensorData(
        data=[0.5, 2.0], dtype="float32", shape=(2, 3), sparse_crow_indices=[0, 1, 2], sparse_col_indices=[2, 0]
    )
    first = Datum(
        model_input=ModelInput(chunks=(EncodedTextChunk(tokens=[1, 2]), EncodedTextChunk(tokens=[3]))),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "reference_logprobs": [-1.0, -2.0, -0.5], "table": sparse},
    )
    second = Datum(
        model_input=ModelInput.from_ints([7, 8]),
        loss_fn_inputs={"target_tokens": [8, 9], "reference_logprobs": [-0.25, -3.0], "label": [1]},
    )
    return [first, second]


def rich_logprobs() -> Any:
    return packed([np.array([-0.5, -1.25, -2.0]), np.array([-0.75, -1.5])])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def distance(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return (packed_field(data, "reference_logprobs") - logprobs).pow(2).sum()


def reads_everything(data: Sequence[Datum], logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    first, second = data
    assert [chunk.length for chunk in first.model_input.chunks] == [2, 1]
    assert first.loss_fn_inputs["table"].is_sparse
    assert first.loss_fn_inputs["table"].tolist() == [[0.0, 0.0, 0.5], [2.0, 0.0, 0.0]]
    assert second.loss_fn_inputs["label"].tolist() == [1]
    assert second.loss_fn_inputs["label"].dtype == "int64"
    own, other = split(data, logprobs)
    return own.sum() * 2 + other.sum(), {"tokens": float(sum(datum.model_input.length for datum in data))}


def rich_pipeline(**options: Any) -> Pipeline:
    specs = [
        spec(distance, "distance", Linear(1.0, 0.0, 10)),
        spec(reads_everything, "all", 0.5, max_grad_norm=1.0),
        spec(per_datum(lambda data, parts: sum(part.pow(2).mean() for part in parts)), "per datum", 0.1),
        spec(l1, "off", enabled=False),
    ]
    return Pipeline(nll, specs, **options)


@pytest.mark.parametrize("combine", ["sum", "pcgrad"])
@pytest.mark.asyncio
async def test_a_replay_gives_the_same_output(tmp_path: Path, combine: Any):
    pipeline = rich_pipeline(track_grad_norms=True, combine=combine)
    loss = await pipeline.evaluate(rich_data(), rich_logprobs(), step=3, record=tmp_path / "step")
    again = await replay(tmp_path / "step", rich_pipeline(track_grad_norms=True, combine=combine))
    assert again == loss.output
    assert again.regularizers["distance"].weight == pytest.approx(0.7)
    record, tensors = read_record(tmp_path / "step")
    assert record.output == loss.output
    assert record.failure is None
    assert record.step == 3
    assert [term.name for term in record.regularizers] == ["distance", "all", "per datum"]
    assert record.regularizers[0].source == f"{__name__}:distance"
    assert record.regularizers[2].per_datum
    assert tensors["logprobs"].tolist() == [-0.5, -1.25, -2.0, -0.75, -1.5]


@pytest.mark.asyncio
async def test_a_tensor_given_directly_keeps_its_shape_and_dtype(tmp_path: Path):
    logprobs = torch.rand(2, 3, 4, dtype=torch.float64)
    pipeline = Pipeline(lambda data, values: values.pow(2)[1].sum(), [spec(l1, "l1", 0.5)])
    output = await pipeline.compute([], logprobs, record=str(tmp_path / "deep" / "er" / "step"))
    assert await replay(tmp_path / "deep" / "er" / "step", pipeline) == output


@pytest.mark.asyncio
async def test_a_failed_step_leaves_its_inputs_and_its_failure(tmp_path: Path):
    def odd(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return (logprobs + 0.5).log().sum()

    pipeline = Pipeline(nll, [spec(odd, "odd")])
    with pytest.raises(NonFiniteLoss):
        await pipeline.compute([], guide_logprobs(), record=tmp_path / "step")
    record, _ = read_record(tmp_path / "step")
    assert record.output is None
    assert record.failure is not None
    assert (record.failure.error, record.failure.term) == ("NonFiniteLoss", "odd")
    with pytest.raises(NonFiniteLoss, match="'odd'"):
        await replay(tmp_path / "step", pipeline)
    mended = Pipeline(nll, [spec(l1, "odd")])
    assert (await replay(tmp_path / "step", mended)).regularizers["odd"].value == pytest.approx(4.9, rel=1e-6)


@pytest.mark.asyncio
async def test_odd_logprobs_are_kept_to_the_bit(tmp_path: Path):
    odd = torch.tensor([-1.0, float("nan"), float("-inf"), -0.0, 1e-45])
    with pytest.raises(RegularizerError):
        await Pipeline(nll).compute([], odd, record=tmp_path / "step")
    _, tensors = read_record(tmp_path / "step")
    assert torch.equal(tensors["logprobs"].view(torch.int32), odd.view(torch.int32))


@pytest.mark.asyncio
async def test_the_inputs_are_there_before_the_first_term_runs(tmp_path: Path):
    seen: list[bool] = []

    def looks(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        seen.append((tmp_path / "step" / "tensors.safetensors").exists())
        return logprobs.sum()

    await Pipeline(looks).compute([], guide_logprobs(), record=tmp_path / "step")
    assert seen == [True]


@pytest.mark.asyncio
async def test_an_earlier_record_is_replaced_and_nothing_else_is_left(tmp_path: Path):
    pipeline = Pipeline(nll, guide_specs())
    for scale in (1.0, 2.0):
        await pipeline.compute([], guide_logprobs() * scale, record=tmp_path / "step")
    assert names_in(tmp_path) == ["step"]
    assert names_in(tmp_path / "step") == ["record.json", "tensors.safetensors"]
    _, tensors = read_record(tmp_path / "step")
    assert tensors["logprobs"][0] == -1.0


@pytest.mark.asyncio
async def test_what_is_no_record_is_never_overwritten(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    called: list[int] = []

    def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        called.append(1)
        return logprobs.sum()

    for path in (tmp_path / "mine", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PipelineError):
            await Pipeline(term).compute([], guide_logprobs(), record=path)
    assert not called
    assert (tmp_path / "mine" / "precious.txt").read_text() == "x"
    assert names_in(tmp_path) == ["file", "mine"]


@pytest.mark.asyncio
async def test_the_pipeline_must_have_the_same_regularizers(tmp_path: Path):
    await Pipeline(nll, guide_specs()).compute([], guide_logprobs(), record=tmp_path / "step")
    with pytest.raises(PipelineError, match="the same names in the same order"):
        await replay(tmp_path / "step", Pipeline(nll, guide_specs()[:2]))


@pytest.mark.asyncio
async def test_terms_that_are_not_this_packages_own_must_be_passed(tmp_path: Path):
    await Pipeline(nll, guide_specs()).compute([], guide_logprobs(), record=tmp_path / "step")
    with pytest.raises(PipelineError, match=r"'l1_sparsity' \(tests.losses.support:l1\).*pass the pipeline"):
        await replay(tmp_path / "step")


@pytest.mark.asyncio
async def test_nothing_foreign_is_imported_because_a_file_says_so(tmp_path: Path):
    await Pipeline(nll, [spec(l1, "l1")]).compute([], guide_logprobs(), record=tmp_path / "step")
    path = tmp_path / "step" / "record.json"
    plain = json.loads(path.read_text())
    for source in ("antigravity:geohash", "os:system", "tinkex_py.config:TinkexConfig", "tinkex_py.nowhere:X"):
        plain["base_loss"] = {"name": "base_loss", "source": source, "ready_made": {}}
        plain["regularizers"][0] |= {"source": source, "ready_made": {}}
        path.write_text(json.dumps(plain))
        with pytest.raises(PipelineError, match=source.partition(":")[0]):
            await replay(tmp_path / "step")
    assert "antigravity" not in sys.modules


DAMAGES: list[Callable[[Path], object]] = [
    lambda folder: (folder / "record.json").unlink(),
    lambda folder: (folder / "record.json").write_text("{"),
    lambda folder: (folder / "record.json").write_text('{"format": 2}'),
    lambda folder: (folder / "tensors.safetensors").unlink(),
    lambda folder: (folder / "tensors.safetensors").write_bytes(b"\xff" * 40),
    lambda folder: os.truncate(folder / "tensors.safetensors", 90),
    lambda folder: change(folder, lambda plain: plain["datums"][0].update(chunks=[900])),
    lambda folder: change(folder, lambda plain: plain["datums"][1]["fields"]["label"].update(stored=3)),
    lambda folder: change(folder, lambda plain: plain["datums"][1]["fields"]["label"].update(dtype="float32")),
    lambda folder: change(folder, lambda plain: plain["datums"][0]["fields"]["table"].update(shape=[])),
    lambda folder: change(folder, lambda plain: plain["datums"][0]["fields"]["table"].update(shape=[2])),
    lambda folder: change(folder, lambda plain: plain.update(logprob_shapes=[[3], [3]])),
    lambda folder: change(folder, lambda plain: plain.update(logprob_shapes=[[-3], [8]])),
]


@pytest.mark.asyncio
async def test_a_damaged_record_is_a_typed_error(tmp_path: Path):
    await rich_pipeline().evaluate(rich_data(), rich_logprobs(), record=tmp_path / "step")
    for number, damage in enumerate(DAMAGES):
        damaged = shutil.copytree(tmp_path / "step", tmp_path / str(number))
        damage(damaged)
        with pytest.raises(PipelineError):
            await replay(damaged, rich_pipeline())


def change(folder: Path, edit: Any) -> None:
    path = folder / "record.json"
    plain = json.loads(path.read_text())
    edit(plain)
    path.write_text(json.dumps(plain))


@pytest.mark.asyncio
async def test_there_is_no_record(tmp_path: Path):
    with pytest.raises(PipelineError, match="cannot read the record"):
        await replay(tmp_path / "none", Pipeline(nll))


@pytest.mark.asyncio
async def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtra, match=r"tinkex-py\[replay\]"):
        await Pipeline(nll).compute([], guide_logprobs(), record=tmp_path / "step")
    assert names_in(tmp_path) == []


@pytest.mark.asyncio
async def test_settings_that_are_no_json_are_described(tmp_path: Path):
    def term(data: Any, logprobs: torch.Tensor, *, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return (logprobs * table).sum() * scale

    table = torch.arange(5.0)
    pipeline = Pipeline(nll, [RegularizerSpec(fn=term, weight=1.0, name="t", options={"table": table, "scale": 2.0})])
    output = await pipeline.compute([], guide_logprobs(), record=tmp_path / "step")
    record, _ = read_record(tmp_path / "step")
    assert record.regularizers[0].options == {"table": repr(table), "scale": 2.0}
    assert await replay(tmp_path / "step", pipeline) == output


@pytest.mark.asyncio
async def test_ready_made_terms_are_rebuilt(tmp_path: Path):
    terms = [
        RegularizerSpec(fn=L2(center="reference_logprobs", reduction="token-mean"), weight=0.5),
        RegularizerSpec(fn=L1(), weight=0.25, options={"reduction": "token-mean"}),
    ]
    pipeline = Pipeline(NLL(reduction="token-mean"), terms, track_grad_norms=True)
    loss = await pipeline.evaluate(rich_data(), rich_logprobs(), record=tmp_path / "step")
    assert await replay(tmp_path / "step") == loss.output


@pytest.mark.asyncio
async def test_ready_made_terms_with_tensors_must_be_passed(tmp_path: Path):
    uniform = torch.full((5,), -1.5)
    specs = [
        RegularizerSpec(fn=SampledKL(reference=uniform), weight=0.5),
        RegularizerSpec(fn=KLDivergence(reference=uniform), weight=0.5, options={"reference": uniform * 2}),
    ]
    for number, one in enumerate(specs):
        pipeline = Pipeline(NLL(), [one])
        output = await pipeline.compute([], guide_logprobs(), record=tmp_path / str(number))
        assert await replay(tmp_path / str(number), pipeline) == output
        with pytest.raises(PipelineError, match="pass the pipeline"):
            await replay(tmp_path / str(number))


@pytest.mark.asyncio
async def test_only_its_owner_may_read_a_record(tmp_path: Path):
    await Pipeline(nll).compute([], guide_logprobs(), record=tmp_path / "step")
    assert (tmp_path / "step").stat().st_mode & 0o077 == 0


# The command line

MODULE = """
import torch
from tinkex_py import Pipeline, RegularizerSpec

def nll(data, logprobs):
    return -logprobs.mean()

def l1(data, logprobs):
    return logprobs.abs().sum()

pipeline = Pipeline(nll, [RegularizerSpec(fn=l1, weight=0.01, name="l1")], track_grad_norms=True)
broken = Pipeline(nll, [RegularizerSpec(fn=lambda data, p: (p + 0.5).log(), weight=0.01, name="l1")])

def make():
    return pipeline
"""


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["replay", *arguments])


@pytest.fixture
def recorded_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a module and a record."""
    (tmp_path / "replayed_here.py").write_text(MODULE)
    pipeline = Pipeline(nll, [spec(l1, "l1", 0.01)], track_grad_norms=True)
    asyncio.run(pipeline.compute([], guide_logprobs(), record=tmp_path / "step"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("replayed_here", None)


@pytest.mark.parametrize("reference", ["replayed_here:pipeline", "replayed_here:make"])
def test_the_command_shows_then_and_now(recorded_folder: Path, reference: str):
    shown = command("step", "--pipeline", reference)
    assert shown.exit_code == 0, shown.output
    assert "1.029" in shown.stdout  # 0.98 + 0.049
    assert "all numbers are equal" in shown.stdout
    plain = json.loads(command("step", "--pipeline", reference, "--json").stdout)
    assert plain["same"] is True
    assert plain["replayed"]["loss_total"] == plain["recorded"]["loss_total"] == pytest.approx(1.029, rel=1e-6)


def test_the_command_fails_as_the_step_does(recorded_folder: Path):
    broken = command("step", "--pipeline", "replayed_here:broken")
    assert broken.exit_code == 1
    assert "'l1'" in broken.stderr


def test_the_command_refuses(recorded_folder: Path):
    for arguments in (
        ["step"],
        ["none", "--pipeline", "replayed_here:pipeline"],
        ["step", "--pipeline", "replayed_here"],
        ["step", "--pipeline", "replayed_here:nothing"],
        ["step", "--pipeline", "no_such_module:pipeline"],
        ["step", "--pipeline", "replayed_here:MODULE"],
        ["step", "--pipeline", "replayed_here:torch"],
    ):
        refused = command(*arguments)
        assert refused.exit_code == 2, refused.output
        assert refused.stderr.startswith("tinkex-py replay: ")
