"""Datum, ModelInput and the parameters of requests."""

import json
import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tinker import types as official

from tinkex_py import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    InvalidData,
    LoraConfig,
    ModelInput,
    SamplingParams,
    TensorData,
)

SECRET = 31337


def test_model_input_from_ints():
    made = ModelInput.from_ints([1, 2, 3])
    assert (made.length, made.to_ints()) == (3, [1, 2, 3])
    assert ModelInput.from_ints(np.array([1, 2, 3])) == made
    assert ModelInput.from_ints(np.array([1, 2, 3], np.uint16)) == made
    assert ModelInput.from_ints(torch.tensor([1, 2, 3])) == made  # type: ignore[arg-type]
    assert ModelInput.from_ints(()).length == 0


def test_model_input_grows_by_copies():
    empty = ModelInput.empty()
    one = empty.append(EncodedTextChunk(tokens=[1, 2]))
    two = one.append_int(3)
    assert (empty.length, one.to_ints(), two.to_ints()) == (0, [1, 2], [1, 2, 3])
    assert len(two.chunks) == 2


def test_model_input_from_text():
    class Bytes:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    assert ModelInput.from_text("hi", Bytes()).to_ints() == [104, 105]
    with pytest.raises(InvalidData, match="encode"):
        ModelInput.from_text("private", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([-1], "-1"),
        ([2**31], str(2**31)),
        ([[1, 2]], r"\(1, 2\)"),
        ([1.5], "float64"),
        (["a"], "integers"),
        ("text", "flat"),
        (5, r"\(\)"),
        ([True], "bool"),
        ([None], "object"),
        ([2**70], "integers"),
    ],
)
def test_tokens_that_are_none(tokens: Any, message: str):
    with pytest.raises(InvalidData, match=message):
        ModelInput.from_ints(tokens)


def test_ragged_tokens_are_typed():
    with pytest.raises(InvalidData):
        ModelInput.from_ints([[1], [1, 2]])  # type: ignore[list-item]


def test_tokens_never_show():
    made = ModelInput.from_ints([SECRET, 5])
    example = Datum(model_input=made, loss_fn_inputs={"target_tokens": [SECRET, 5]})
    assert str(SECRET) not in repr(made) + str(made) + repr(example) + str(example)
    for broken in ([SECRET, -1], [SECRET, 0.5], [[SECRET]]):
        with pytest.raises(InvalidData) as caught:
            ModelInput.from_ints(broken)  # type: ignore[arg-type]
        assert str(SECRET) not in str(caught.value)
    with pytest.raises(InvalidData) as caught:
        Datum(model_input=made, loss_fn_inputs={"target_tokens": [[SECRET], [1, 2]]})
    assert str(SECRET) not in str(caught.value)
    with pytest.raises(InvalidData) as caught:
        Datum(model_input=[SECRET], loss_fn_inputs={})  # type: ignore[arg-type]
    assert str(SECRET) not in str(caught.value)
    assert "model_input" in str(caught.value)


def test_tokens_are_a_read_only_copy():
    array = np.array([1, 2], np.int32)
    made = ModelInput.from_ints(array)
    array[0] = 9
    assert made.to_ints() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        made.chunks[0].tokens[0] = 9


def test_rows_132_to_134_a_datum():
    made = Datum(
        model_input=ModelInput.from_ints([1, 2]),
        loss_fn_inputs={
            "target_tokens": [2, 3],
            "weights": [0, 1],
            "mask": np.array([1.0, 0.0]),
            "reference_logprobs": torch.tensor([-0.5, -0.25], dtype=torch.bfloat16),
            "ready": TensorData.of([1]),
        },
    )
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in made.loss_fn_inputs.items()}
    assert kinds == {
        "target_tokens": ("int64", (2,)),
        "weights": ("float32", (2,)),
        "mask": ("float32", (2,)),
        "reference_logprobs": ("float32", (2,)),
        "ready": ("int64", (1,)),
    }
    assert Datum.model_validate_json(made.model_dump_json()) == made
    assert pickle.loads(pickle.dumps(made)) == made


