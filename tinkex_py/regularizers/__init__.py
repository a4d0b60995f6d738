"""Ready-made regularizers; their names are in `__init__.pyi`, loaded when used."""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
