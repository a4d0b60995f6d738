"""Asyncio-first Python SDK for LLM training services that speak the Tinker API, with composable losses.

Importing this package loads neither torch nor an HTTP library: each public name, listed in `__init__.pyi`, is loaded
at its first use.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
