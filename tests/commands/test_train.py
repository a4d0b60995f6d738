"""`tinkex-py train`: runs, resumed runs, invalid files, and signals."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinkex_py.cli import app
from tinkex_py.commands.train import train_from_config
from tinkex_py.runs import read_run, read_steps
from tinkex_py.runs.config import read_config
from tinkex_py.runs.folder import RunFolder

EXAMPLE = Path(__file__).parents[2] / "examples" / "configs" / "sft_kl.yaml"
TINY = """
model: tiny
data: {path: pairs.jsonl, batch_size: 2}
lora: {rank: 4}
training: {steps: 2}
"""


STEPS = 12


def shorter_example(folder: Path) -> Path:
    """The example with fewer steps."""
    text = EXAMPLE.read_text().replace("../data", str(EXAMPLE.parents[1] / "data"))
    changes = {
        "steps: 40": f"steps: {STEPS}",
        "evaluate_every: 10": "evaluate_every: 6",
        "checkpoint_every: 5": "checkpoint_every: 3",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "sft_kl.yaml"
    path.write_text(text)
    return path


def kill_in_step(number: int, config: Path, folder: Path) -> None:
    """Starts the training as a user would, and kills it with SIGKILL once it has made this step."""
    command = [sys.executable, "-W", "error", "-m", "tinkex_py", "train", str(config), "--model", "tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith(f"step {number} "):
                process.kill()
                break
        process.wait(60)
    assert process.returncode == -signal.SIGKILL, "".join(lines)


def train_here(config: Path, folder: Path) -> Any:
    described = read_config(config).model_copy(update={"model": "tiny"})
    return asyncio.run(train_from_config(described, folder, stop=asyncio.Event(), progress=False))


@pytest.mark.slow  # a process that loads torch
def test_a_killed_run_resumes_with_the_numbers_of_an_uninterrupted_run(tmp_path: Path) -> None:
    config, folder = shorter_example(tmp_path), tmp_path / "runs" / "sft_kl"
    kill_in_step(random.Random(20).randint(4, STEPS - 2), config, tmp_path)
    assert read_run(folder).status == "running"
    assert 0 < len(read_steps(folder)) < STEPS
    run, whole = train_here(config, folder), train_here(config, tmp_path / "whole")
    assert (run.info.status, run.last.step, whole.last.step) == ("finished", STEPS, STEPS)
    steps, expected = read_steps(folder), read_steps(tmp_path / "whole")
    losses, unbroken = ([step.losses[0].loss_total for step in of] for of in (steps, expected))
    assert losses == pytest.approx(unbroken, abs=1e-5)
    assert losses[-1] < losses[0]
    evaluated = {step.step: list(step.evaluation) for step in steps if step.evaluation}
    assert evaluated == {6: ["held_out_nll"], 12: ["held_out_nll"]}
    assert steps[-1].evaluation["held_out_nll"] == pytest.approx(expected[-1].evaluation["held_out_nll"], abs=1e-5)
    # The settings of the file apply.
    weights = [step.losses[0].regularizers["l2"].weight for step in steps]
    assert weights == pytest.approx([0.02 * (1 - step / STEPS) for step in range(STEPS)])
    rates = [step.learning_rate for step in steps]
    assert rates[:4] == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3, 1e-3])
    kl = [step.losses[0].regularizers["kl"] for step in steps]
    assert kl[0].value == pytest.approx(0.0, abs=1e-6)  # the base model against itself
    assert kl[1].weight == pytest.approx(0.05 * (1 - 0.2 / 10))  # far below its target
    assert all(term.grad_norm is not None for term in kl)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pairs, in which the command is called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    return tmp_path


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_short_run_is_summarized_and_resumed(inside: Path) -> None:
    (inside / "short.yaml").write_text(TINY)
    code, out, err = call("short.yaml", "--runs-dir", "somewhere", "--name", "mine")
    assert code == 0, err
    assert out.startswith("finished after 2 steps, loss ")
    assert out.strip().endswith("files in somewhere/mine")
    assert "step 2  loss " in err
    code, out, err = call("short.yaml", "--runs-dir", "somewhere", "--name", "mine", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 2
    assert "resumed after step 2" in err
    # The run's folder contains its checkpoints.
    assert (inside / "somewhere" / "mine" / "service").is_dir()


def test_a_term_of_ones_own(inside: Path) -> None:
    (inside / "own_terms.py").write_text(
        "def scaled(data, logprobs, factor):\n    return factor * logprobs.pow(2).sum()\n"
        "class Nll:\n"
        "    def __init__(self, scale):\n        self.scale = scale\n"
        "    def compute(self, data, logprobs):\n        return -self.scale * logprobs.sum()\n"
    )
    loss = """
