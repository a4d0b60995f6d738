"""What a vision-language model makes of images, as its Hugging Face processor says."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinkex_py.errors import InvalidData, MissingExtra

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


def placeholder_of(processor: Any) -> str:
    """Returns the text for which a processor puts the tokens of an image.

    Raises:
        InvalidData: it is no processor of images.
    """
    has_both = all(hasattr(processor, name) for name in ("tokenizer", "image_processor"))
    found = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if not has_both or not callable(processor) or not isinstance(found, str):
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
