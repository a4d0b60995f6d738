"""Prompts, answers and chat templates: what is trained is what was given, and what sampling sends.

Every test names the public reports (r09, r10, ...) whose kind it holds. `tests/data/test_stock_templates.py` holds the
same for every stock template.
"""

import warnings
from typing import Any

import pytest
from hypothesis import assume, given, settings, strategies as st

from tests.data.chat_tokenizers import CHATML, byte_tokenizer, learned_text, said, whole
from tests.text.tokenizers import EXACT, FAMILIES
from tinkex_py import InvalidData, ModelInput
from tinkex_py.data import ChatRenderer, chat_datum, preference_datums, text_datum
from tinkex_py.runs.pairs import Pair, make_datum, prompt_tokens

GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CONTENT_ONLY = "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATION
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}" + TURN + "{% endif %}{% endfor %}" + GENERATION
)
PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for line in m.content %}{% if line['type'] == 'text' %}"
    "{{ line['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + GENERATION
)
FIRST_PART = CONTENT_ONLY.replace("m.content", "(m.content if m.content is string else m.content[0].text)")
# Roles are renamed and merged; nothing is lost.
MERGED = (
    "{% for m in messages %}{% if m.role == 'system' %}{% else %}<|im_start|>{{ 'model' if m.role == 'assistant' else "
    "'human' }}\n{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
ASK, SUNNY = said("user", "weather?"), said("assistant", "Sunny")


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (CONTENT_ONLY, [ASK, {**said("assistant", ""), "tool_calls": [CALL]}], r"tool_calls\[0\] .* of message 1"),
        (CONTENT_ONLY, [ASK, {**SUNNY, "tool_calls": [CALL]}], r"tool_calls\[0\] \(name\).* of message 1"),
        (CONTENT_ONLY, [ASK, {**SUNNY, "reasoning_content": "Let me see"}], "reasoning_content of message 1"),
        (CONTENT_ONLY, [ASK, {**SUNNY, "reasoning": "x", "thinking": "x"}], "reasoning and thinking of message 1"),
        (PARTS_ONLY, [ASK, SUNNY], r"all \(content\) of message 0 .*Write the content as a list of parts"),
        (KNOWN_ROLES, [said("developer", "Be brief"), ASK, SUNNY], r"all \(content\) of message 0 \(role 'developer'"),
        (KNOWN_ROLES, [ASK, said("tool", "20 degrees"), SUNNY], r"all \(content\) of message 1 \(role 'tool'"),
        (FIRST_PART, [said("user", [{"type": "text", "text": t} for t in "ab"]), SUNNY], r"content\[1\] of message 0"),
        (PARTS_ONLY, [said("user", [{"type": "image"}, "a"]), SUNNY], r"content\[0\] \(image\)"),
        (CONTENT_ONLY, [said("user", [{"type": "text", "text": "a"}]), SUNNY], "parts of message 0 as a Python list"),
    ],
)
def test_r09_what_a_template_drops_is_an_error_that_names_message_and_part(template: str, messages: Any, named: str):
    with pytest.raises(InvalidData, match=named):
        chat_datum(byte_tokenizer(template), messages)


@pytest.mark.parametrize("content", [5, 2.5, {"text": "a"}, [1], [["a"]], [{"type": "text"}], [{}]])
def test_r09_content_that_is_no_text_or_parts_is_refused(content: Any):
    with pytest.raises(InvalidData, match="the content of message 0 must be a str, or a list of parts"):
        chat_datum(byte_tokenizer(CHATML), [said("user", content), SUNNY])


def test_r09_roles_may_be_renamed_and_merged():
    tokenizer = byte_tokenizer(MERGED)
    datum = chat_datum(tokenizer, [said("system", "Be brief."), ASK, SUNNY])
    assert tokenizer.decode(whole(tokenizer, datum)).startswith("<|im_start|>human\nBe brief. weather?<|im_end|>")
    assert learned_text(tokenizer, datum) == ["Sunny<|im_end|>"]


def test_r09_dropped_thoughts_of_turns_that_are_not_learned_warn_once():
    tokenizer = byte_tokenizer(CONTENT_ONLY)
    thoughtful = [ASK, {**SUNNY, "reasoning_content": "Let me see"}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            datum = chat_datum(tokenizer, [*thoughtful, ASK, said("assistant", "Rain")], turns="last")
    assert [str(warning.message) for warning in caught] == [
        "the chat template drops thoughts of turns that are not learned: the datum does not contain them"
    ]
    assert caught[0].filename == __file__
    assert learned_text(tokenizer, datum) == ["Rain<|im_end|>"]
    with pytest.raises(InvalidData, match="Create one datum per turn with turns='last'"):
        chat_datum(tokenizer, [*thoughtful, ASK, said("assistant", "Rain")])
    with pytest.raises(InvalidData, match=r"message 1 .*with it\. Remove the thoughts"):
        chat_datum(tokenizer, thoughtful, turns="last")


def test_r09_a_prompt_that_the_template_drops_is_not_sampled():
    with pytest.raises(InvalidData, match="drops all"):
        ChatRenderer(byte_tokenizer(PARTS_ONLY)).prompt([ASK])


OPENS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not '<think>' in "
    "m['content'] %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}"
    "{{ m['content'] + '<|end|>\n' }}{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
    "{% else %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% elif messages[-1]['role'] != 'assistant' %}"
    "{{ eos_token }}{% endif %}"
)
MARKED_HEADER = PHI3.replace("{{ '<|assistant|>\n' }}{% generation %}", "{% generation %}{{ '<|assistant|>\n' }}")
UNMARKED = PHI3.replace("{% generation %}", "").replace("{% endgeneration %}", "")
ONE, TWO = [said("user", "Q"), said("assistant", "A")], [said("user", "R"), said("assistant", "<B")]