loss:
  base: {term: "own_terms:Nll", options: {scale: 2.0}}
  regularizers:
    - {term: "own_terms:scaled", name: own, weight: 0.5, options: {factor: 3.0}}
"""
    (inside / "own.yaml").write_text(TINY + loss)
    try:
        code, _, err = call("own.yaml")
    finally:
        sys.modules.pop("own_terms", None)
        sys.path.remove(str(inside))
    assert code == 0, err
    (output,) = read_steps(inside / "runs" / "own")[0].losses
    own = output.regularizers["own"]
    assert output.loss_total == pytest.approx(output.base_loss.value + 0.5 * own.value)


SIGNALS = """
import os, signal

calls = 0

def loss(data, logprobs):
    global calls
    calls += 1
    if calls == 3:
        for number in NUMBERS:
            os.kill(os.getpid(), number)
    return -logprobs.sum()
"""


@pytest.mark.parametrize(
    ("numbers", "code", "words"),
    [
        ("[signal.SIGTERM]", 3, "stopped"),
        ("[signal.SIGINT, signal.SIGTERM]", 1, "cancelled; the same command resumes"),
    ],
)
def test_a_signal_stops_with_a_checkpoint_and_a_second_one_at_once(
    inside: Path, numbers: str, code: int, words: str
) -> None:
    (inside / "own_signals.py").write_text(SIGNALS.replace("NUMBERS", numbers))
    own = TINY.replace("steps: 2", "steps: 9") + "loss: {base: {term: 'own_signals:loss'}}\n"
    (inside / "run.yaml").write_text(own)
    try:
        given, out, err = call("run.yaml", "--json")
    finally:
        sys.modules.pop("own_signals", None)
        sys.path.remove(str(inside))
    assert given == code, err
    assert words in out + err
    assert "stopping: finishing the current steps" in err
    run, steps = read_run(inside / "runs" / "run"), read_steps(inside / "runs" / "run")
    assert run.status == "stopped"
    assert len(steps) < 9
    if code == 3:
        assert (json.loads(out)["steps"], json.loads(out)["reason"]) == (len(steps), "stop was requested")


def test_the_file_in_the_guide_and_the_example_say_the_same(inside: Path) -> None:
    page = (EXAMPLE.parents[2] / "docs" / "guides" / "training_runs.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (inside / "guide.yaml").write_text(block)
    guide, example = read_config(inside / "guide.yaml"), read_config(EXAMPLE)
    paths = {"data": example.data}
    assert guide.model_copy(update=paths) == example.model_copy(update={"training": guide.training})
    assert guide.training.model_copy(update={"evaluate_every": 10}) == example.training


BAD_FILES = [
    ("model: tiny\n", "data: is missing"),
    (TINY + "optimiser: {}\n", r"no setting is named 'optimiser' \(did you mean 'optimizer'\?\)"),
    (
        TINY + "loss: {base: {term: NLL, option: {}}}\n",
        r"no setting is named 'loss.base.option' \(did you mean 'options'\?\)",
    ),
    (TINY + "loss: {base: {term: NLL, zzz: {}}}\n", "no setting is named 'loss.base.zzz'$"),
    (
        TINY.replace("steps: 2", "stepz: 2"),
        r"training: TrainSettings: no setting is named 'stepz' \(did you mean 'steps'\?\)",
    ),
    (
        TINY.replace("steps: 2", "early_stop: {metric: loss/total, patients: 2}"),
        r"no setting is named 'patients' \(did you mean 'patience'\?\)",
    ),
    (TINY.replace("steps: 2", "steps: many"), "training: TrainSettings: steps: .*got 'many'"),
    (
        TINY + "loss: {base: {term: NNL}}\n",
        r"loss.base.term: no term is named 'NNL' \(did you mean 'NLL'\?\); use one of CISPO, .*NLL, .*or module:name",
    ),
    (TINY + "loss: {base: {term: NLL, options: {mean: 1}}}\n", "loss.base: NLL: .*unexpected keyword argument 'mean'"),
    (
        TINY + "loss: {base: {term: NLL, options: {redction: mean}}}\n",
        r"unexpected keyword argument 'redction' \(did you mean 'reduction'\?\)",
    ),
    (
        TINY + "loss: {regularizers: [{term: L2, weight: 1, nmae: x}]}\n",
        r"loss.regularizers.0: .*'nmae' \(did you mean 'name'\?\)",
    ),
    (TINY + "loss: {base: {term: 'nowhere:f'}}\n", "loss.base.term: 'nowhere:f' cannot be imported"),
    (
        TINY + "loss: {base: {term: 'math:sqrt', options: {a: 1}}}\n",
        "math:sqrt is a function, which takes no options here",
    ),
    (TINY + "loss: {regularizers: [{term: L2, weight: -1}]}\n", "loss.regularizers.0: .*weight must be"),
    (
        TINY + "loss: {regularizers: [{term: L2, weight: {schedule: Cubic}}]}\n",
        "loss.regularizers.0.weight: schedule must be one of Constant, .*got 'Cubic'",
    ),
    (
        TINY + "loss: {regularizers: [{term: L2, weight: {schedule: linear}}]}\n",
        r"got 'linear' \(did you mean 'Linear'\?\)",
    ),
    (
        TINY + "loss: {regularizers: [{term: L2, weight: {controller: AdaptiveKL, initial: 0.1}}]}\n",
        "loss.regularizers.0.weight: AdaptiveKL: .*'target'",
    ),
    (TINY + "loss: {regularizers: [{term: L2}]}\n", "loss.regularizers.0: .*weight=None, and there is no bound"),
    (
        TINY + "loss: {regularizers: [{term: L2, at_most: 1.0}]}\n",
        "loss.regularizers.0: .*reduction='sum' grows with the batch",
    ),
    (
        TINY + "optimizer: {learning_rate: {schedule: WarmUp, steps: 2, then: {schedule: Linear, start: 1}}}\n",
        "optimizer.learning_rate.then: Linear: .*'end' and 'steps'",
    ),
    (TINY + "optimizer: {learning_rate: -1.0}\n", "optimizer: .*learning_rate"),
    (TINY.replace("pairs", "peers"), "peers.jsonl cannot be read"),
    (TINY.replace("model: tiny", "model: no-such-model"), "no-such-model"),
    ("a: [", "is not valid YAML"),
    ("- 1\n", "valid dictionary"),
]


@pytest.mark.parametrize(("content", "words"), BAD_FILES)
def test_an_invalid_file_is_named_and_nothing_is_trained(inside: Path, content: str, words: str) -> None:
    (inside / "bad.yaml").write_text(content)
    code, out, err = call("bad.yaml")
    assert code == 2, err
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("tinkex-py train: ")
    assert re.search(words, line), line
    assert not list(inside.glob("runs/*/run.json"))


def test_bad_options_and_a_missing_library_are_named(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inside / "good.yaml").write_text(TINY)
    assert "no.yaml cannot be read" in call("no.yaml")[2]
    code, _, err = call("good.yaml", "--name", "../elsewhere")
    assert code == 2
    assert "--name must be the name of a folder, without a path, got '../elsewhere'" in err
    with RunFolder(inside / "runs" / "good"):
        code, _, err = call("good.yaml")
    assert code == 2
    assert "is being trained by another process" in err
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert call("good.yaml")[2] == "tinkex-py train: yaml is not installed. Run: pip install 'tinkex-py[cli]'\n"


def test_another_configuration_of_the_same_run_is_refused(inside: Path) -> None:
    (inside / "run.yaml").write_text(TINY)
    assert call("run.yaml")[0] == 0
    (inside / "run.yaml").write_text(TINY.replace("rank: 4", "rank: 8") + "optimizer: {weight_decay: 0.1}\n")
    code, _, err = call("run.yaml")
    assert code == 2
    assert "config.lora.rank was 4 and is 8; optimizer.weight_decay was not set and is 0.1" in err
    (inside / "run.yaml").write_text(TINY)
    (inside / "pairs.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    code, _, err = call("run.yaml")
    assert code == 2
    assert "config.data.sha256 was '" in err


def test_a_run_that_fails_says_so(inside: Path) -> None:
    (inside / "breaks.py").write_text("def breaks(data, logprobs):\n    raise OSError('secret')\n")
    (inside / "run.yaml").write_text(TINY + "loss: {base: {term: 'breaks:breaks'}}\n")
    try:
        code, out, err = call("run.yaml")
    finally:
        sys.modules.pop("breaks", None)
        sys.path.remove(str(inside))
    assert (code, out) == (1, "")
    assert "tinkex-py train: " in err
    assert read_run(inside / "runs" / "run").status == "failed"
