"""`tinkex-py lint`: a loss in a configuration file, checked without a model."""

import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "configs" / "sft_kl.yaml"
PAIRS = '{"prompt": "2 + 2", "answer": "4, of course"}\n{"prompt": "a", "answer": "b"}'
LOSSES = """
def flipped(data, logprobs):
    return logprobs.sum()


def mean(data, logprobs):
    return -logprobs.mean()
"""
CUSTOM = "model: tiny\ndata: {path: pairs.jsonl}\nloss: {base: {term: 'LINTED:NAME'}}\ntraining: {accumulate: 1}\n"


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "linted_losses.py").write_text(LOSSES)
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "2 + 2", "answer": "4, of course"}\n{"prompt": "a", "answer": "b"}'
    )
    (tmp_path / "run.yaml").write_text(CUSTOM.replace("LINTED:NAME", "linted_losses:flipped"))
    return tmp_path / "run.yaml"


def test_the_example_has_no_findings(plain_command):
    result = plain_command("lint", str(EXAMPLE))
    assert (result.exit_code, result.stdout) == (0, "no findings in 3 terms\n")
    assert plain_command("lint", str(EXAMPLE), "--set", "training.accumulate=4", "--json").stdout == ""


def test_an_error_fails_the_command(plain_command, config):
    result = plain_command("lint", str(config))
    assert result.exit_code == 1
    assert "error: base_loss: sign: a step of this term alone makes the target tokens less likely" in result.stdout
    found = [json.loads(line) for line in plain_command("lint", str(config), "--json").stdout.splitlines()]
    assert [(one["term"], one["rule"], one["severity"]) for one in found] == [
        ("base_loss", "sign", "error"),
        ("base_loss", "mask", "error"),
    ]
    ignored = plain_command("lint", str(config), "--ignore", "sign", "--ignore", "mask")
    assert (ignored.exit_code, ignored.stdout) == (0, "no findings in 1 terms\n")


def test_the_accumulation_is_that_of_the_run(plain_command, config):
    config.write_text(CUSTOM.replace("LINTED:NAME", "linted_losses:mean"))
    for calls, rules in ((1, ["mask"]), (2, ["mask", "accumulation"])):
        result = plain_command("lint", str(config), "--json", "--set", f"training.accumulate={calls}")
        assert [json.loads(line)["rule"] for line in result.stdout.splitlines()] == rules


def test_unusable_input(plain_command, config):
    result = plain_command("lint", str(config), "--ignore", "sing")
    assert result.exit_code == 2
    assert "ignore: no rule is named 'sing' (did you mean 'sign'?)" in result.stderr
    assert plain_command("lint", "missing.yaml").exit_code == 2
