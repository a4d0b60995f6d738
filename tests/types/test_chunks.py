"""Chunks of images and audio, and where tokens come from."""

import importlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinkex_py import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    InvalidData,
    ModelInput,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
)

official = importlib.import_module("tinker.types")
PNG = b"\x89PNG\r\n\x1a\nrest"
SHAPED = bytes([3, 2, 0xAC, 0x02, 80])  # dtype 3, two dimensions: 300 (0x2C + 2 * 128) and 80
TEXT = EncodedTextChunk(tokens=[5, 6])
PICTURE = ImageChunk(data=PNG, expected_tokens=3)


def learned(*chunks: Any, **inputs: Any) -> Datum:
    model_input = ModelInput(chunks=chunks)
    return Datum(model_input=model_input, loss_fn_inputs={"target_tokens": [1] * (model_input.length), **inputs})


def test_an_input_with_an_image():
    made = ModelInput(chunks=(TEXT, PICTURE)).append_int(7)
    assert (made.length, made.size.length, made.is_text) == (6, 6, False)
    assert made.text_mask().tolist() == [True, True, False, False, False, True]
    assert made.to_ints(other=0) == [5, 6, 0, 0, 0, 7]
    with pytest.raises(InvalidData, match="'image'"):
        made.to_ints()
    unknown = ModelInput(chunks=(TEXT, ImageChunk(data=PNG)))
    assert unknown.size.length is None
    with pytest.raises(InvalidData, match="expected_tokens"):
        _ = unknown.length


@pytest.mark.parametrize(("data", "found"), [(PNG, "png"), (b"\xff\xd8\xff\xe0rest", "jpeg"), (bytearray(PNG), "png")])
def test_the_format_of_an_image_is_in_its_first_bytes(data, found):
    assert ImageChunk(data=data).format == found


@pytest.mark.parametrize("header", [SHAPED, bytes([254]) + SHAPED, bytes([0, 1, 0]), bytes([7, 3, 1, 1, 1])])
def test_the_length_of_audio_is_its_first_dimension(header):
    data = header + b"payload"
    assert DmelChunk(dmel=data).length == official.DmelChunk(dmel=data).length


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ImageChunk(data=b"GIF89a private"), "14 bytes, is no image, neither a PNG nor a JPEG"),
        (lambda: ImageChunk(data="private"), "got a str"),  # pyright: ignore[reportArgumentType]
        (lambda: ImageChunk(data=b""), "got none"),
        (lambda: ImageChunk(data=PNG, format="gif"), "format"),  # pyright: ignore[reportArgumentType]
        (lambda: ImageChunk(data=PNG, expected_tokens=0), "expected_tokens"),
        (lambda: ImageAssetPointerChunk(location="", format="png"), "location"),
        (lambda: DmelChunk(dmel=b""), "dmel"),
        (lambda: DmelChunk(dmel=b"private").length, "do not begin"),
        (lambda: DmelChunk(dmel=bytes([254])).length, "do not begin"),
        (lambda: DmelChunk(dmel=bytes([0, 0])).length, "at least one dimension"),
        (lambda: DmelChunk(dmel=bytes([0, 1])).length, "end in its header"),
        (lambda: DmelChunk(dmel=bytes([0, 1]) + b"\xff" * 20).length, "63 bits"),
        (lambda: ModelInput(chunks=("private",)), "chunks"),  # pyright: ignore[reportArgumentType]
        (lambda: SampledProvenanceSpan(sequence_id="", length=1), "sequence_id"),
        (lambda: PromptProvenanceSpan(sequence_id="a", length=-1), "length"),
    ],
)
def test_what_is_no_chunk_is_named_and_not_quoted(make, match):
    with pytest.raises(InvalidData, match=match) as caught:
        make()
    assert "private" not in str(caught.value)


def test_a_chunk_shows_nothing_of_a_user():
    chunks = (ImageChunk(data=b"private", format="png"), DmelChunk(dmel=b"private"))
    assert "private" not in repr(ModelInput(chunks=chunks))
    assert "private" not in repr(ImageAssetPointerChunk(location="private", format="png"))


