"""Tiny vision-language models with random weights, and their processors, made in memory."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tinkex_py.local.models import quiet_loading
from tinkex_py.local.tokenizers import save_byte_tokenizer

library: Any = transformers
MARKS = ["<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
IMAGE_TOKENS = 4
"""Tokens that the tiny LLaVA makes of an image: 2 x 2 patches."""
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
}


def tokenizer() -> Any:
    """The byte tokenizer, with the marks of images from 258."""
    with tempfile.TemporaryDirectory() as folder:
        save_byte_tokenizer(Path(folder))
        made = library.AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made


def _randomized(network: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return network.eval()


def llava_processor(chat_template: str | None = None) -> Any:
    """The processor of the tiny LLaVA."""
    pixels = library.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return library.LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def save_llava(folder: Path) -> None:
    """Writes a folder that transformers loads."""
    processor = llava_processor()
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = library.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sight},
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **_TEXT},
        image_token_id=258,
        tie_word_embeddings=False,
    )
    with quiet_loading():
        _randomized(library.LlavaForConditionalGeneration(config)).save_pretrained(folder)
        processor.save_pretrained(folder)


class QwenProcessor:
    """The images of Qwen2VLProcessor, which itself needs torchvision for its videos."""

    image_token, image_token_id = "<|image_pad|>", 259

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.image_processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})

    def __call__(self, *, text: list[str], images: list[list[Any]], **_: Any) -> dict[str, torch.Tensor]:
        assert text == [self.image_token * len(images[0])]
        seen = self.image_processor(images[0], return_tensors="pt")
        length = int(seen["image_grid_thw"].prod(-1).sum()) // 4
        ids = torch.full((1, length), self.image_token_id)
        return {"input_ids": ids, "attention_mask": ids * 0 + 1, "mm_token_type_ids": ids * 0 + 1, **seen}


def qwen2_vl() -> tuple[Any, QwenProcessor]:
    """A model whose positions have two dimensions in images, and its processor."""
    processor = QwenProcessor()
    words = processor.tokenizer
    config = library.Qwen2VLConfig(
        text_config={
            "vocab_size": len(words),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            **_TEXT,
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1},
        image_token_id=259,
        video_token_id=260,
        vision_start_token_id=261,
        vision_end_token_id=262,
        tie_word_embeddings=False,
    )
    return _randomized(library.Qwen2VLForConditionalGeneration(config)), processor


def picture(seed: int, width: int = 16, height: int = 16) -> Any:
    """An image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
