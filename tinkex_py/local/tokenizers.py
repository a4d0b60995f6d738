"""The tokenizer of the model `tiny`; other models have Hugging Face tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ByteTokenizer:
    """256 byte tokens, then begin (256) and end (257) of text; encodes any text without a vocabulary file."""

    bos_token_id = 256
    eos_token_id = 257
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of byte tokens, without special tokens; invalid UTF-8 becomes U+FFFD."""
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")


def save_byte_tokenizer(folder: Path) -> None:
    """Writes the byte tokenizer as a Hugging Face folder, for clients that load a tokenizer by path."""
    from tokenizers import Tokenizer as FastTokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2's table: the byte-level pre-tokenizer represents unprintable bytes as characters from 256.
    letters = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    setattr(fast, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))  # noqa: B010
    setattr(fast, "decoder", decoders.ByteLevel())  # noqa: B010
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        clean_up_tokenization_spaces=False,
        bos_token="<bos>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
    )
    tokenizer.save_pretrained(str(folder))
