"""Conversations as datums, against tokens and masks that are put together by hand."""

import sys

import pytest
from hypothesis import given, settings, strategies as st

from tests.integrations.chat_tokenizers import (
    BRACKETS,
    CHATML,
    FORGETFUL,
    MARKED,
    PLAIN,
    byte_tokenizer,
    chatml_by_hand,
    learnt_text,
    said,
    whole,
)
from tinkex_py import InvalidData, MissingExtra
from tinkex_py.integrations.huggingface import chat_datum
from tinkex_py.local.tokenizers import ByteTokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "Is it wet?"},
    {"role": "assistant", "content": "Yes, é"},
]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_only_what_the_assistant_says_has_weight(template, turns):
    tokenizer = byte_tokenizer(template)
    datum = chat_datum(tokenizer, CONVERSATION, turns=turns)
    tokens, mask = chatml_by_hand(tokenizer, CONVERSATION, turns)
    assert whole(tokenizer, datum) == tokens
    assert datum.loss_fn_inputs["weights"].tolist() == mask[1:]
    expected = ["Hello there<|im_end|>", "Yes, é<|im_end|>"]
    assert learnt_text(tokenizer, datum) == (expected if turns == "all" else expected[1:])


# Letters that are no marks of the template; a content may hold line breaks and be empty.
CONTENTS = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=8)
CONVERSATIONS = st.lists(
    st.builds(said, st.sampled_from(["user", "assistant", "tool"]), CONTENTS), min_size=1, max_size=6
).map(lambda messages: [said("system", "s"), *messages, said("assistant", "a")])


@settings(max_examples=40)
@given(messages=CONVERSATIONS, template=st.sampled_from([CHATML, MARKED]), turns=st.sampled_from(["all", "last"]))
def test_any_conversation(messages, template, turns):
    tokenizer = byte_tokenizer(template)
    datum = chat_datum(tokenizer, messages, turns=turns)
    tokens, mask = chatml_by_hand(tokenizer, messages, turns)
    assert whole(tokenizer, datum) == tokens
    assert datum.loss_fn_inputs["weights"].tolist() == mask[1:]


def test_a_template_without_headers():
    tokenizer = byte_tokenizer(BRACKETS)
    datum = chat_datum(tokenizer, CONVERSATION[1:])
    assert learnt_text(tokenizer, datum) == ["Hello there</s>", "Yes, é</s>"]
    text = "<s>[INST] Hi [/INST]Hello there</s>[INST] Is it wet? [/INST]Yes, é</s>"
    assert tokenizer.decode(whole(tokenizer, datum)) == text


def test_a_template_without_special_tokens_ends_a_turn_with_its_line():
    tokenizer = byte_tokenizer(PLAIN)
    assert learnt_text(tokenizer, chat_datum(tokenizer, CONVERSATION)) == ["Hello there\n", "Yes, é\n"]


def test_a_conversation_that_ends_with_a_question():
    for template in (CHATML, MARKED):
        tokenizer = byte_tokenizer(template)
        datum = chat_datum(tokenizer, CONVERSATION[:4], turns="last")
        assert learnt_text(tokenizer, datum) == ["Hello there<|im_end|>"]


def test_a_token_over_the_border_of_a_turn_is_an_error_that_names_it():
    tokenizer = byte_tokenizer(PLAIN, merges=(("Ġ", "Y"),))  # "assistant: " + "Yes" has " Y" as one token
    with pytest.raises(InvalidData, match="message 4, a turn of the assistant, cannot be told from the rest"):
        chat_datum(tokenizer, CONVERSATION)


def test_a_template_that_forgets_can_only_learn_the_last_turn():
    tokenizer = byte_tokenizer(FORGETFUL)
    messages = [
        said("user", "a"),
        said("assistant", "<think>b</think>c"),
        said("user", "d"),
        said("assistant", "<think>e</think>f"),
    ]
    with pytest.raises(InvalidData, match=r"message 1, .* or make one datum for each turn with turns='last'"):
        chat_datum(tokenizer, messages)
    datum = chat_datum(tokenizer, messages, turns="last")
    assert learnt_text(tokenizer, datum) == ["<think>e</think>f<|im_end|>"]
    assert "b" not in tokenizer.decode(whole(tokenizer, datum))


def test_the_marks_of_a_template_decide_what_is_learnt():
    tokenizer = byte_tokenizer(CHATML)
    without_end = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
    datum = chat_datum(tokenizer, CONVERSATION, chat_template=without_end)
    assert learnt_text(tokenizer, datum) == ["Hello there", "Yes, é"]


def test_marks_that_miss_a_turn_are_an_error():
    tokenizer = byte_tokenizer(MARKED.replace("message['role'] == 'assistant'", "loop.last"))
    with pytest.raises(InvalidData, match="2 turns of the assistant, but the marks of the chat template find 1"):
        chat_datum(tokenizer, CONVERSATION)