def test_every_chunk_of_the_official_sdk():
    given = official.Datum(
        model_input=official.ModelInput(
            chunks=[
                official.EncodedTextChunk(tokens=[1]),
                official.ImageChunk(data=b"picture", format="jpeg", expected_tokens=2),
                official.ImageAssetPointerChunk(location="x://y", format="png", expected_tokens=1),
                official.DmelChunk(dmel=bytes([0, 1, 1])),
            ]
        ),
        loss_fn_inputs={"target_tokens": [0, 0, 0, 0, 4], "weights": [0.0, 0.0, 0.0, 0.0, 1.0]},
    ).with_provenance(
        [official.PromptProvenanceSpan(sequence_id="a", length=5)],
        [
            official.PromptProvenanceSpan(sequence_id="a", length=4),
            official.SampledProvenanceSpan(sequence_id="b", offset=3, length=1),
        ],
    )
    made = Datum.of(given)
    assert made.model_input == ModelInput(
        chunks=(
            EncodedTextChunk(tokens=[1]),
            ImageChunk(data=b"picture", format="jpeg", expected_tokens=2),
            ImageAssetPointerChunk(location="x://y", format="png", expected_tokens=1),
            DmelChunk(dmel=bytes([0, 1, 1])),
        )
    )
    assert made.model_input_spans == (PromptProvenanceSpan(sequence_id="a", length=5),)
    assert made.loss_fn_input_spans == (
        PromptProvenanceSpan(sequence_id="a", length=4),
        SampledProvenanceSpan(sequence_id="b", offset=3, length=1),
    )


def test_provenance_covers_both_fields_and_stays():
    datum = learned(TEXT, PICTURE)
    prompt, sampled = PromptProvenanceSpan(sequence_id="a", length=4), SampledProvenanceSpan(sequence_id="a", length=1)
    made = datum.with_provenance([prompt, sampled], [prompt, sampled])
    assert made.with_inputs(advantages=np.zeros(5, np.float32)).loss_fn_input_spans == (prompt, sampled)
    with pytest.raises(InvalidData, match="model_input have 4 positions, but it has 5"):
        datum.with_provenance([prompt], [prompt, sampled])
    with pytest.raises(InvalidData, match="target_tokens.* have 4 positions, but it has 5"):
        datum.with_provenance([prompt, sampled], [prompt])
    with pytest.raises(InvalidData, match="both"):
        Datum(model_input=datum.model_input, loss_fn_inputs=datum.loss_fn_inputs, model_input_spans=[prompt, sampled])


class Words:
    """One token per letter; 99 begins every text, as a BOS token."""

    bos_token_id, eos_token_id = 99, 98

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [99] * add_special_tokens + [ord(letter) - ord("a") for letter in text]


def test_an_input_from_its_parts():
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    file = io.BytesIO()
    picture.save(file, "PNG")
    words = Words()
    made = ModelInput.from_parts("ab", file.getvalue(), "c", [7, 8], picture, tokenizer=words, image_tokens=len)
    text, first, *rest, last = made.chunks
    assert text == EncodedTextChunk(tokens=[99, 0, 1])
    assert rest == [EncodedTextChunk(tokens=[2]), EncodedTextChunk(tokens=[7, 8])]
    assert first == ImageChunk(data=file.getvalue(), expected_tokens=len(file.getvalue()))
    assert isinstance(last, ImageChunk)
    with Image.open(io.BytesIO(last.data)) as again:
        assert again.tobytes() == picture.tobytes()
    begins = ModelInput.from_parts({"bytes": PNG}, "a", tokenizer=words, image_tokens=2)
    assert begins.chunks == (
        EncodedTextChunk(tokens=[99]),
        ImageChunk(data=PNG, expected_tokens=2),
        EncodedTextChunk(tokens=[0]),
    )


@pytest.mark.parametrize(
    ("parts", "options", "match"),
    [
        (([1], "a"), {}, r"parts\[1\]: a text needs tokenizer="),
        ((b"private",), {}, r"parts\[0\]: data, 7 bytes"),
        ((3,), {}, r"parts\[0\]: .*got a int"),
        (({"path": "private"},), {}, r"parts\[0\]: .*got a NoneType"),
        ((PNG,), {"image_tokens": 0}, "image_tokens"),
        ((PNG,), {"image_tokens": "3"}, "image_tokens must be a number or a function"),
    ],
)
def test_what_is_no_part_of_an_input_is_named(parts, options, match):
    with pytest.raises(InvalidData, match=match) as caught:
        ModelInput.from_parts(*parts, **options)
    assert "private" not in str(caught.value)


def test_a_completion_behind_images_is_learned_and_the_images_are_not():
    """Of 7 tokens: 1 of text, 3 of an image, 1 of text, 2 of the completion."""
    prompt = ModelInput(chunks=(EncodedTextChunk(tokens=[5]), PICTURE, EncodedTextChunk(tokens=[6])))
    datum = Datum.from_tokens(prompt, [7, 8])
    assert datum.model_input.chunks == (EncodedTextChunk(tokens=[5]), PICTURE, EncodedTextChunk(tokens=[6, 7]))
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [0, 0, 0, 6, 7, 8]
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert Datum.from_tokens(ModelInput(chunks=(PICTURE,)), [7]).model_input.chunks == (PICTURE,)
