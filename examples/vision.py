"""Train a vision-language model with a composed loss: it names the colour of a picture.

Makes a tiny LLaVA with random weights and its processor in a temporary folder, which the embedded service loads as it
loads any such folder of Hugging Face. Needs the extras `local` and `huggingface`.
"""

import asyncio
import math
import tempfile

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

from tinkex_py import AdamParams, AsyncServiceClient, Datum, ModelInput, RegularizerSpec, SamplingParams, packed_field
from tinkex_py.base_losses import NLL
from tinkex_py.data import image_tokens

STEPS = 12
COLOURS = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (20, 40, 230), "white": (250, 250, 250)}
WORDS = ["<eos>", "<unk>", "<image>", "What", "colour", "is", "this", "?", *COLOURS]


def save_tiny_model(folder):
    """Writes a vision-language model of random weights, and its processor."""
    logging.disable_progress_bar()
    set_seed(0)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sizes},
        text_config={"model_type": "llama", "vocab_size": len(WORDS), "max_position_embeddings": 64, **sizes}
        | {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0},
        tie_word_embeddings=False,
    )
    config.image_token_id = WORDS.index("<image>")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def certainty(data, logprobs):
    """What the learned tokens are more likely than 95 %."""
    return (packed_field(data, "weights") * torch.relu(logprobs - math.log(0.95))).sum()


async def main():
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(folder)
        processor = AutoProcessor.from_pretrained(folder)
        tokenizer, count = processor.tokenizer, image_tokens(processor)

        def question(colour):
            picture = Image.new("RGB", (24, 24), colour)
            return ModelInput.from_parts(picture, "What colour is this ?", tokenizer=tokenizer, image_tokens=count)

        data = [
            Datum.from_tokens(question(colour), [*tokenizer.encode(name), tokenizer.eos_token_id])
            for name, colour in COLOURS.items()
        ]
        async with AsyncServiceClient.local(folder) as service:
            training = await service.create_lora_training_client(rank=8, seed=0)
            terms = [RegularizerSpec(fn=certainty, weight=1.0, name="certainty")]
            losses = []
            for step in range(STEPS):
                output = await training.forward_backward_custom(data, NLL(reduction="mean"), regularizers=terms)
                await training.optim_step(AdamParams(learning_rate=2e-2))
                losses.append(output.loss_total)
                print(f"step {step}  loss {output.loss_total:.4f}")
            sampler = await training.save_weights_and_get_sampling_client()
            for name, colour in COLOURS.items():
                drawn = await sampler.sample(
                    question(colour), sampling_params=SamplingParams(max_tokens=1, temperature=0)
                )
                print(f"{name}: {tokenizer.decode(drawn.sequences[0].tokens)}")
        print(f"loss: {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    asyncio.run(main())
