"""Every stock chat template teaches the answer and its end, or says why not."""

import pytest

from tests.data.chat_tokenizers import learned_text, whole
from tests.data.stock import ANSWER, exchange, form_of, table, table_of_page, templates, tokenizer_of
from tinkex_py.data import ChatRenderer, chat_datum

WITHOUT_END = {"glm4moe"}


@pytest.mark.parametrize("name", templates())
def test_the_learned_text_is_the_answer_and_its_end(name: str):
    tokenizer, messages = tokenizer_of(name), exchange(form_of(name))
    datum = chat_datum(tokenizer, messages)
    (learned,) = learned_text(tokenizer, datum)
    before, after = learned.split(ANSWER)
    special = [token for token in tokenizer.all_special_tokens if token in after]
    assert bool(special) is (name not in WITHOUT_END)
    # Nothing around the answer is a word of the conversation.
    assert "sky" not in before + after
    tokens = whole(tokenizer, datum)
    sent = ChatRenderer(tokenizer).prompt(messages[:1])
    rendered = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert tokens == rendered
    assert tokenizer.decode(tokens).rstrip().endswith(learned.rstrip())
    # What is learned follows the prompt that sampling sends, unless that opens thoughts.
    if tokens[: len(sent)] != sent:
        assert tokenizer.decode(sent).rstrip().endswith("<think>")
        assert before == ""
    else:
        assert tokenizer.decode(tokens[len(sent) :]).rstrip() == learned.rstrip()


def test_the_table_of_the_page():
    """`python -m tests.data.stock` writes it."""
    assert table_of_page() == table()
