"""Prompts and answers as tokens, over the stock families of tokenizers."""

import pytest
from hypothesis import given, settings, strategies

from tests.text.tokenizers import EXACT, FAMILIES, composing
from tinkex_py.errors import InvalidData
from tinkex_py.text import decode, encode_answer, encode_prompt, start_tokens

TEXTS = strategies.text(
    strategies.sampled_from("abcdeyYnoQ:.,!? \n0123456789Öß日🙂▁"), max_size=12
) | strategies.sampled_from(["Q: ", "The answer is", " yes", "Ahoy!", "Fair", "", " ", "\n", "  x"])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, answer=TEXTS)
def test_an_answer_continues_the_prompt_that_sampling_sends(family: str, prompt: str, answer: str):
    tokenizer = FAMILIES[family]()
    sent = encode_prompt(tokenizer, prompt)
    whole = decode(tokenizer, encode_prompt(tokenizer, prompt + answer))
    try:
        before, continued = encode_answer(tokenizer, prompt, answer)
    except InvalidData:
        assert family not in EXACT
        return
    assert before == sent
    assert decode(tokenizer, [*before, *continued]) == whole


@pytest.mark.parametrize("family", EXACT)
@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
def test_a_prompt_decodes_to_its_text_behind_one_start_token(family: str, text: str):
    tokenizer = FAMILIES[family]()
    start = start_tokens(tokenizer)
    assert start == ([tokenizer.bos_token_id] if "BOS" in family else [])
    tokens = encode_prompt(tokenizer, text)
    assert tokens[: len(start)] == start
    decoded = tokenizer.decode(tokens[len(start) :], clean_up_tokenization_spaces=False)
    if "SentencePiece" in family:  # spaces before a text merge with the one that it puts there
        decoded, text = decoded.lstrip(" "), text.replace("▁", " ").lstrip(" ")
    assert decoded == (f" {text}" if "prefix space" in family and text[:1] not in ("", " ") else text)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_begins_with_the_start_token_gets_no_second_one(family: str):
    tokenizer = FAMILIES[family]()
    start = start_tokens(tokenizer)
    rendered = tokenizer.decode(start) + "Hello"
    assert encode_prompt(tokenizer, rendered)[: len(start) + 1].count(start[0] if start else None) == len(start)


@pytest.mark.parametrize("family", ["Unigram with EOS (T5)", "WordPiece with CLS and SEP (BERT)"])
def test_a_prompt_has_no_end_token(family: str):
    tokenizer = FAMILIES[family]()
    assert tokenizer.encode("Hello")[-1] in tokenizer.all_special_ids
    assert encode_prompt(tokenizer, "Hello")[-1] not in tokenizer.all_special_ids


def test_what_cannot_be_encoded_apart_is_refused():
    tokenizer, accent = composing(), "\u0301"
    assert encode_answer(tokenizer, "caf", f"e{accent}")[1] == encode_prompt(tokenizer, "é")
    with pytest.raises(InvalidData, match="apart"):
        encode_answer(tokenizer, "cafe", accent)


@pytest.mark.parametrize("bad", ["hi \ud83d there", "\udc80"])
def test_half_a_character_is_refused_with_its_position(bad: str):
    tokenizer = FAMILIES["byte-level BPE (GPT-2, Qwen)"]()
    with pytest.raises(InvalidData, match=f"at position {3 if len(bad) > 1 else 0}"):
        encode_prompt(tokenizer, bad)
    with pytest.raises(InvalidData, match="lone surrogate"):
        encode_answer(tokenizer, "ok", bad)


@pytest.mark.parametrize(("tokenizer", "text"), [("gpt2", "a"), (object(), "a"), (None, "a")])
def test_a_model_name_is_not_a_tokenizer(tokenizer: object, text: str):
    with pytest.raises(InvalidData, match="tokenizer must be an object with encode"):
        encode_prompt(tokenizer, text)


def test_the_tokenizers_library_and_plain_objects_encode_alike():
    tokenizer = FAMILIES["byte-level BPE with BOS (Llama 3)"]()

    class Plain:
        bos_token_id = tokenizer.bos_token_id

        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text)

    wanted = encode_answer(tokenizer, "Q: ", "yes")
    assert encode_answer(Plain(), "Q: ", "yes") == wanted
    assert encode_answer(tokenizer.backend_tokenizer, "Q: ", "yes") == wanted
