"""Datums from conversations, texts, rows and samples, and batches. Chat templates need the extra "huggingface"."""

from tinkex_py.data.candidates import candidates_datum
from tinkex_py.data.chat import ChatRenderer
from tinkex_py.data.datums import chat_datum, datums_from, preference_datums, text_datum
from tinkex_py.data.distillation import teacher_datums, with_reference, with_teacher_advantages, with_teacher_logprobs
from tinkex_py.data.epochs import batches
from tinkex_py.data.pairs import with_role_masks
from tinkex_py.data.samples import answer_texts, datum_from_sample, rewards_of, sample_groups

__all__ = [
    "ChatRenderer",
    "answer_texts",
    "batches",
    "candidates_datum",
    "chat_datum",
    "datum_from_sample",
    "datums_from",
    "preference_datums",
    "rewards_of",
    "sample_groups",
    "teacher_datums",
    "text_datum",
    "with_reference",
    "with_role_masks",
    "with_teacher_advantages",
    "with_teacher_logprobs",
]
