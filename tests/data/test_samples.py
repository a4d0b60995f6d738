"""Data for reinforcement learning: groups, datums of answers, rewards, references, and batches."""

import asyncio
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest

from tests.client.data import datum
from tinkex_py import (
    AsyncServiceClient,
    Datum,
    InvalidData,
    ModelInput,
    SampledSequence,
    SampleResponse,
    SamplingParams,
)
from tinkex_py.data import answer_texts, batches, datum_from_sample, rewards_of, sample_groups, with_reference
from tinkex_py.local.tokenizers import ByteTokenizer


def sampled(*tokens: int, logprobs: list[float] | None = None) -> SampledSequence:
    return SampledSequence(
        tokens=list(tokens), logprobs=[-0.5] * len(tokens) if logprobs is None else logprobs, stop_reason="stop"
    )


class Echo:
    """Samples the prompt's first token, and remembers the seeds."""

    def __init__(self) -> None:
        self.seeds: list[int | None] = []

    async def sample(
        self, prompt: ModelInput, *, num_samples: int = 1, sampling_params: SamplingParams | None = None
    ) -> SampleResponse:
        assert sampling_params is not None
        assert sampling_params.max_tokens == 7
        self.seeds.append(sampling_params.seed)
        return SampleResponse(sequences=[sampled(prompt.to_ints()[0])] * num_samples)


@pytest.mark.asyncio
async def test_each_prompt_has_its_group_and_its_seed():
    echo = Echo()
    groups = await sample_groups(echo, [[3, 1], ModelInput.from_ints([4])], 2, sampling_params=_params(5))
    assert [[sample.tokens for sample in group] for group in groups] == [[[3]] * 2, [[4]] * 2]
    assert len(set(echo.seeds)) == 2
    again, other = Echo(), Echo()
    await sample_groups(again, [[9], [9]], 1, sampling_params=_params(5))
    await sample_groups(other, [[9], [9]], 1, sampling_params=_params(6))
    assert again.seeds == echo.seeds
    assert not {*other.seeds} & {*echo.seeds}
    free = Echo()
    await sample_groups(free, [[9]], 1, sampling_params=_params(None))
    assert free.seeds == [None]


def _params(seed: int | None) -> SamplingParams:
    return SamplingParams(max_tokens=7, seed=seed)


@pytest.mark.parametrize(
    ("prompt", "sequence", "inputs", "targets", "weights", "logprobs"),
    [
        ([1, 2], sampled(3, 4, logprobs=[-0.25, -1.0]), [1, 2, 3], [2, 3, 4], [0, 1, 1], [0, -0.25, -1.0]),
        # A tool answers 7, 8 between two turns of the model.
        ([1], [sampled(3), [7, 8], sampled(4)], [1, 3, 7, 8], [3, 7, 8, 4], [1, 0, 0, 1], [-0.5, 0, 0, -0.5]),
    ],
)
def test_a_datum_of_an_answer(
    prompt: Any, sequence: Any, inputs: Any, targets: Any, weights: Any, logprobs: Any
) -> None:
    made = datum_from_sample(prompt, sequence, -1.5)
    fields = {name: tensor.tolist() for name, tensor in made.loss_fn_inputs.items()}
    assert made.model_input.to_ints() == inputs
    assert fields == {
        "target_tokens": targets,
        "weights": weights,
        "logprobs": logprobs,
        "advantages": [-1.5 * weight for weight in weights],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], sampled(1), 1.0), "prompt is empty"),
        (([1], [[2]], 1.0), "no sampled token"),
        (([1], [], 1.0), "no sampled token"),
        (([1], sampled(2, 3, logprobs=[-1.0]), 1.0), "part 0 of sequence has 2 tokens and 1 finite logprobs"),
        (([1], sampled(2, logprobs=[float("nan")]), 1.0), "has 1 tokens and 0 finite logprobs"),
        (([1], [sampled(2), [0.5]], 1.0), "part 1 of sequence: .* must be integers"),
        (([1], sampled(2), float("inf")), "advantage must be a finite number, got inf"),
    ],
)
def test_answers_that_make_no_datum(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        datum_from_sample(*arguments)


def test_the_texts_of_answers():
    tokenizer = ByteTokenizer()
    data = [
        datum_from_sample(list(b"Q: "), [sampled(*b"yes"), list(b" (tool)"), sampled(*b"!")], 1.0),
        Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": list(b"bc")}),
    ]
    assert answer_texts(data, tokenizer) == ["yes!", "bc"]
    with pytest.raises(InvalidData, match="datum 0 has target_tokens of shape"):
        answer_texts(
            [Datum(model_input=ModelInput.from_ints([1]), loss_fn_inputs={"target_tokens": [[1, 2]]})], tokenizer
        )


@pytest.mark.asyncio
async def test_rewards_are_called_at_most_so_many_at_once_and_repeated():
    running, most, calls = 0, 0, []

    async def reward(answer: str) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        calls.append(answer)
        if answer == "b" and calls.count("b") < 3:
            raise OSError("busy")
        return float(ord(answer))

    assert await rewards_of(reward, ["a", "b", "c", "d", "e"], at_once=2, retry=3) == [97.0, 98.0, 99.0, 100.0, 101.0]
    assert most == 2
    assert calls.count("b") == 3
    calls.clear()
    with pytest.raises(OSError, match="busy"):
        await rewards_of(reward, ["a", "b"], retry=2)

    async def no_number(_: str) -> float:
        return float("nan")

    with pytest.raises(InvalidData, match=r"the reward of answers\[0\] must be a finite number, got nan"):
        await rewards_of(no_number, ["a"])


@pytest.mark.asyncio
async def test_a_reference_is_a_forward_pass_or_the_scores_of_a_sampler():
    text = Datum.from_tokens([1], [2, 3, 4]).with_inputs(advantages=[1.0] * 3, custom=[1.0] * 3)
    candidates = datum(2, 1, target_tokens=[[1, 2], [3, 4]], weights=[[1.0, 0.0]] * 2)
    async with AsyncServiceClient.local(model="tiny", device="cpu") as service:
        training = await service.create_lora_training_client("tiny", rank=1, seed=0)
        expected = [
            output["logprobs"].to_numpy() for output in (await training.forward([text, candidates])).loss_fn_outputs
        ]
        for made, logprobs in zip(await with_reference(training, [text, candidates]), expected, strict=True):
            np.testing.assert_array_equal(made.loss_fn_inputs["reference_logprobs"].to_numpy(), logprobs)
        async with await service.create_sampling_client(base_model="tiny") as sampler:
            (made,) = await with_reference(sampler, [text], "base")
    np.testing.assert_allclose(made.loss_fn_inputs["base"].to_numpy(), expected[0], atol=1e-5)
    assert made.loss_fn_inputs.keys() == {*text.loss_fn_inputs, "base"}


def test_batches_cover_every_item_once_an_epoch_and_begin_anywhere():
    of = batches(list("abcdefg"), 2, seed=1)
    taken = list(islice(of(0), 7))
    assert [len({*chain(*taken[at : at + 3])}) for at in (0, 3)] == [6, 6]
    assert taken[:3] != taken[3:6]
    for start in range(7):
        assert list(islice(of(start), 7 - start)) == taken[start:]
    assert list(islice(batches(["a"], 4)(5), 2)) == [["a"], ["a"]]
    for wrong in ([], "abc", 3):
        with pytest.raises(InvalidData, match="data (is empty|must be a list)"):
            batches(wrong, 2)