def test_a_datum_with_candidates():
    targets = [[2, 3], [4, 5]]
    made = Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": targets})
    assert made.loss_fn_inputs["target_tokens"].shape == (2, 2)


@pytest.mark.parametrize("inputs", [None, [1, 2], {"target_tokens": "text"}, {"target_tokens": None}])
def test_loss_inputs_that_are_none(inputs: Any):
    with pytest.raises(InvalidData, match="loss_fn_inputs"):
        Datum(model_input=ModelInput.from_ints([1]), loss_fn_inputs=inputs)


def test_the_field_is_named():
    with pytest.raises(InvalidData, match=r"'advantages'.*equal length"):
        Datum(model_input=ModelInput.from_ints([1]), loss_fn_inputs={"advantages": [[1.0], [1.0, 2.0]]})


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (LoraConfig, "rank", 0),
        (LoraConfig, "rank", -3),
        (LoraConfig, "rank", 1.5),
        (AdamParams, "learning_rate", -0.1),
        (AdamParams, "learning_rate", math.nan),
        (AdamParams, "learning_rate", math.inf),
        (AdamParams, "beta1", 1.0),
        (AdamParams, "beta2", -0.5),
        (AdamParams, "beta1", math.nan),
        (AdamParams, "eps", -1e-9),
        (AdamParams, "weight_decay", -1.0),
        (AdamParams, "grad_clip_norm", math.inf),
        (SamplingParams, "max_tokens", 0),
        (SamplingParams, "temperature", -1.0),
        (SamplingParams, "temperature", math.nan),
        (SamplingParams, "top_k", -2),
        (SamplingParams, "top_p", 0.0),
        (SamplingParams, "top_p", 1.5),
        (SamplingParams, "top_p", math.nan),
    ],
)
def test_parameters_out_of_range_name_field_and_value(cls: Any, field: str, value: float):
    with pytest.raises(InvalidData) as caught:
        cls(**{field: value})
    assert cls.__name__ in str(caught.value)
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)


def test_lora_must_train_something():
    with pytest.raises(InvalidData, match="train_"):
        LoraConfig(train_mlp=False, train_attn=False, train_unembed=False)


@pytest.mark.parametrize(
    ("made", "plain"),
    [
        (
            AdamParams(),
            {
                "learning_rate": 1e-4,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-12,
                "weight_decay": 0.0,
                "grad_clip_norm": 0.0,
            },
        ),
        (LoraConfig(), {"rank": 32, "seed": None, "train_unembed": True, "train_mlp": True, "train_attn": True}),
        (
            SamplingParams(),
            {"max_tokens": None, "seed": None, "stop": None, "temperature": 1.0, "top_k": -1, "top_p": 1.0},
        ),
    ],
)
def test_defaults_of_the_wire_and_round_trip(made: Any, plain: dict[str, Any]):
    assert json.loads(made.model_dump_json()) == plain
    assert type(made).model_validate_json(made.model_dump_json()) == made
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(Exception, match="frozen"):
        setattr(made, next(iter(plain)), 1)


@pytest.mark.parametrize("stop", [None, [], "END", ["a", "b"], [1, 2]])
def test_stop_keeps_its_kind(stop: Any):
    made = SamplingParams(stop=stop)
    assert json.loads(made.model_dump_json())["stop"] == stop


def test_unknown_parameters_are_refused():
    """A typo in an optional parameter must not train with the default in silence."""
    with pytest.raises((InvalidData, TypeError), match="learning_rat"):
        AdamParams(learning_rat=0.1)  # type: ignore[call-arg]


