"""Training runs: the loop, the folder it writes, and reports. The public names are listed in `__init__.pyi`."""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
