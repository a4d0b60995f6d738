"""Conversations with images as datums."""

from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value

from tests.support.tiny_vision import IMAGE_TOKENS, llava_processor, picture
from tinkex_py import Datum, EncodedTextChunk, ImageChunk, InvalidData
from tinkex_py.data import chat_datum, datums_from

TEMPLATE = """{% for m in messages %}{{ m.role[0] }}:{% if m.content is string %}{{ m.content }}{% else %}\
{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %};\
{% endfor %}{% if add_generation_prompt %}a:{% endif %}"""
SHOWN = [{"type": "image"}, {"type": "text", "text": "hi"}]
MESSAGES = [{"role": "user", "content": SHOWN}, {"role": "assistant", "content": "yo"}]


@pytest.fixture(scope="module")
def processor() -> Any:
    return llava_processor(TEMPLATE)


def check(datum: Datum, image: Any) -> None:
    """The template renders "u:<image>hi;a:yo;", of which "yo;" is learned; the image has 4 tokens, targets 0."""
    before, shown, after = datum.model_input.chunks
    assert before == EncodedTextChunk(tokens=list(b"u:"))
    assert shown == ImageChunk.of(image, expected_tokens=IMAGE_TOKENS)
    assert after == EncodedTextChunk(tokens=list(b"hi;a:yo"))
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [*b":", 0, 0, 0, 0, *b"hi;a:yo;"]
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0] * 10 + [1.0] * 3


def test_an_image_in_the_message_and_beside_it(processor):
    image = picture(1)
    check(chat_datum(processor, MESSAGES, images=[image]), image)
    own = [{"role": "user", "content": [{"type": "image", "image": image}, SHOWN[1]]}, MESSAGES[1]]
    check(chat_datum(processor, own), image)


@pytest.mark.parametrize("decode", [True, False])
def test_rows_of_datasets(processor, decode):
    """A table gives every item all fields, and fills the others with None."""
    item = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(item)}
    features = Features({"messages": List(message), "images": List(Image(decode=decode))})
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}
    row = {"messages": [{"role": "user", "content": SHOWN}, answer], "images": [picture(1)]}
    table = Dataset.from_list([row], features=features)
    (datum,) = datums_from(table, lambda row: chat_datum(processor, row["messages"], images=row["images"]))
    check(datum, picture(1))


def test_a_cut_divides_no_image(processor):
    """The image stands behind 9 + 2 tokens; where it does not fit, it is left out with what follows."""
    turns = [{"role": "user", "content": "a"}, MESSAGES[1], *MESSAGES]
    datum = chat_datum(processor, turns, images=[picture(1)], max_length=12)
    assert datum.model_input.chunks == (EncodedTextChunk(tokens=list(b"u:a;a:yo;u")),)
    whole = chat_datum(processor, turns, images=[picture(1)], max_length=15)
    assert [chunk.length for chunk in whole.model_input.chunks] == [11, 4]
    with pytest.raises(InvalidData, match="cuts off everything"):
        chat_datum(processor, MESSAGES, images=[picture(1)], max_length=4)


def test_images_that_do_not_fit_the_messages(processor):
    with pytest.raises(InvalidData, match="without an image: pass images="):
        chat_datum(processor, MESSAGES)
    with pytest.raises(InvalidData, match="images has 1 more"):
        chat_datum(processor, MESSAGES, images=[picture(1), picture(2)])
    written = [{"role": "user", "content": "see <image>"}, MESSAGES[1]]
    with pytest.raises(InvalidData, match="1 places for images"):
        chat_datum(processor, written)
    with pytest.raises(InvalidData, match="processor of the model"):
        chat_datum(processor.tokenizer, MESSAGES, images=[picture(1)], chat_template=TEMPLATE)