def test_tokens_from_tensors_of_any_kind():
    assert ModelInput.from_ints(torch.tensor([1, 2])).to_ints() == [1, 2]
    for tokens in (torch.tensor([1.0], requires_grad=True), torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")):
        with pytest.raises(InvalidData):
            ModelInput.from_ints(tokens)


def test_a_models_name_is_no_tokenizer():
    with pytest.raises(InvalidData, match="tokenizer must be an object with encode"):
        ModelInput.from_text("some text", "utf-8")


@pytest.mark.parametrize(
    ("prompt", "completion", "inputs", "targets", "weights"),
    [
        ([1, 2], [3, 4], [1, 2, 3], [2, 3, 4], [0, 1, 1]),
        ([1], [2], [1], [2], [1]),
        ([], [7, 8, 9], [7, 8], [8, 9], [1, 1]),  # nothing predicts the first token
        (np.array([5, 6]), torch.tensor([7]), [5, 6], [6, 7], [0, 1]),
    ],
)
def test_a_datum_from_tokens(prompt, completion, inputs, targets, weights):
    made = Datum.from_tokens(prompt, completion)
    assert made.model_input.to_ints() == inputs
    assert {name: tensor.tolist() for name, tensor in made.loss_fn_inputs.items()} == {
        "target_tokens": targets,
        "weights": weights,
    }


@pytest.mark.parametrize(("prompt", "completion"), [([], []), ([1, 2], []), ([], [1])])
def test_a_datum_without_a_prediction_to_learn_is_refused(prompt, completion):
    with pytest.raises(InvalidData, match="nothing to learn"):
        Datum.from_tokens(prompt, completion)


def test_a_datum_from_text():
    class Bytes:
        eos_token_id = 0

        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    assert Datum.from_text(Bytes(), "ab", "c") == Datum.from_tokens([97, 98], [99, 0])
    assert Datum.from_text(Bytes(), "ab", "c", append_end=False) == Datum.from_tokens([97, 98], [99])
    with pytest.raises(InvalidData, match="EOS"):
        Datum.from_text(type("Endless", (), {"encode": Bytes.encode})(), "a", "b")


def test_a_datum_with_other_inputs_is_a_copy():
    first = Datum.from_tokens([1], [2, 3])
    second = first.with_inputs(weights=[0.5, 0.25], advantages=[1, 2])
    assert set(first.loss_fn_inputs) == {"target_tokens", "weights"}
    assert second.loss_fn_inputs["weights"].tolist() == [0.5, 0.25]
    assert (second.loss_fn_inputs["advantages"].dtype, second.model_input) == ("float32", first.model_input)
    with pytest.raises(InvalidData, match="label"):
        first.with_inputs(label="x")


def test_datums_of_the_official_sdk():
    sparse = torch.zeros(2, 40, dtype=torch.int64)
    sparse[0, 3], sparse[1, 39] = 5, 6
    given = official.Datum(
        model_input=official.ModelInput(
            chunks=[official.EncodedTextChunk(tokens=[1]), official.EncodedTextChunk(tokens=[2])]
        ),
        loss_fn_inputs={"target_tokens": sparse, "weights": [[0.5] * 40] * 2},
    )
    made = Datum.of(given)
    assert [chunk.tokens.tolist() for chunk in made.model_input.chunks] == [[1], [2]]
    assert made.loss_fn_inputs["target_tokens"].is_sparse
    assert np.array_equal(made.loss_fn_inputs["target_tokens"].to_numpy(), sparse.numpy())
    assert made.loss_fn_inputs["weights"].tolist() == [[0.5] * 40] * 2
    assert Datum.of(made) is made


def test_a_chunk_of_a_later_official_sdk_is_named():
    chunk = SimpleNamespace(type="video", data=b"private")
    given = SimpleNamespace(model_input=SimpleNamespace(chunks=[chunk]), loss_fn_inputs={"target_tokens": [1]})
    with pytest.raises(InvalidData, match="'video'") as caught:
        Datum.of(given)
    assert "private" not in str(caught.value)
    with pytest.raises(InvalidData, match="got a dict"):
        Datum.of({})
