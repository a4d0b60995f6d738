"""The embedded service: a torch engine behind an ASGI app that speaks the Tinker protocol.

One machine, one process, one base model with a LoRA adapter per training client. Importing this package loads
neither torch nor transformers; `LocalService.start` does.
"""

from tinkex_py.local.options import LocalOptions
from tinkex_py.local.service import LocalService, serve

__all__ = ["LocalOptions", "LocalService", "serve"]
