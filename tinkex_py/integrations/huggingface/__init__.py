"""Hugging Face: datums from rows and chat templates, and checkpoints as peft adapters.

Needs the extra `huggingface`. The names are in `__init__.pyi`, loaded when used.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
