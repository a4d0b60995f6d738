"""Rows as people have them: a datum, or an error with the row, the reason and the way out.

Every test names the public reports (r01, r03, ...) whose kind it holds.
"""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from tests.data.chat_tokenizers import CHATML, byte_tokenizer, learned_text, said
from tinkex_py import Datum, InvalidData, ModelInput
from tinkex_py.data.datums import chat_datum, datums_from, preference_datums, text_datum
from tinkex_py.data.rows import plain_messages, plain_rows
from tinkex_py.runs.pairs import read_pairs

CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.get('content') %}{{ m['content'] }}{% endif %}"
    "{% for c in m.get('tool_calls') or [] %}{{ c.function.name + ' ' + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HALVES = ["hi \ud83d there", "\ude00"]


def called(question: str, name: str, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [said("user", question), {**said("assistant", None), "tool_calls": [call]}]}


def whole(datum: Datum) -> str:
    tokenizer = byte_tokenizer(CHATML)
    return tokenizer.decode([*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()[-1]])


# Nulls of tables


@pytest.mark.parametrize("streamed", [False, True])
def test_r01_nulls_that_a_table_added_are_not_learned(streamed: bool):
    rows = [called("weather?", "get_weather", city="Paris"), called("time?", "get_time", zone="CET")]
    tokenizer = byte_tokenizer(CALLS)
    table = datasets.Dataset.from_list(rows)
    source = table.to_iterable_dataset() if streamed else table

    def learned(rows: Any) -> list[Any]:
        return [
            learned_text(tokenizer, datum)
            for datum in datums_from(rows, lambda r: chat_datum(tokenizer, r["messages"]))
        ]

    assert (
        learned(source)
        == learned(rows)
        == [['get_weather {"city": "Paris"}<|im_end|>'], ['get_time {"zone": "CET"}<|im_end|>']]
    )
    by_hand = [learned_text(tokenizer, chat_datum(tokenizer, row["messages"])) for row in table]
    assert by_hand == learned(rows)


def test_r01_a_null_that_a_user_wrote_stays():
    tokenizer = byte_tokenizer(CALLS)
    row = called("weather?", "get_weather", city="Paris", zone=None)
    assert learned_text(tokenizer, chat_datum(tokenizer, row["messages"])) == [
        'get_weather {"city": "Paris", "zone": null}<|im_end|>'
    ]


# Whole conversations as answers

ASK = said("user", "Why is the sky blue?")
RIGHT, WRONG = said("assistant", "Rayleigh."), said("assistant", "Paint.")
QUESTION_ONCE = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nRayleigh.<|im_end|>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK["content"], "chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]},
        {"prompt": [ASK], "chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]},
        {"prompt": [ASK], "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": [ASK], "chosen": "Rayleigh.", "rejected": "Paint."},
        {"chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]},
        {"prompt": np.array([ASK]), "chosen": np.array([ASK, RIGHT]), "rejected": np.array([ASK, WRONG])},
        {"prompt": (ASK,), "chosen": ({**ASK, "name": None}, RIGHT), "rejected": [ASK, WRONG]},
    ],
)
def test_r03_the_question_stands_once(row: dict[str, Any]):
    chosen, rejected = preference_datums(byte_tokenizer(CHATML), **row)
    assert whole(chosen) == QUESTION_ONCE
    assert whole(rejected) == QUESTION_ONCE.replace("Rayleigh", "Paint")


@pytest.mark.parametrize("first", [said("user", "Another question?"), said("system", "Be brief.")])
def test_r03_an_answer_that_begins_another_conversation_is_refused(first: dict[str, str]):
    with pytest.raises(
        InvalidData, match="chosen: the answer is a whole conversation that does not begin with the prompt"
    ):
        preference_datums(byte_tokenizer(CHATML), [first, RIGHT], [WRONG], prompt=[ASK])


# Pairs that became equal


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"chosen": "the answer is yes", "rejected": "the answer is no", "prompt": "q: ", "max_length": 10},
            "max_length=10",
        ),
        ({"chosen": "same", "rejected": "same", "prompt": "q: "}, "are equal, so nothing"),
        ({"chosen": [ASK, RIGHT], "rejected": [ASK, RIGHT]}, "are equal, so nothing"),
    ],
)
def test_r04_pairs_without_a_difference_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(InvalidData, match=reason):
        preference_datums(byte_tokenizer(CHATML), **options)


