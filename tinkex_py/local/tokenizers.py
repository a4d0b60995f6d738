"""Text to token ids and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class ModelTokenizer(Protocol):
    """What the embedded service needs of a tokenizer; Hugging Face tokenizers have it."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens of its own."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...


class ByteTokenizer:
    """256 byte tokens, then begin (256) and end (257) of text: any text, no vocabulary file."""

    bos_token_id = 256
    eos_token_id = 257
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of byte tokens; specials are left out, broken UTF-8 becomes U+FFFD."""
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")


class PretrainedTokenizer:
    """A Hugging Face tokenizer that adds no special tokens unless its own methods are asked for them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.inner.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return list(self.inner.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.inner.decode(list(ids)))

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)


def save_byte_tokenizer(folder: Path) -> None:
    """Write the byte tokenizer as a Hugging Face tokenizer folder, for clients that load one by path."""
    from tokenizers import Tokenizer as FastTokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2's table: the byte-level pre-tokenizer shows bytes that do not print as characters from 256 on.
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
