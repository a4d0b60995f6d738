"""Every example runs unchanged, in an empty folder and without a service."""

import asyncio
import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.client.recorder import KEY, http_recorder
from tinkex_py import CustomLossOutput

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data"
needs_gudhi = pytest.mark.skipif(importlib.util.find_spec("gudhi") is None, reason="gudhi is not installed")
needs_z3 = pytest.mark.skipif(importlib.util.find_spec("z3") is None, reason="z3-solver is not installed")


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs an example in this process, which is faster than one that loads torch, and returns its output."""

    def run(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        shown = capsys.readouterr()
        assert shown.err == ""
        return shown.out

    return run


def run_script(name: str, folder: Path, *, strict: bool = True, **variables: str) -> str:
    """Runs an example in its own process and returns its output; stderr must be empty, and warnings are errors."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TINKER_")}
    finished = subprocess.run(
        [sys.executable, *(["-W", "error"] if strict else []), str(EXAMPLES / name)],
        cwd=folder,
        env={**environment, "PYTHONIOENCODING": "utf-8", **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


def test_every_example_is_tested() -> None:
    tested = set(re.findall(r'run_(?:example|script)\("([\w.]+)"', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_structured_regularizers(run_example: Callable[[str], str], tmp_path: Path) -> None:
    lines = run_example("structured_regularizers.py").splitlines()
    assert lines[:4] == [
        "=== Training Step Results ===",
        "Total Loss: 1.061646",
        "Base Loss: 0.98",
        "Regularizer Total: 0.081646",
    ]
    assert lines[4] == "Total Grad Norm: 0.491388"
    assert lines[6] == "=== Per-Regularizer Breakdown ==="
    assert [line for line in lines if line.endswith(":") and not line.startswith("  ")] == [
        "l1_sparsity:",
        "l2_weight_decay:",
        "entropy:",
    ]
    # by hand: sum |x|, 0.01 * 4.9, sqrt(5), 0.01 * sqrt(5)
    shown = dict(line.strip().split(": ") for line in lines[9:14])
    assert {key: float(value) for key, value in shown.items()} == pytest.approx(
        {
            "value": 4.9,
            "weight": 0.01,
            "contribution": 0.049,
            "grad_norm": 2.236068,
            "grad_norm_weighted": 0.022361,
        },
        abs=1e-6,
    )
    assert lines[-1] == "✓ Saved to training_step.json"
    saved = CustomLossOutput.model_validate_json((tmp_path / "training_step.json").read_text())
    assert saved.loss_total == pytest.approx(1.0616464, rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["training_step.json"]


def test_quickstart(run_example: Callable[[str], str]) -> None:
    lines = run_example("quickstart.py").splitlines()
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)", "\n".join(lines), re.MULTILINE)]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
    assert len(lines) == 21
    assert "Ahoy friend" in lines[-1]  # the model has learned the style of the answers
    assert len([line for line in (EXAMPLES / "quickstart.py").read_text().splitlines() if line.strip()]) <= 65


def test_structured_regularizers_live(run_example: Callable[[str], str]) -> None:
    text = run_example("structured_regularizers_live.py")
    assert text.startswith("Training tiny on the embedded service\n")
    totals = [float(total) for total in re.findall(r"^Total Loss: (\S+)$", text, re.MULTILINE)]
    assert len(totals) == 5
    assert totals[-1] < totals[0]
    assert text.count("l2_weight_decay: value") == 5
    for label in ("Base Loss: ", "Regularizer Total: ", "Total Grad Norm: "):
        assert text.count(f"\n{label}") == 5


@pytest.mark.asyncio
async def test_structured_regularizers_live_on_any_service(tmp_path: Path) -> None:
    async with http_recorder() as (recorder, url):
        text = await asyncio.to_thread(
            run_script, "structured_regularizers_live.py", tmp_path, TINKER_BASE_URL=url, TINKER_API_KEY=KEY
        )
        assert text.startswith(f"Training tiny on {url}\n")
        assert text.count("\nTotal Loss: ") == 5
        assert [arrival.kind for arrival in recorder.of("F", "B", "optim_step")] == ["F", "B", "optim_step"] * 5


def test_async_service(run_example: Callable[[str], str]) -> None:
    progress, _, results = run_example("async_service.py").partition("=== Results ===")
    shown = dict(re.findall(r"^(\w+): (\w+) after", results, re.MULTILINE))
    assert shown == {"greetings": "done", "numbers": "done", "endless": "cancelled"}
    for name in ("greetings", "numbers"):
        assert re.findall(rf"^{name}: step (\d+) of 6", progress, re.MULTILINE) == list("123456")
        first, last = re.findall(rf"^{name}: .*loss (\S+) -> (\S+)$", results, re.MULTILINE)[0]
        assert float(last) < float(first)


def test_scoring_service(run_example: Callable[[str], str]) -> None:
    text = run_example("scoring_service.py")
    (first, *_, last) = [float(value) for value in re.findall(r"confidence (0\S+)$", text, re.MULTILINE)]
    assert first < 0.01
    assert last == pytest.approx(0.5, abs=0.1)  # where -log(p) + 2 p is least


def test_checkpoints(run_example: Callable[[str], str], tmp_path: Path) -> None:
    lines = run_example("checkpoints.py").splitlines()
    listed = [re.fullmatch(r"(weights/\w+): \d+ bytes, expires: 2\d{3}-.*", line) for line in lines[:2]]
    assert [line and line[1] for line in listed] == ["weights/late", "weights/early"]
    assert lines[2:4] == ["base model tiny, rank 8", "late never expires"]
    first, *_, last = [re.fullmatch(r"downloaded (\d+) of (\d+) bytes", line) for line in lines[4:-3]]
    assert first[1] == "0"
    assert last[1] == last[2] != "0"
    files = ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"]
    assert lines[-3:] == [f"files: {', '.join(files)}", "resumed training of tiny", "remaining: ['weights/late']"]
    assert [path.name for path in tmp_path.iterdir()] == ["downloaded_checkpoint"]
    assert sorted(path.name for path in (tmp_path / "downloaded_checkpoint").iterdir()) == files


def test_kl_controlled_sft(run_example: Callable[[str], str]) -> None:
    text = run_example("kl_controlled_sft.py")
    (without,) = re.findall(r"^KL without controller: (\S+)$", text, re.MULTILINE)
    ((held, target),) = re.findall(r"^KL with controller: (\S+), target (\S+)$", text, re.MULTILINE)
    assert float(without) > 5 * float(target)
    assert float(target) / 3 < float(held) < 3 * float(target)


def test_constrained_sft(run_example: Callable[[str], str]) -> None:
    text = run_example("constrained_sft.py")
    values = [float(value) for value in re.findall(r"^ *\d+  \S+  (\S+) .*(?:holds|violated)$", text, re.MULTILINE)]
    ((last, bound, price),) = re.findall(r"^KL at the end: (\S+), bound (\S+), price (\S+)$", text, re.MULTILINE)
    assert len(values) == 15
    assert "violated" in text
    assert 0.5 * float(bound) < float(last) < 1.1 * float(bound)
    # The loss is linear and the KL quadratic in the logprobs: the price of 0.2 nats is 1 / sqrt(2 * 0.2).
    assert float(price) == pytest.approx(1.58, rel=0.3)


def test_dpo(run_example: Callable[[str], str]) -> None:
    text = run_example("dpo.py")
    ((first, last),) = re.findall(r"^DPO loss: (\S+) -> (\S+)$", text, re.MULTILINE)
    assert float(first) == pytest.approx(0.6931, abs=1e-4)  # log 2: the model is its own reference
    assert float(last) < 0.1


def test_choice(run_example: Callable[[str], str]) -> None:
    text = run_example("choice.py")
    ((first, last),) = re.findall(r"^accuracy: (\S+) -> (\S+)$", text, re.MULTILINE)
    assert float(first) <= 0.2  # by chance 1 of 21
    assert float(last) >= 0.8
    divergences = [float(value) for value in re.findall(r"KL (\S+)", text)]
    assert divergences[-1] < 0.3 * divergences[0]


def test_vision(tmp_path: Path) -> None:
    text = run_script("vision.py", tmp_path)
    ((first, last),) = re.findall(r"^loss: (\S+) -> (\S+)$", text, re.MULTILINE)
    assert float(first) > math.log(4)  # it knows none of the four colours
    assert float(last) < 0.3 * float(first)


def test_distill(run_example: Callable[[str], str]) -> None:
    text = run_example("distill.py")
    ((first, last),) = re.findall(r"^KL from the teacher: (\S+) -> (\S+)$", text, re.MULTILINE)
    assert float(first) > 3.0  # the teacher has learned the sentences, the student has not
    assert float(last) < 0.1 * float(first)


def module_of(name: str) -> dict[str, Any]:
    """The names of an example that is imported, not run."""
    return runpy.run_path(str(EXAMPLES / name), run_name=name)


def total_persistence_by_hand(curve: Sequence[float]) -> float:
    """Every local maximum between two positions ends a component, every local minimum but the lowest begins one."""
    padded = [math.inf, *curve, math.inf]
    triples = list(zip(padded, padded[1:], padded[2:], strict=False))
    deaths = [here for left, here, right in triples if left < here > right]
    births = [here for left, here, right in triples if left > here < right]
    return math.fsum(deaths) - math.fsum(births) + min(curve)


@needs_gudhi
@pytest.mark.parametrize("lengths", [(7,), (1, 2, 12), (5, 40)], ids=str)
def test_the_gradient_of_total_persistence(lengths: tuple[int, ...]) -> None:
    compute = module_of("topology.py")["total_persistence"]
    generator = torch.Generator().manual_seed(sum(lengths))
    curves = [torch.rand(length, dtype=torch.float64, generator=generator).neg().requires_grad_() for length in lengths]
    value, _ = compute([], curves)
    by_hand = sum(total_persistence_by_hand(curve.tolist()) for curve in curves) / len(curves)
    assert value.item() == pytest.approx(by_hand, rel=1e-12)
    assert torch.autograd.gradcheck(lambda *own: compute([], own)[0], curves, eps=1e-7)


@needs_gudhi
def test_topology(run_example: Callable[[str], str]) -> None:
    text = run_example("topology.py")
    (without,) = re.findall(r"^total persistence without penalty: (\S+),", text, re.MULTILINE)
    ((first, last),) = re.findall(r"^total persistence with penalty: (\S+) -> (\S+),", text, re.MULTILINE)
    assert float(last) < 0.5 * float(first)
    assert float(last) < 0.5 * float(without)


@needs_z3
@pytest.mark.parametrize(
    ("facts", "answer", "expected"),
    [
        ("A is older than B. B is older than C.", "A", False),
        ("A is older than B. B is older than C.", "C", True),
        ("B is older than C. D is older than A. A is older than B.", "C", True),
        ("A is older than B. C is older than B.", "C", False),  # both answers are possible
        ("A is older than B. C is older than B.", "A", False),
    ],
)
def test_what_contradicts_stated_facts(facts: str, answer: str, expected: bool) -> None:
    assert module_of("logic.py")["contradicts"](f"{facts} Who is older, A or C? {answer}") is expected


@needs_z3
def test_logic(run_example: Callable[[str], str]) -> None:
    text = run_example("logic.py")
    assert "Z3 finds 3 contradictions in 6 answers" in text
    pattern = r"^probability of (?:answers that contradict the facts|the others): (\S+) -> (\S+)$"
    (wrong, right) = [[float(part) for part in pair] for pair in re.findall(pattern, text, re.MULTILINE)]
    assert wrong[0] > 0.3  # the model learned both answers to each question
    assert wrong[1] < 0.1
    assert right[1] > right[0]


def test_official_sdk(tmp_path: Path) -> None:
    # The official SDK leaves sockets open at exit, so its warnings are not errors here.
    text = run_script("official_sdk.py", tmp_path, strict=False)
    lines = re.findall(r"^(.*?): (.*)$", text, re.MULTILINE)
    runs = {name: [float(loss) for loss in losses.split()] for name, losses in lines}
    assert list(runs) == ["plain function", "pipeline", "with regularizers"]
    assert runs["pipeline"] == pytest.approx(runs["plain function"], abs=1e-4)
    assert runs["pipeline"][-1] < 0.1
    assert runs["with regularizers"][-1] < runs["with regularizers"][0]


def test_cookbook_with_regularizers(tmp_path: Path) -> None:
    if find_spec("tinker_cookbook") is None:
        with pytest.raises(AssertionError, match="pip install tinker-cookbook"):
            run_script("cookbook_with_regularizers.py", tmp_path, strict=False)
        pytest.skip("the tinker-cookbook is not installed; `make conformance ARGS=cookbook` runs its recipes")
    lines = run_script("cookbook_with_regularizers.py", tmp_path, strict=False).splitlines()
    plain, measured, penalized = ([float(number) for number in re.findall(r"\d+\.\d{4}", line)] for line in lines)
    assert plain[1] < 0.5 * plain[0]
    assert measured[:2] == pytest.approx(plain, abs=1e-3)
    assert penalized[3] < 0.5 * measured[3]


def test_sampling(run_example: Callable[[str], str]) -> None:
    text = run_example("sampling.py")
    assert len(re.findall(r"^sample \d: '.*'  (?:stop|length)  logprob -\d+\.\d+$", text, re.MULTILINE)) == 2
    assert "the same seed gives the same samples: True" in text
    assert text.count(" -> ") == 3
    (perplexity,) = re.findall(r"^perplexity (\S+) over \d+ tokens$", text, re.MULTILINE)
    assert 10 < float(perplexity) < 2000  # 258 tokens, random weights
    for logprob in re.findall(r"^as the last token: Paris (\S+), Rome (\S+)$", text, re.MULTILINE)[0]:
        assert -20 < float(logprob) < 0


def test_rl_loop(run_example: Callable[[str], str]) -> None:
    text = run_example("rl_loop.py")
    rewards = [float(reward) for reward in re.findall(r"^step \d+  reward (\S+)", text, re.MULTILINE)]
    assert len(rewards) >= 10
    # By chance about 52 of 258 tokens are letters. The rise is far above the noise of a round (0.03).
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


def test_grpo(run_example: Callable[[str], str]) -> None:
    text = run_example("grpo.py")
    rounds = re.findall(r"^ *\d+  (\S+) +(\S+) +(\S+) +\S+  \S+$", text, re.MULTILINE)
    rewards, divergences, multipliers = ([float(number) for number in column] for column in zip(*rounds, strict=True))
    assert len(rewards) == 10
    # By chance about 52 of 258 tokens are letters.
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert multipliers[0] == 0
    assert max(divergences) > 1.0
    assert multipliers[-1] > 0  # it rises where the bound is violated


def test_resume(run_example: Callable[[str], str]) -> None:
    text = run_example("resume.py")
    assert "largest difference: 0.0e+00" in text
    assert len(re.findall(r"^step \d", text, re.MULTILINE)) == 8


def load(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.mark.parametrize(("name", "least"), [("instructions.jsonl", 80), ("held_out.jsonl", 6)])
def test_data_set_has_one_style(name: str, least: int) -> None:
    rows = load(name)
    assert len(rows) >= least
    for row in rows:
        assert set(row) == {"prompt", "answer"}
        assert row["prompt"].strip() == row["prompt"] != ""
        assert row["answer"].startswith("Ahoy friend, ")
        assert row["answer"].endswith(", fair winds!")
        assert len(row["answer"]) < 100


def test_held_out_prompts_are_not_trained_on() -> None:
    trained = [row["prompt"] for row in load("instructions.jsonl")]
    assert len(set(trained)) == len(trained)
    assert not set(trained) & {row["prompt"] for row in load("held_out.jsonl")}
