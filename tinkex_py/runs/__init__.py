"""Training runs: a loop, the folder it writes, and what is drawn from it. Its names are in `__init__.pyi`."""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
