"""The demo: `tinkex-py demo` in an empty folder, and its parts."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tinkex_py import packed_field
from tinkex_py.cli import app
from tinkex_py.demo.files import default_file, new_run_folder
from tinkex_py.demo.losses import kl_to_base, l2, masked_nll, rarity_server
from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.local.tokenizers import ByteTokenizer
from tinkex_py.runs import read_run, read_steps
from tinkex_py.runs.pairs import Pair, make_datum, read_pairs

TERMS = ("l2", "kl_to_base", "rarity")


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "tinkex_py", "demo", *arguments]
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_short_run_lowers_the_loss_and_writes_its_folder(tmp_path: Path):
    done = demo(tmp_path, "--model", "tiny", "--steps", "5", "--learning-rate", "0.003")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    last_line = done.stdout.strip().splitlines()[-1]
    found = re.fullmatch(r"loss ([0-9.]+) -> ([0-9.]+) in 5 steps, files in (runs/\S+)", last_line)
    assert found, last_line
    assert float(found[2]) < float(found[1])
    folder = tmp_path / found[3]
    assert read_run(folder).status == "finished"
    steps = read_steps(folder)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        assert step.seconds > 0
        (output,) = step.losses
        assert tuple(output.regularizers) == TERMS
        weighted = sum(term.weight * term.value for term in output.regularizers.values())
        assert output.loss_total == pytest.approx(output.base_loss.value + weighted, rel=1e-9)
        assert all(term.grad_norm is not None for term in output.regularizers.values())
    assert f"{steps[0].losses[0].loss_total:.4f}" == found[1]
    assert f"{steps[-1].losses[0].loss_total:.4f}" == found[2]
    assert f"charts in {found[3]}/report/index.html" in done.stdout
    pictures = {path.stem: path.read_bytes() for path in (folder / "report").glob("*.png")}
    assert {"losses", "contributions", "gradient_norms"} <= set(pictures)
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    for word in ("before training", "after training", "gradient norm", *TERMS):
        assert word in done.stdout


def test_json_is_all_there_is_on_stdout(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    arguments = ("--model", "tiny", "--steps", "1", "--data", "pairs.jsonl", "--json")
    with contextlib.chdir(tmp_path):
        done = CliRunner().invoke(app, ["demo", *arguments])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["first_loss"] == told["last_loss"] == read_steps(tmp_path / told["folder"])[0].losses[0].loss_total
    assert told["steps"] == 1
    assert (tmp_path / told["report"]).is_file()
    assert "before training" in done.stderr


def test_bad_data_is_named(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    done = demo(tmp_path, "--model", "tiny", "--data", "bad.jsonl")
    assert done.returncode == 2
    assert "bad.jsonl:2" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_unknown_model_is_named(tmp_path: Path):
    done = demo(tmp_path, "--model", "no-such-model", "--steps", "1")
    assert done.returncode == 2
    assert "no-such-model" in done.stderr


def test_the_data_set_ships_with_a_common_style():
    pairs = read_pairs(default_file("instructions.jsonl"))
    assert len(pairs) >= 64
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    assert all(pair.answer.startswith("Ahoy friend, ") and pair.answer.endswith(", fair winds!") for pair in pairs)
    held_out = read_pairs(default_file("held_out.jsonl"))
    assert not {pair.prompt for pair in pairs} & {pair.prompt for pair in held_out}


@pytest.mark.parametrize("arguments", [["--learning-rate", "inf"], ["--runs-dir", "file/inside"]])
def test_what_cannot_be_done_is_named_in_one_line(tmp_path: Path, arguments: list[str]):
    (tmp_path / "file").touch()
    done = demo(tmp_path, "--model", "tiny", "--steps", "1", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinkex-py demo: ")
    assert arguments[1].partition("/")[0] in line


def test_missing_and_empty_files(tmp_path: Path):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.jsonl is not UTF-8"):
        read_pairs(tmp_path / "binary.jsonl")
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidData, match=r"empty\.jsonl"):
        read_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="no-such-file"):
        default_file("no-such-file")


def test_only_the_answer_has_weight():
    datum = make_datum(ByteTokenizer(), Pair(prompt="ab", answer="xyz"))
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    assert targets[weights == 1.0].tolist() == [*b"xyz", ByteTokenizer.eos_token_id]
    assert datum.model_input.length == len(targets)


@pytest.mark.asyncio
async def test_the_terms_are_what_their_formulas_say():
    tokenizer = ByteTokenizer()
    data = [make_datum(tokenizer, Pair(prompt="a", answer="bb")), make_datum(tokenizer, Pair(prompt="a", answer="c"))]
    lengths = [datum.model_input.length for datum in data]
    data = [datum.with_inputs(reference_logprobs=[-1.0] * length) for datum, length in zip(data, lengths, strict=True)]
    logprobs = torch.linspace(-2.0, -0.1, sum(lengths))
    mask = packed_field(data, "weights").bool()
    answers = logprobs[mask].double()
    assert masked_nll(data, logprobs).item() == pytest.approx(-answers.mean().item(), rel=1e-6)
    assert l2(data, logprobs).item() == pytest.approx(answers.square().mean().item(), rel=1e-6)
    ratio = -1.0 - answers
    expected = (ratio.exp() - 1 - ratio).mean().item()
    assert kl_to_base(data, logprobs).item() == pytest.approx(expected, rel=1e-5)
    assert kl_to_base(data, torch.full_like(logprobs, -1.0)).item() == 0.0
    targets = packed_field(data, "target_tokens").tolist()
    rarity = torch.tensor([1.0 / (1.0 + targets.count(token)) for token in targets], dtype=torch.float64)
    async with rarity_server(data) as term:
        loss, metrics = await term.compute(data, logprobs)
        repeated, _ = await term.compute([*data] * 5_000, torch.cat([logprobs] * 5_000))
    assert repeated.item() == pytest.approx(loss.item(), rel=1e-4)
    assert loss.item() == pytest.approx(-(rarity[mask] * answers).mean().item(), rel=1e-6)
    assert math.isclose(metrics["mean_rarity"], rarity.mean().item(), rel_tol=1e-6)


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path):
    folders = {new_run_folder(tmp_path) for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() for folder in folders)
