"""Conversations as datums, against tokens and masks that are put together by hand."""

import sys

import pytest
from hypothesis import given, settings, strategies as st

from tests.data.chat_tokenizers import (
    BRACKETS,
    CHATML,
    FORGETFUL,
    MARKED,
    PLAIN,
    byte_tokenizer,
    chatml_by_hand,
    learned_text,
    said,
    whole,
)
from tinkex_py import InvalidData, MissingExtra
from tinkex_py.data import chat_datum
from tinkex_py.local.models import load_tokenizer
from tinkex_py.local.tokenizers import ByteTokenizer

CONVERSATION = [
    said("system", "Be brief."),
    said("user", "Hi"),
    said("assistant", "Hello there"),
    said("user", "Is it wet?"),
    said("assistant", "Yes, é 🌧"),
]


def check_against_hand(tokenizer, messages, turns):
    datum = chat_datum(tokenizer, messages, turns=turns)
    tokens, mask = chatml_by_hand(tokenizer, messages, turns)
    assert whole(tokenizer, datum) == tokens
    assert datum.loss_fn_inputs["weights"].tolist() == mask[1:]
    return datum


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_only_the_turns_of_the_assistant_have_weight(template, turns):
    tokenizer = byte_tokenizer(template)
    datum = check_against_hand(tokenizer, CONVERSATION, turns)
    expected = ["Hello there<|im_end|>", "Yes, é 🌧<|im_end|>"]
    assert learned_text(tokenizer, datum) == (expected if turns == "all" else expected[1:])


# Characters that are not marks of the template; a content may contain line breaks and be empty.
CONTENTS = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=8)
CONVERSATIONS = st.lists(
    st.builds(said, st.sampled_from(["user", "assistant", "tool"]), CONTENTS), min_size=1, max_size=6
).map(lambda messages: [said("system", "s"), *messages, said("assistant", "a")])


@settings(max_examples=15)
@given(messages=CONVERSATIONS, template=st.sampled_from([CHATML, MARKED]), turns=st.sampled_from(["all", "last"]))
def test_any_conversation(messages, template, turns):
    tokenizer = byte_tokenizer(template)
    check_against_hand(tokenizer, messages, turns)


@pytest.mark.slow
def test_a_pretrained_tokenizer():
    tokenizer = load_tokenizer("smollm2")
    for turns in ("all", "last"):
        check_against_hand(tokenizer, CONVERSATION, turns)
    # The template adds a system message if there is none.
    datum = chat_datum(tokenizer, CONVERSATION[1:])
    assert "named SmolLM" in tokenizer.decode(whole(tokenizer, datum))
    assert learned_text(tokenizer, datum) == ["Hello there<|im_end|>", "Yes, é 🌧<|im_end|>"]


WITHOUT_END = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")


@pytest.mark.parametrize(
    ("template", "messages", "learned"),
    [
        (BRACKETS, CONVERSATION[1:], ["Hello there</s>", "Yes, é 🌧</s>"]),
        # Without special tokens a turn ends with its line.
        (PLAIN, CONVERSATION, ["Hello there\n", "Yes, é 🌧\n"]),
        # The last message is not the assistant's.
        (CHATML, CONVERSATION[:4], ["Hello there<|im_end|>"]),
        (MARKED, CONVERSATION[:4], ["Hello there<|im_end|>"]),
        # The first message is the assistant's.
        (MARKED, CONVERSATION[2:4], ["Hello there<|im_end|>"]),
        # The marks decide, even if they exclude the end of the turn.
        (WITHOUT_END, CONVERSATION, ["Hello there", "Yes, é 🌧"]),
    ],
)
def test_learned_text_of_templates(template, messages, learned):
    tokenizer = byte_tokenizer(CHATML)
    datum = chat_datum(tokenizer, messages, chat_template=template)
    assert learned_text(tokenizer, datum) == learned


@pytest.mark.parametrize(
    ("template", "merges", "messages", "reason"),
    [
        (MARKED.replace("message['role'] == 'assistant'", "loop.last"), (), CONVERSATION, "2 turns .* find 1"),
        (CHATML, (), CONVERSATION[2:4], r"begins with a turn of the assistant \(message 0\)"),
        (BRACKETS, (), CONVERSATION, "Only user and assistant roles are supported"),
        ("{% for %}", (), CONVERSATION, "TemplateSyntaxError"),
        (None, (), CONVERSATION, "the tokenizer has no chat template: pass chat_template="),
        (CHATML, (), [], "the conversation is empty"),
        (CHATML, (), "Hi", "must be a sequence of messages, got a str"),
        (CHATML, (), None, "must be a sequence of messages, got a NoneType"),
        (CHATML, (), ["Hi"], "message 0 must map 'role' and 'content' to texts, got a str"),
        (CHATML, (), [{"content": "Hi"}], r"message 0 has no 'role' \(it has \['content'\]\)"),
        (CHATML, (), [said("user", "Hi")], "no message has the role 'assistant'.* the roles are: user"),
    ],
)
def test_conversations_that_cannot_be_rendered(template, merges, messages, reason):
    with pytest.raises(InvalidData, match=reason):
        chat_datum(byte_tokenizer(template, merges=merges), messages)