@pytest.mark.parametrize(
    ("template", "turns", "learned"),
    [
        (OPENS, "last", ["<B<|im_end|>"]),
        (OPENS, "all", ["A<|im_end|>", "<B<|im_end|>"]),
        (PHI3, "last", ["<B<|end|>\n</s>"]),
        (PHI3, "all", ["A<|end|>\n", "<B<|end|>\n</s>"]),
        (MARKED_HEADER, "all", ["A<|end|>\n", "<B<|end|>\n</s>"]),
        (UNMARKED, "last", ["<B<|end|>\n</s>"]),
        (UNMARKED, "all", ["A<|end|>", "<B<|end|>\n</s>"]),
    ],
)
def test_r10_templates_that_open_or_close_more_than_a_turn(template: str, turns: Any, learned: list[str]):
    special = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>")
    tokenizer = byte_tokenizer(template, special=special)
    assert learned_text(tokenizer, chat_datum(tokenizer, ONE + TWO, turns=turns)) == learned


def test_r10_an_error_never_advises_what_was_done():
    shifting = "{{ messages | length }}" + CHATML
    for turns, advice in (("all", "turns='last'"), ("last", "template_options=")):
        with pytest.raises(InvalidData, match="cannot be determined") as caught:
            chat_datum(byte_tokenizer(shifting), ONE + TWO, turns=turns)
        assert advice in str(caught.value)
        assert ("turns='last'" in str(caught.value)) is (turns == "all")


TEXTS = st.text(st.sampled_from("abyYQ:.! \n"), min_size=1, max_size=6)
TEXTS |= st.sampled_from(["Ahoy!", "Fair", "Q. ", "Yes"])


@pytest.mark.parametrize("family", EXACT)
@settings(max_examples=15, deadline=None)
@given(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS)
def test_r11_prompt_and_answer_are_the_text(family: str, prompt: str, chosen: str, rejected: str):
    tokenizer: Any = FAMILIES[family]()
    assume(chosen != rejected)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = "</s>"
    sent = ModelInput.from_text(prompt, tokenizer).to_ints()
    pair = preference_datums(tokenizer, chosen, rejected, prompt=prompt)
    for answer, datum in zip((chosen, rejected), pair, strict=True):
        tokens = whole(tokenizer, datum)
        assert tokens[: len(sent)] == sent
        text = tokenizer.decode(ModelInput.from_text(prompt + answer, tokenizer).to_ints())
        assert tokenizer.decode(tokens) == f"{text}</s>"
        assert datum == text_datum(tokenizer, answer, prompt=prompt)


def test_r12_one_model_has_one_tokenization_embedded_and_over_http():
    tokenizer: Any = FAMILIES["byte-level BPE with BOS (Llama 3)"]()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    start = tokenizer.bos_token_id
    rendered = tokenizer.apply_chat_template([ASK], tokenize=False)
    datums = [
        make_datum(tokenizer, Pair(prompt="q", answer="yes")),
        text_datum(tokenizer, "Yo", prompt=rendered, append_end=False),
        text_datum(tokenizer, "Yo", prompt="Hi", append_end=False),
    ]
    for datum in datums:
        tokens = whole(tokenizer, datum)
        assert (tokens[0], tokens.count(start)) == (start, 1)
    assert ModelInput.from_text(rendered, tokenizer).to_ints().count(start) == 1


LLAMA = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
WITH_SYSTEM = "<|im_start|>system\nYou are kind<|im_end|>\n" + CHATML


@pytest.mark.parametrize(
    ("template", "end"), [(LLAMA, "<|eot_id|>"), (WITH_SYSTEM, "<|im_end|>"), (CHATML, "<|im_end|>"), (None, "</s>")]
)
def test_r13_a_run_trains_the_prompt_that_sampling_sends(template: str | None, end: str):
    special = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    tokenizer = byte_tokenizer(template, special=special)
    datum, sent = make_datum(tokenizer, Pair(prompt="Hi", answer="Yo")), prompt_tokens(tokenizer, "Hi")
    assert whole(tokenizer, datum)[: len(sent)] == sent
    assert learned_text(tokenizer, datum) == [f"Yo{end}"]
    if template is None:
        assert tokenizer.decode(sent) == "Q: Hi\nA: "
    else:
        asked = tokenizer.apply_chat_template([said("user", "Hi")], add_generation_prompt=True, return_dict=True)
        assert sent == asked["input_ids"]
