"""Data from a teacher: its likeliest tokens and its logprobs, from the embedded service and from made-up answers."""

import asyncio
from typing import Any

import numpy as np
import pytest

from tinkex_py import (
    AsyncServiceClient,
    Datum,
    InvalidData,
    InvalidResponse,
    ModelInput,
    SampleResponse,
    UnsupportedFeature,
)
from tinkex_py.base_losses import Choice, Distillation
from tinkex_py.data import teacher_datums, with_teacher_logprobs


def text(*tokens: int, **fields: Any) -> Datum:
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": list(tokens[1:]), **fields}
    )


DATA = [text(1, 2, 3, 4, weights=[0.0, 1.0, 0.5]), text(9, 8)]


class Answering:
    """A teacher that answers with given scores; None is no answer."""

    def __init__(self, *answers: dict[str, Any] | Exception | None) -> None:
        self.answers = list(answers)
        self.cancelled = 0

    async def sample(self, prompt: ModelInput, **_options: Any) -> SampleResponse:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        return SampleResponse(sequences=[], **answer)


@pytest.mark.asyncio
async def test_the_teachers_probabilities_are_those_of_its_own_forward_pass():
    """With them, the base model is at distance 0 from itself, and the tail has what is left of the mass."""
    async with AsyncServiceClient.local(model="tiny", device="cpu") as service:
        training = await service.create_lora_training_client("tiny", rank=1, seed=0)
        async with await service.create_sampling_client(base_model="tiny") as teacher:
            scored = await teacher_datums(teacher, DATA, k=5)
            told = await with_teacher_logprobs(teacher, DATA)
        for made, forward in zip(scored, (await training.forward(scored)).loss_fn_outputs, strict=True):
            fields = made.loss_fn_inputs
            teacher_logprobs = fields["teacher_logprobs"].to_numpy()
            assert teacher_logprobs.shape == (made.model_input.length, 5)
            np.testing.assert_allclose(forward["logprobs"].to_numpy(), teacher_logprobs, rtol=1e-4, atol=1e-5)
            assert (np.diff(teacher_logprobs, axis=1) <= 0).all()  # the likeliest first
        for made, forward in zip(told, (await training.forward(DATA)).loss_fn_outputs, strict=True):
            field = made.loss_fn_inputs["teacher_logprobs"].to_numpy()
            np.testing.assert_allclose(forward["logprobs"].to_numpy(), field, rtol=1e-4, atol=1e-5)
        loss = Distillation(reference_field="teacher_logprobs")
        output = await training.forward_backward_custom(scored, loss)
        assert output.loss_total == pytest.approx(0.0, abs=1e-4)
        mass = np.exp(scored[0].loss_fn_inputs["teacher_logprobs"].to_numpy()[1:]).sum()
        assert output.base_loss.metrics["tokens"] == 3.0  # the position of weight 0 does not count
        mass += np.exp(scored[1].loss_fn_inputs["teacher_logprobs"].to_numpy()).sum()
        assert output.base_loss.metrics["teacher_mass"] == pytest.approx(mass / 3, rel=1e-5)
        choice = await training.forward_backward_custom(scored, Choice())
        assert choice.base_loss.metrics["accuracy"] == 1.0


@pytest.mark.asyncio
async def test_the_weights_are_the_teachers_probabilities_times_the_old_weights():
    rows = [[(7, -1.0), (5, -2.0)], [(5, -0.5), (7, -3.0)], [(1, -1.0), (2, -1.5)]]
    (made,) = await teacher_datums(Answering({"topk_prompt_logprobs": [None, *rows]}), DATA[:1], k=2)
    assert made.model_input == DATA[0].model_input
    fields = {name: tensor.to_numpy() for name, tensor in made.loss_fn_inputs.items()}
    assert fields["target_tokens"].tolist() == [[7, 5], [5, 7], [1, 2]]
    assert fields["teacher_logprobs"].tolist() == [[-1.0, -2.0], [-0.5, -3.0], [-1.0, -1.5]]
    expected = np.exp([[-1.0, -2.0], [-0.5, -3.0], [-1.0, -1.5]]) * [[0.0], [1.0], [0.5]]
    np.testing.assert_allclose(fields["weights"], expected, rtol=1e-6)


@pytest.mark.asyncio
async def test_rows_of_another_length_are_cut_or_filled_with_impossible_tokens():
    answers = Answering({"topk_prompt_logprobs": [None, [(0, -1.0), (2, -2.0), (4, -3.0), (1, -4.0)]]})
    (made,) = await teacher_datums(answers, DATA[1:], k=3)
    assert made.loss_fn_inputs["target_tokens"].tolist() == [[0, 2, 4]]
    (made,) = await teacher_datums(Answering({"topk_prompt_logprobs": [None, [(0, -1.0), (2, -2.0)]]}), DATA[1:], k=4)
    assert made.loss_fn_inputs["target_tokens"].tolist() == [[0, 2, 1, 3]]
    assert made.loss_fn_inputs["teacher_logprobs"].tolist() == [[-1.0, -2.0, -np.inf, -np.inf]]
    assert made.loss_fn_inputs["weights"].tolist()[0][2:] == [0.0, 0.0]


@pytest.mark.parametrize("rows", [None, [None], [None, None], [None, [(1, -1.0)], [(1, -1.0)]]])
@pytest.mark.asyncio
async def test_a_teacher_that_does_not_score_every_position(rows):
    with pytest.raises(InvalidResponse, match=r"the teacher scored \d of the 1 positions of datum 0"):
        await teacher_datums(Answering({"topk_prompt_logprobs": rows}), DATA[1:])
    scores = None if rows is None else [None if row is None else -1.0 for row in rows]
    with pytest.raises(InvalidResponse, match=r"the teacher scored \d of the 1 positions of datum 0"):
        await with_teacher_logprobs(Answering({"prompt_logprobs": scores}), DATA[1:])


@pytest.mark.asyncio
async def test_the_first_failure_ends_the_other_requests():
    teacher = Answering(None, UnsupportedFeature("no logprobs"))
    with pytest.raises(UnsupportedFeature, match="no logprobs"):
        await with_teacher_logprobs(teacher, DATA)
    assert teacher.cancelled == 1


@pytest.mark.parametrize(
    ("datum", "message"),
    [
        (
            Datum(model_input=ModelInput.from_ints([1]), loss_fn_inputs={"target_tokens": [[2, 3]]}),
            r"target_tokens of datum 0 have shape \(1, 2\), .* one target per position",
        ),
        (
            Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [3, 4]}),
            "target_tokens of datum 0 are not the tokens that follow in its model_input",
        ),
    ],
)
@pytest.mark.asyncio
async def test_data_that_no_teacher_can_score(datum, message):
    for build in (teacher_datums, with_teacher_logprobs):
        with pytest.raises(InvalidData, match=message):
            await build(Answering(), [datum])