def test_a_template_that_drops_earlier_thoughts_only_supports_the_last_turn():
    tokenizer = byte_tokenizer(FORGETFUL)
    messages = [
        said("user", "a"),
        said("assistant", "<think>b</think>c"),
        said("user", "d"),
        said("assistant", "<think>e</think>f"),
    ]
    with pytest.raises(InvalidData, match=r"thoughts .* of message 1 .*Create one datum per turn with turns='last'"):
        chat_datum(tokenizer, messages)
    with pytest.warns(UserWarning, match="drops thoughts of turns that are not learned"):
        datum = chat_datum(tokenizer, messages, turns="last")
    assert learned_text(tokenizer, datum) == ["<think>e</think>f<|im_end|>"]
    assert "b" not in tokenizer.decode(whole(tokenizer, datum))


def test_fields_that_are_none_are_removed():
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
    assert learned_text(tokenizer, datum) == ["clock<|im_end|>", "It is noon.<|im_end|>"]
    assert "<|im_start|>tool\nnoon<|im_end|>" in tokenizer.decode(whole(tokenizer, datum))
    with pytest.raises(InvalidData, match="the chat template cannot render the first 4 messages"):
        chat_datum(byte_tokenizer(CHATML), messages)


def test_tools_and_options_reach_the_template():
    tokenizer = byte_tokenizer("{{ tools[0]['name'] + mood }}" + CHATML)
    datum = chat_datum(tokenizer, CONVERSATION, tools=[{"name": "clock"}], template_options={"mood": "calm"})
    assert tokenizer.decode(whole(tokenizer, datum)).startswith("clockcalm<|im_start|>system")
    assert learned_text(tokenizer, datum)[0] == "Hello there<|im_end|>"


def test_max_length_cuts_the_end():
    tokenizer = byte_tokenizer(CHATML)
    full = chat_datum(tokenizer, CONVERSATION)
    first = full.loss_fn_inputs["weights"].tolist().index(1.0)
    for length in (first + 1, 60, full.model_input.length, full.model_input.length + 10):
        datum = chat_datum(tokenizer, CONVERSATION, max_length=length)
        kept = min(length, full.model_input.length)
        assert datum.model_input.to_ints() == full.model_input.to_ints()[:kept]
        for name in ("target_tokens", "weights"):
            assert datum.loss_fn_inputs[name].tolist() == full.loss_fn_inputs[name].tolist()[:kept]
    with pytest.raises(InvalidData, match=f"max_length={first} cuts off everything that is to be learned"):
        chat_datum(tokenizer, CONVERSATION, max_length=first)


def test_bad_arguments(monkeypatch):
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(InvalidData, match="turns must be one of 'all', 'last', got 'first'"):
        chat_datum(tokenizer, CONVERSATION, turns="first")
    for length in (0, -1, 2.5, True):
        with pytest.raises(InvalidData, match="max_length must be an int >= 1"):
            chat_datum(tokenizer, CONVERSATION, max_length=length)
    for name in ("tools", "template_options", "chat_template"):
        with pytest.raises(InvalidData, match=f"{name} must .* got (a int|5)"):
            chat_datum(tokenizer, CONVERSATION, **{name: 5})
    with pytest.raises(InvalidData, match="a ByteTokenizer does not support chat templates"):
        chat_datum(ByteTokenizer(), CONVERSATION)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"jinja2 is not installed. Run: pip install 'tinkex-py\[huggingface\]'"):
        chat_datum(tokenizer, CONVERSATION)


def test_a_token_that_spans_the_boundary_is_encoded_apart():
    tokenizer = byte_tokenizer(PLAIN, merges=(("Ġ", "Y"),))  # "assistant: " + "Yes" contains " Y" as one token
    datum = chat_datum(tokenizer, CONVERSATION, turns="last")
    assert learned_text(tokenizer, datum) == ["Yes, é 🌧\n"]
    sent = tokenizer.apply_chat_template(CONVERSATION[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole(tokenizer, datum)[: len(sent)] == sent
