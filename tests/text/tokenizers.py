"""Tokenizers of the stock families, trained in memory on a few sentences."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_CORPUS = [
    "Why is the sky blue? Because of Rayleigh scattering, the shorter wavelengths are scattered more.",
    "The answer is yes. The answer is no. Hello world! 0123456789 a.b.c Fair enough, Ahoy!",
    "Öl, Straße, naïve café; 日本語 text\nand a second line\n\n  with indented text.",
] * 4
_SPECIAL = ["<unk>", "<s>", "</s>"]


def _made(fast: Tokenizer, *, start: str | None = None, end: str | None = None) -> PreTrainedTokenizerFast:
    marks = [mark for mark in (start, end) if mark is not None]
    if marks:
        template = " ".join([*([start] if start else []), "$A", *([end] if end else [])])
        ids = [(mark, fast.token_to_id(mark)) for mark in marks]
        fast.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    names = {"[CLS]": "cls_token", "[SEP]": "sep_token"}
    special = {names.get(mark, "bos_token" if mark == start else "eos_token"): mark for mark in marks}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", clean_up_tokenization_spaces=False, **special
    )


def composing() -> PreTrainedTokenizerFast:
    """A tokenizer that composes characters (NFC) before it encodes, as Qwen's does."""
    tokenizer = _byte_level(prefix_space=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _byte_level(*, prefix_space: bool, start: str | None = None, end: str | None = None) -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(_CORPUS, trainer)
    return _made(fast, start=start, end=end)


def _sentencepiece(scheme: str, *, split: bool, start: str | None = None) -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([] if scheme == "never" else [decoders.Strip(" ", 1, 0)])
    )
    return _trained_with_bytes(fast, start)


def _legacy_sentencepiece(start: str | None = None) -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _trained_with_bytes(fast, start)


def _trained_with_bytes(fast: Tokenizer, start: str | None) -> PreTrainedTokenizerFast:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*_SPECIAL, *byte_tokens], show_progress=False)
    fast.train_from_iterator(_CORPUS, trainer)
    # Only the trainer needs them as special tokens; afterwards they are ordinary entries of the vocabulary.
    remade = Tokenizer(models.BPE(**_bpe_parts(fast), byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(fast, part) is not None:
            setattr(remade, part, getattr(fast, part))
    remade.add_special_tokens(_SPECIAL)
    return _made(remade, start=start)


def _bpe_parts(fast: Tokenizer) -> dict[str, Any]:
    model = json.loads(fast.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def _unigram() -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.Unigram())
    fast.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False)
    fast.train_from_iterator(_CORPUS, trainer)
    return _made(fast, end="</s>")


def _wordpiece() -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.WordPiece(unk_token="<unk>"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", "[CLS]", "[SEP]"], show_progress=False)
    fast.train_from_iterator(_CORPUS, trainer)
    return _made(fast, start="[CLS]", end="[SEP]")


FAMILIES: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE (GPT-2, Qwen)": cache(lambda: _byte_level(prefix_space=False)),
    "byte-level BPE with BOS (Llama 3)": cache(lambda: _byte_level(prefix_space=False, start="<s>")),
    "byte-level BPE with prefix space, BOS and EOS (RoBERTa)": cache(
        lambda: _byte_level(prefix_space=True, start="<s>", end="</s>")
    ),
    "SentencePiece, prefix at the start, BOS (Llama 2, Mistral)": cache(
        lambda: _sentencepiece("first", split=False, start="<s>")
    ),
    "SentencePiece, prefix always": cache(lambda: _sentencepiece("always", split=True)),
    "SentencePiece without prefix, BOS (Gemma)": cache(lambda: _sentencepiece("never", split=False, start="<s>")),
    "SentencePiece as a normalizer, BOS (older Llama)": cache(lambda: _legacy_sentencepiece(start="<s>")),
    "Unigram with EOS (T5)": cache(_unigram),
    "WordPiece with CLS and SEP (BERT)": cache(_wordpiece),
}
EXACT = [name for name in FAMILIES if not name.startswith(("Unigram", "WordPiece"))]
