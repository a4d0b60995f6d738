"""Datums from conversations, texts and rows. Chat templates need the extra "huggingface"."""

from tinkex_py.data.candidates import candidates_datum
from tinkex_py.data.chat import ChatRenderer
from tinkex_py.data.datums import chat_datum, datums_from, preference_datums, text_datum
from tinkex_py.data.distillation import teacher_datums, with_teacher_advantages, with_teacher_logprobs
from tinkex_py.data.images import image_tokens
from tinkex_py.data.pairs import with_role_masks

__all__ = [
    "ChatRenderer",
    "candidates_datum",
    "chat_datum",
    "datums_from",
    "image_tokens",
    "preference_datums",
    "teacher_datums",
    "text_datum",
    "with_role_masks",
    "with_teacher_advantages",
    "with_teacher_logprobs",
]
