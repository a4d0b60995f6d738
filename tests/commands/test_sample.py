"""`tinkex-py sample` with a service over HTTP, and with a service in this process."""

import asyncio
import json
import re

import pytest

from tests.commands.conftest import KEY
from tinkex_py import AsyncServiceClient, ModelInput, SamplingParams, TinkexConfig


async def drawn_by_the_library(address, prompt, seed, count):
    async with AsyncServiceClient(TinkexConfig(base_url=address, api_key=KEY)) as service:
        sampler = await service.create_sampling_client(base_model="tiny")
        params = SamplingParams(max_tokens=6, seed=seed, temperature=0.5)
        answer = await sampler.sample(
            ModelInput.from_ints(list(prompt.encode())), num_samples=count, sampling_params=params
        )
        return [sequence.tokens for sequence in answer.sequences]


OPTIONS = ("--max-tokens", "6", "--seed", "3", "--temperature", "0.5")


def test_samples_are_those_of_the_library(command, address):
    expected = asyncio.run(drawn_by_the_library(address, "hello", 3, 2))
    result = command("sample", "tiny", "--prompt", "hello", *OPTIONS, "--n", "2", "--json")
    assert result.exit_code == 0
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["tokens"] for line in lines] == expected
    for line in lines:
        assert line["text"] == bytes(t for t in line["tokens"] if t < 256).decode("utf-8", errors="replace")
        assert len(line["logprobs"]) == len(line["tokens"]) <= 6
        assert line["stop_reason"] in ("stop", "length")


def test_the_prompt_comes_from_stdin_and_the_text_goes_to_stdout(command):
    given = json.loads(command("sample", "tiny", "--prompt", "hello", *OPTIONS, "--json").stdout)
    piped = command("sample", "tiny", *OPTIONS, "--json", stdin="hello")
    assert json.loads(piped.stdout)["tokens"] == given["tokens"]
    one = command("sample", "tiny", "--prompt", "hello", *OPTIONS)
    assert (one.exit_code, one.stdout) == (0, f"{given['text']}\n")
    two = command("sample", "tiny", "--prompt", "hello", *OPTIONS, "--n", "2")
    assert re.findall(r"^--- (\d) \((?:length|stop)\)$", two.stdout, re.MULTILINE) == ["1", "2"]


async def saved_sampler(address):
    async with AsyncServiceClient(TinkexConfig(base_url=address, api_key=KEY)) as service:
        training = await service.create_lora_training_client("tiny", rank=2, seed=0)
        return (await training.save_weights_for_sampler("sampler")).path


def test_from_a_checkpoint(command, address):
    path = asyncio.run(saved_sampler(address))
    result = command("sample", path, "--prompt", "hello", *OPTIONS, "--json")
    fresh = command("sample", "tiny", "--prompt", "hello", *OPTIONS, "--json")
    # A fresh adapter changes nothing.
    assert json.loads(result.stdout)["tokens"] == json.loads(fresh.stdout)["tokens"]
    gone = command("sample", f"{path}-gone", "--prompt", "hello")
    assert gone.exit_code == 1
    assert len(gone.stderr.splitlines()) == 1


def test_in_this_process(command, tmp_path, monkeypatch):
    monkeypatch.delenv("TINKER_BASE_URL")
    monkeypatch.delenv("TINKER_API_KEY")
    result = command("sample", "--local", "tiny", "--prompt", "hello", *OPTIONS, "--json")
    assert result.exit_code == 0
    state = tmp_path / "state"

    async def save():
        async with AsyncServiceClient.local("tiny", state_dir=state) as service:
            training = await service.create_lora_training_client("tiny", rank=2, seed=0)
            return (await training.save_weights_for_sampler("kept")).path

    path = asyncio.run(save())
    again = command(
        "sample", path, "--local", "tiny", "--state-dir", str(state), "--prompt", "hello", *OPTIONS, "--json"
    )
    assert json.loads(again.stdout)["tokens"] == json.loads(result.stdout)["tokens"]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--prompt", "a"), 2, "give MODEL_OR_PATH, or --local MODEL"),
        (("tiny", "--prompt", ""), 2, "prompt"),
        (("tiny", "--prompt", "a", "--temperature", "inf"), 2, "temperature"),
        (("tiny", "--prompt", "a", "--state-dir", "x"), 2, "--state-dir needs --local"),
        (("--local", "tiny", "--prompt", "a", "--tokenizer", "x"), 2, "cannot be combined with --local"),
        (("--local", "nothing-there", "--prompt", "a"), 2, "there is no such model"),
        (("tiny", "--prompt", "a", "--chat"), 2, "the tokenizer of tiny has no chat template"),
        (
            ("tiny", "--prompt", "a", "--tokenizer", "./nothing-there"),
            2,
            "the tokenizer './nothing-there' cannot be loaded",
        ),
        (("no-such-model", "--prompt", "a"), 1, "no-such-model"),
        (("tinker://nonsense", "--prompt", "a"), 1, "nonsense"),
    ],
)
def test_invalid_calls(command, arguments, code, reason):
    result = command("sample", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "stdin", "reason"),
    [
        ((), b"\xff\xfe", "stdin is not UTF-8 text: encode it as UTF-8"),
        (("--prompt", "\udcff"), None, "--prompt is not UTF-8 text: encode it as UTF-8"),
    ],
)
def test_a_prompt_that_is_not_utf_8(command, arguments, stdin, reason):
    result = command("sample", "tiny", *arguments, stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"tinkex-py sample: {reason}\n"
