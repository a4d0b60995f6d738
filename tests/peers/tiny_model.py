"""Creates a tiny random Qwen3 with its tokenizer, for servers that need a model folder.

Runs with the Python of a server's venv; importing it needs the standard library only.

    python tiny_model.py FOLDER
"""

import subprocess
import sys
from pathlib import Path

VOCABULARY = 512
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The byte alphabet makes any text encodable; the sentences only provide some merges.
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A client sends a batch, the server answers with a promise of a result.",
    "One, two, three, four, five, six, seven, eight, nine, ten.",
    "Each training step computes a loss, then its gradient, then an update.",
    "Save the weights, load the weights, sample from the weights.",
]


def ensure_tiny_model(python: Path, folder: Path) -> None:
    """Creates the model with that Python, unless it exists."""
    if not (folder / "model.safetensors").exists():
        subprocess.run([str(python), __file__, str(folder)], check=True, capture_output=True)


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _model(tokenizer):
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,  # train_unembed needs a separate matrix
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.Qwen3ForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)  # by default all tokens are about equally likely
    return model


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    _model(tokenizer).save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    main()
