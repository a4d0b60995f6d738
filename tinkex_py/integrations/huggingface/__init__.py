"""Hugging Face: datums from rows and chat templates, and checkpoints as peft adapters."""

from tinkex_py.data import chat_datum, datums_from, preference_datums, text_datum
from tinkex_py.integrations.huggingface.adapters import download_adapter, export_adapter

__all__ = ["chat_datum", "datums_from", "download_adapter", "export_adapter", "preference_datums", "text_datum"]
