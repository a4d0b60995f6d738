"""What a vision-language model makes of images, as its Hugging Face processor says."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from tinkex_py.arguments import check_list
from tinkex_py.data.messages import Message
from tinkex_py.errors import InvalidData, MissingExtra
from tinkex_py.types import ImageChunk, ModelInput

MAX_PIXELS = 2**25
"""Pixels of one image; decoded, these are 100 MB."""


def image_tokens(processor: Any) -> Callable[[bytes], int]:
    """Returns a function that counts the tokens that a model makes of an image; see `ModelInput.from_parts`.

    Args:
        processor: `AutoProcessor.from_pretrained(model)`.

    Raises:
        InvalidData: it is no processor of images.
        MissingExtra: Pillow is not installed.
    """
    placeholder_of(processor)
    return lambda data: len(processed(processor, [data])["input_ids"][0])


def is_processor(tokenizer: Any) -> bool:
    """Whether an object is a processor of images and text, and not a tokenizer."""
    return hasattr(tokenizer, "image_processor") and hasattr(tokenizer, "tokenizer")


def images_of(messages: Sequence[Message], images: Sequence[object] | None) -> list[object]:
    """Returns the images of a conversation in order.

    Args:
        messages: the messages; an item `{"type": "image"}` of a content has its image under "image", or takes the next.
        images: the images of the items that have none.

    Raises:
        InvalidData: an item has no image, or images are left.
    """
    waiting = [] if images is None else list(check_list("images", images, object))
    found: list[object] = []
    for index, message in enumerate(messages):
        content = message.get("content", "")
        for item in cast("Sequence[object]", [] if isinstance(content, str) else content):
            fields = cast("Mapping[str, object]", item if isinstance(item, Mapping) else {})
            if fields.get("type") != "image":
                continue
            own = fields.get("image")
            if own is None and not waiting:
                raise InvalidData(f"message {index} has an item of type 'image' without an image: pass images=")
            found.append(waiting.pop(0) if own is None else own)
    if waiting:
        raise InvalidData(f"images has {len(waiting)} more than the messages have items {{'type': 'image'}}")
    return found


def with_images(
    processor: Any, tokens: Sequence[int], learned: Sequence[bool], images: Sequence[object]
) -> tuple[ModelInput, list[bool]]:
    """Puts images in the places of a rendered text that stand for them; none of their tokens is learned.

    Raises:
        InvalidData: the text has another number of places than there are images, or an image cannot be read.
    """
    mark = int(processor.tokenizer.convert_tokens_to_ids(placeholder_of(processor)))
    places = [index for index, token in enumerate(tokens) if token == mark]
    if len(places) != len(images):
        raise InvalidData(
            f"the rendered conversation has {len(places)} places for images ({placeholder_of(processor)}), but the "
            f"messages have {len(images)} images: write each as an item {{'type': 'image'}} of a content"
        )
    count = image_tokens(processor)
    parts: list[object] = []
    marks: list[bool] = []
    start = 0
    for place, image in zip([*places, len(tokens)], [*images, None], strict=True):
        parts += [list(tokens[start:place])] if place > start else []
        marks += learned[start:place]
        if place < len(tokens):
            data = ImageChunk.of(image).data
            chunk = ImageChunk(data=data, expected_tokens=count(data))
            parts.append(chunk)
            marks += [False] * chunk.length
        start = place + 1
    return ModelInput.from_parts(*parts), marks


def placeholder_of(processor: Any) -> str:
    """Returns the text for which a processor puts the tokens of an image.

    Raises:
        InvalidData: it is no processor of images.
    """
    found = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if not is_processor(processor) or not callable(processor) or not isinstance(found, str):
        raise InvalidData(
            f"processor must be a Hugging Face processor of images and text, got a {type(processor).__name__}: pass "
            "AutoProcessor.from_pretrained(model)"
        )
    return found


def processed(processor: Any, images: Sequence[bytes]) -> Mapping[str, Any]:
    """Returns the inputs of a model for images alone, one after another, as tensors of torch.

    Raises:
        InvalidData: an image cannot be read.
        MissingExtra: Pillow is not installed.
    """
    return processor(
        text=[placeholder_of(processor) * len(images)],
        images=[list(map(_opened, images))],
        add_special_tokens=False,
        return_tensors="pt",
    )


def _opened(data: bytes) -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingExtra("pillow", "huggingface") from error
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            # The header says it, before anything is decoded.
            if image.width * image.height > MAX_PIXELS:
                raise InvalidData(
                    f"an image has {image.width} x {image.height} pixels, more than {MAX_PIXELS}: make it smaller"
                )
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InvalidData):
            raise
        reason = type(error).__name__
    raise InvalidData(f"an image, {len(data)} bytes, cannot be read as PNG or JPEG ({reason})")