# Containers


def from_parquet(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    file = io.BytesIO()
    pd.DataFrame(rows).to_parquet(file)
    return pd.read_parquet(io.BytesIO(file.getvalue())).to_dict("records")


def test_r06_parquet_through_pandas_gives_the_datums_of_the_rows():
    tokenizer, rows = (
        byte_tokenizer(CALLS),
        [called("weather?", "get_weather", day="Monday"), called("time?", "get_time", zone="CET")],
    )
    rendered = [chat_datum(tokenizer, row["messages"]) for row in rows]
    assert [chat_datum(tokenizer, row["messages"]) for row in from_parquet(rows)] == rendered


def test_r06_numbers_of_numpy_are_plain_numbers():
    given = np.array([{"role": "user", "content": "a", "n": np.int64(3), "x": np.array([1.5, 2.0])}])
    (message,) = plain_messages(given)  # type: ignore[misc]
    assert json.dumps(message) == '{"role": "user", "content": "a", "n": 3, "x": [1.5, 2.0]}'


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (datasets.DatasetDict(train=datasets.Dataset.from_list([{"t": "a"}])), "DatasetDict of 'train': pass rows"),
        ({"train": [{"t": "a"}]}, "a dict of 'train'"),
        (pd.DataFrame([{"t": "a"}]), "data frame"),
        ("text", "an iterable of rows, got a str"),
        (5, "an iterable of rows, got a int"),
        (None, "an iterable of rows, got a NoneType"),
    ],
)
def test_what_is_no_rows_is_refused_with_the_way_out(rows: Any, reason: str):
    with pytest.raises(InvalidData, match=reason):
        list(datums_from(rows, lambda row: text_datum(byte_tokenizer(CHATML), row["t"])))
    with pytest.raises(InvalidData, match=reason):
        list(plain_rows(rows))


# Half characters


@pytest.mark.parametrize("bad", HALVES)
def test_r07_half_a_character_is_refused_wherever_a_text_enters(bad: str):
    tokenizer = byte_tokenizer(CHATML)
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": bad}}}
    entries = [
        lambda: text_datum(tokenizer, bad),
        lambda: text_datum(tokenizer, "a", prompt=bad),
        lambda: ModelInput.from_text(bad, tokenizer),
        lambda: chat_datum(tokenizer, [said("user", bad), said("assistant", "b")]),
        lambda: chat_datum(tokenizer, [said("user", "a"), {**said("assistant", "b"), "tool_calls": [call]}]),
        lambda: preference_datums(tokenizer, bad, "b"),
        lambda: preference_datums(tokenizer, "a", "b", prompt=[said("user", bad)]),
    ]
    for entry in entries:
        with pytest.raises(InvalidData, match="half a character"):
            entry()


def test_r07_the_error_has_the_number_of_the_row_and_the_field():
    tokenizer = byte_tokenizer(CHATML)
    rows = [{"t": "ok"}, {"t": HALVES[0]}]
    with pytest.raises(InvalidData, match="row 1: .*half a character.* at position 3"):
        list(datums_from(rows, lambda row: text_datum(tokenizer, row["t"])))
    with pytest.raises(InvalidData, match=r"row 1: message 0: \['content'\] contains half a character"):
        list(datums_from(rows, lambda row: chat_datum(tokenizer, [said("user", row["t"]), said("assistant", "b")])))


def test_other_errors_of_render_have_the_number_of_the_row():
    with pytest.raises(ZeroDivisionError) as caught:
        list(datums_from([1, 0], lambda row: text_datum(byte_tokenizer(CHATML), str(1 / row))))
    assert caught.value.__notes__ == ["render failed on row 1"]


# JSON Lines


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_json_lines_end_at_line_feeds_only(tmp_path: Path, mark: str, end: str, inside: str):
    pairs = [{"prompt": f"a{inside}b", "answer": "c"}, {"prompt": "d", "answer": f"{inside}"}]
    text = end.join(json.dumps(pair, ensure_ascii=inside < " ") for pair in pairs)
    path = tmp_path / "pairs.jsonl"
    path.write_bytes((mark + text + end).encode())
    assert [pair.model_dump() for pair in read_pairs(path)] == pairs
