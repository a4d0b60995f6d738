"""Datums from texts, pairs and rows."""

import datasets
import pytest
import torch

from tests.integrations.chat_tokenizers import (
    BRACKETS,
    CHATML,
    adding_a_start,
    byte_tokenizer,
    learnt_text,
    said,
    whole,
)
from tinkex_py import AsyncServiceClient, Datum, InvalidData, Pipeline
from tinkex_py.base_losses import DPO
from tinkex_py.integrations.huggingface import chat_datum, datums_from, preference_datums, text_datum
from tinkex_py.local.tokenizers import ByteTokenizer


def test_a_text_after_a_prompt():
    datum = text_datum(ByteTokenizer(), "ab", prompt="xyz")
    assert whole(None, datum) == [*b"xyzab", 257]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 0, 1, 1, 1]


def test_a_text_alone_is_learnt_behind_its_first_token():
    datum = text_datum(ByteTokenizer(), "abc", append_end=False)
    assert whole(None, datum) == list(b"abc")
    assert datum.loss_fn_inputs["weights"].tolist() == [1, 1]


def test_the_token_that_begins_every_text_comes_once_and_first():
    tokenizer = adding_a_start()
    assert tokenizer.decode(tokenizer.encode("a")) == "<s>a"
    datum = text_datum(tokenizer, "b", prompt="a")
    assert tokenizer.decode(whole(tokenizer, datum)) == "<s>ab</s>"
    assert learnt_text(tokenizer, datum) == ["b</s>"]
    assert learnt_text(tokenizer, text_datum(tokenizer, "ab")) == ["ab</s>"]
    chat = chat_datum(tokenizer, [said("user", "a"), said("assistant", "b")])
    assert tokenizer.decode(whole(tokenizer, chat)) == "<s>[INST] a [/INST]b</s>"


def test_cut_texts():
    assert whole(None, text_datum(ByteTokenizer(), "abc", prompt="x", max_length=2)) == list(b"xab")
    with pytest.raises(InvalidData, match="max_length=2 cuts off all that is to be learnt: it begins at token 3 of 5"):
        text_datum(ByteTokenizer(), "a", prompt="xyz", max_length=2)


def test_texts_that_cannot_be_learnt():
    with pytest.raises(InvalidData, match="there is nothing to learn"):
        text_datum(ByteTokenizer(), "a", append_end=False)
    with pytest.raises(InvalidData, match="there is nothing to learn"):
        text_datum(ByteTokenizer(), "", prompt="abc", append_end=False)
    with pytest.raises(InvalidData, match="text must be a text, got a NoneType"):
        text_datum(ByteTokenizer(), None)
    endless = byte_tokenizer.__wrapped__(CHATML)
    endless.eos_token = None
    with pytest.raises(InvalidData, match="no token that ends a text: pass append_end=False"):
        text_datum(endless, "ab")


def test_pairs_of_texts():
    chosen, rejected = preference_datums(ByteTokenizer(), "yes", "no", prompt="q: ")
    assert (whole(None, chosen), whole(None, rejected)) == ([*b"q: yes", 257], [*b"q: no", 257])
    assert [sum(datum.loss_fn_inputs["weights"].tolist()) for datum in (chosen, rejected)] == [4, 3]


def test_pairs_of_conversations_in_the_forms_that_rows_have():
    tokenizer = byte_tokenizer(CHATML)
    before = [said("user", "Hi"), said("assistant", "Yes?"), said("user", "Wet?")]
    yes, no = [said("assistant", "Yes")], [said("assistant", "No")]
    forms = [
        preference_datums(tokenizer, yes, no, prompt=before),
        preference_datums(tokenizer, "Yes", "No", prompt=before),
        preference_datums(tokenizer, before + yes, before + no),
    ]
    assert forms[0] == forms[1] == forms[2]
    # Only the answer counts, not what was said before.
    assert [learnt_text(tokenizer, datum) for datum in forms[0]] == [["Yes<|im_end|>"], ["No<|im_end|>"]]
    short = preference_datums(tokenizer, yes, no, prompt="Wet?")
    assert short[0] == chat_datum(tokenizer, [said("user", "Wet?"), *yes])


def test_a_bad_answer_is_named():
    with pytest.raises(InvalidData, match="^rejected: no message has the role 'assistant'"):
        preference_datums(byte_tokenizer(CHATML), [said("assistant", "Yes")], [said("tool", "No")], prompt="Wet?")


@pytest.mark.asyncio
async def test_pairs_are_what_the_ready_made_loss_wants():
    """At the start the model is its own reference: the loss is log 2 whatever the pairs are."""
    rows = [{"prompt": "a?", "chosen": "yes", "rejected": "no"}, {"prompt": "b?", "chosen": "no", "rejected": "never"}]
    tokenizer = ByteTokenizer()
    data = list(datums_from(rows, lambda row: preference_datums(tokenizer, **row)))
    async with AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=4, seed=0)
        reference = [torch.tensor(out["logprobs"].tolist()) for out in (await training.forward(data)).loss_fn_outputs]
        pipeline = Pipeline(DPO(reference=lambda data: reference))
        output = await training.forward_backward_custom(data, pipeline)
    assert output.base_loss.value == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    assert output.base_loss.metrics["pairs"] == 2.0


def test_rows_of_a_data_set():
    rows = [[said("user", "Hi"), said("assistant", "Ho")], [said("user", "Ho"), said("assistant", "Hi")]]
    tokenizer = byte_tokenizer(CHATML)
    expected = [chat_datum(tokenizer, messages) for messages in rows]
    dataset = datasets.Dataset.from_dict({"messages": rows})
    for source in (dataset, dataset.to_iterable_dataset(), [{"messages": messages} for messages in rows]):
        assert list(datums_from(source, lambda row: chat_datum(tokenizer, row["messages"]))) == expected


def test_rows_are_rendered_one_by_one():
    seen = []

    def rows():
        for number in range(3):
            seen.append(number)
            yield {"text": "abc"}

    datums = datums_from(rows(), lambda row: text_datum(ByteTokenizer(), row["text"]))
    next(datums)
    assert seen == [0]
    assert len(list(datums)) == 2


def test_a_bad_row_is_named_and_those_before_it_are_there():
    rows = [{"text": "abc"}, {"text": "abc"}, {"text": None}]
    datums = datums_from(rows, lambda row: text_datum(ByteTokenizer(), row["text"]))
    assert isinstance(next(datums), Datum)
    assert isinstance(next(datums), Datum)
    with pytest.raises(InvalidData, match="^row 2: text must be a text, got a NoneType"):
        next(datums)


def test_bad_rows():
    tokenizer = byte_tokenizer(BRACKETS)
    with pytest.raises(InvalidData, match=r"^row 0 has no 'messages' \(it has \['text'\]\)"):
        list(datums_from([{"text": "a"}], lambda row: chat_datum(tokenizer, row["messages"])))
    with pytest.raises(InvalidData, match="^row 0: render must give a Datum or several, got a str"):
        list(datums_from(["abc"], lambda row: ["abc"]))
    with pytest.raises(InvalidData, match="^row 0: render must give a Datum or several, got a NoneType"):
        list(datums_from(["abc"], lambda row: None))
