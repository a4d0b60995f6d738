"""Datums from texts, pairs and rows."""

import datasets
import pytest

from tests.data.chat_tokenizers import CHATML, adding_a_start, byte_tokenizer, learned_text, said, whole
from tinkex_py import Datum, InvalidData
from tinkex_py.data import chat_datum, datums_from, preference_datums, text_datum
from tinkex_py.local.tokenizers import ByteTokenizer

END = 257


@pytest.mark.parametrize(
    ("text", "options", "tokens", "weights"),
    [
        ("ab", {"prompt": "xyz"}, [*b"xyzab", END], [0, 0, 1, 1, 1]),
        ("abc", {"append_end": False}, list(b"abc"), [1, 1]),  # nothing predicts the first token
        ("abc", {"prompt": "x", "max_length": 2}, list(b"xab"), [1, 1]),
    ],
)
def test_texts(text, options, tokens, weights):
    datum = text_datum(ByteTokenizer(), text, **options)
    assert whole(None, datum) == tokens
    assert datum.loss_fn_inputs["weights"].tolist() == weights


def test_the_bos_token_comes_once_and_first():
    tokenizer = adding_a_start()
    assert tokenizer.decode(tokenizer.encode("a")) == "<s>a"
    datum = text_datum(tokenizer, "b", prompt="a")
    assert tokenizer.decode(whole(tokenizer, datum)) == "<s>ab</s>"
    assert learned_text(tokenizer, datum) == ["b</s>"]
    assert learned_text(tokenizer, text_datum(tokenizer, "ab")) == ["ab</s>"]
    chat = chat_datum(tokenizer, [said("user", "a"), said("assistant", "b")])
    assert tokenizer.decode(whole(tokenizer, chat)) == "<s>[INST] a [/INST]b</s>"


def endless():
    tokenizer = byte_tokenizer.__wrapped__(CHATML)
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("make", "text", "options", "reason"),
    [
        (ByteTokenizer, "a", {"append_end": False}, "there is nothing to learn"),
        (ByteTokenizer, "", {"prompt": "abc", "append_end": False}, "there is nothing to learn"),
        (ByteTokenizer, None, {}, "text must be a str, got a NoneType"),
        (ByteTokenizer, "a", {"prompt": "xyz", "max_length": 2}, "max_length=2 cuts off .* begins at token 3 of 5"),
        (endless, "ab", {}, "the tokenizer has no EOS token: pass append_end=False"),
    ],
)
def test_texts_that_cannot_be_learned(make, text, options, reason):
    with pytest.raises(InvalidData, match=reason):
        text_datum(make(), text, **options)


def test_pairs():
    chosen, rejected = preference_datums(ByteTokenizer(), "yes", "no", prompt="q: ")
    assert (whole(None, chosen), whole(None, rejected)) == ([*b"q: yes", END], [*b"q: no", END])
    assert [sum(datum.loss_fn_inputs["weights"].tolist()) for datum in (chosen, rejected)] == [4, 3]
    tokenizer = byte_tokenizer(CHATML)
    before = [said("user", "Hi"), said("assistant", "Yes?"), said("user", "Wet?")]
    yes, no = [said("assistant", "Yes")], [said("assistant", "No")]
    forms = [
        preference_datums(tokenizer, yes, no, prompt=before),
        preference_datums(tokenizer, "Yes", "No", prompt=before),
        preference_datums(tokenizer, before + yes, before + no),
    ]
    assert forms[0] == forms[1] == forms[2]
    # Only the answer is learned, not an earlier turn of the assistant.
    assert [learned_text(tokenizer, datum) for datum in forms[0]] == [["Yes<|im_end|>"], ["No<|im_end|>"]]
    short = preference_datums(tokenizer, yes, no, prompt="Wet?")
    assert short[0] == chat_datum(tokenizer, [said("user", "Wet?"), *yes])
    with pytest.raises(InvalidData, match="^rejected: no message has the role 'assistant'"):
        preference_datums(tokenizer, yes, [said("tool", "No")], prompt="Wet?")


def test_rows_of_a_data_set():
    rows = [[said("user", "Hi"), said("assistant", "Ho")], [said("user", "Ho"), said("assistant", "Hi")]]
    tokenizer = byte_tokenizer(CHATML)
    expected = [chat_datum(tokenizer, messages) for messages in rows]
    dataset = datasets.Dataset.from_dict({"messages": rows})
    for source in (dataset, dataset.to_iterable_dataset(), [{"messages": messages} for messages in rows]):
        assert list(datums_from(source, lambda row: chat_datum(tokenizer, row["messages"]))) == expected


def test_rows_are_rendered_lazily_and_a_bad_one_is_named():
    seen = []

    def rows():
        for text in ("abc", "abc", None):
            seen.append(text)
            yield {"text": text}

    datums = datums_from(rows(), lambda row: text_datum(ByteTokenizer(), row["text"]))
    assert isinstance(next(datums), Datum)
    assert seen == ["abc"]
    assert isinstance(next(datums), Datum)
    with pytest.raises(InvalidData, match="^row 2: text must be a str, got a NoneType"):
        next(datums)


@pytest.mark.parametrize(
    ("render", "reason"),
    [
        (lambda row: row["messages"], r"^row 0 has no 'messages' \(it has \['text'\]\)"),
        (lambda row: ["abc"], "^row 0: render must return one or more Datum, got a str"),
        (lambda row: None, "^row 0: render must return one or more Datum, got a NoneType"),
    ],
)
def test_bad_rows(render, reason):
    with pytest.raises(InvalidData, match=reason):
        list(datums_from([{"text": "a"}], render))