def test_a_conversation_that_begins_with_the_assistant():
    messages = [said("assistant", "Hello"), said("user", "Hi")]
    datum = chat_datum(byte_tokenizer(MARKED), messages)
    assert learnt_text(byte_tokenizer(MARKED), datum) == ["Hello<|im_end|>"]
    with pytest.raises(InvalidData, match=r"begins with a turn of the assistant \(message 0\)"):
        chat_datum(byte_tokenizer(CHATML), messages)


def test_fields_that_are_none_are_left_out():
    template = CHATML.replace(
        "message['content']", "(message['content'] if 'content' in message else message['tool_calls'][0]['name'])"
    )
    tokenizer = byte_tokenizer(template)
    messages = [
        {"role": "user", "content": "time?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "noon", "tool_calls": None},
        {"role": "assistant", "content": "It is noon.", "tool_calls": None},
    ]
    datum = chat_datum(tokenizer, messages)
    assert learnt_text(tokenizer, datum) == ["clock<|im_end|>", "It is noon.<|im_end|>"]
    assert "<|im_start|>tool\nnoon<|im_end|>" in tokenizer.decode(whole(tokenizer, datum))
    with pytest.raises(InvalidData, match="the chat template cannot render the first 4 messages"):
        chat_datum(byte_tokenizer(CHATML), messages)


def test_tools_and_options_reach_the_template():
    template = "{{ tools[0]['name'] + mood }}" + CHATML
    tokenizer = byte_tokenizer(template)
    datum = chat_datum(tokenizer, CONVERSATION, tools=[{"name": "clock"}], template_options={"mood": "gay"})
    assert tokenizer.decode(whole(tokenizer, datum)).startswith("clockgay<|im_start|>system")
    assert learnt_text(tokenizer, datum)[0] == "Hello there<|im_end|>"


def test_cut_at_the_end():
    tokenizer = byte_tokenizer(CHATML)
    full = chat_datum(tokenizer, CONVERSATION)
    for length in (60, full.model_input.length, full.model_input.length + 10):
        datum = chat_datum(tokenizer, CONVERSATION, max_length=length)
        kept = min(length, full.model_input.length)
        assert datum.model_input.to_ints() == full.model_input.to_ints()[:kept]
        for name in ("target_tokens", "weights"):
            assert datum.loss_fn_inputs[name].tolist() == full.loss_fn_inputs[name].tolist()[:kept]


def test_the_shortest_cut_that_leaves_something_to_learn():
    tokenizer = byte_tokenizer(CHATML)
    first = chat_datum(tokenizer, CONVERSATION).loss_fn_inputs["weights"].tolist().index(1.0)
    datum = chat_datum(tokenizer, CONVERSATION, max_length=first + 1)
    assert learnt_text(tokenizer, datum) == ["H"]
    with pytest.raises(InvalidData, match=f"max_length={first} cuts off all that is to be learnt"):
        chat_datum(tokenizer, CONVERSATION, max_length=first)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "the conversation is empty"),
        ("Hi", "must be a sequence of messages, got a str"),
        (None, "must be a sequence of messages, got a NoneType"),
        (["Hi"], "message 0 must map 'role' and 'content' to texts, got a str"),
        ([{"content": "Hi"}], r"message 0 has no role \(it has \['content'\]\)"),
        ([said("user", "Hi")], "no message has the role 'assistant'.* the roles are: user"),
    ],
)
def test_no_conversation(messages, reason):
    with pytest.raises(InvalidData, match=reason):
        chat_datum(byte_tokenizer(CHATML), messages)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"jinja2 is not installed. Run: pip install 'tinkex-py\[huggingface\]'"):
        chat_datum(byte_tokenizer(CHATML), CONVERSATION)


def test_bad_settings():
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(InvalidData, match="turns must be 'all' or 'last', got 'first'"):
        chat_datum(tokenizer, CONVERSATION, turns="first")
    for length in (0, -1, 2.5, True):
        with pytest.raises(InvalidData, match="max_length must be an int >= 1"):
            chat_datum(tokenizer, CONVERSATION, max_length=length)
    with pytest.raises(InvalidData, match="a ByteTokenizer knows no chat templates"):
        chat_datum(ByteTokenizer(), CONVERSATION)
    with pytest.raises(InvalidData, match="the tokenizer has no chat template: pass chat_template="):
        chat_datum(byte_tokenizer(None), CONVERSATION)
    with pytest.raises(InvalidData, match="Only user and assistant roles are supported"):
        chat_datum(byte_tokenizer(BRACKETS), CONVERSATION)
    with pytest.raises(InvalidData, match="TemplateSyntaxError"):
        chat_datum(tokenizer, CONVERSATION, chat_template="{% for %}")
