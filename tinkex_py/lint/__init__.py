"""Finds mistakes in a loss before it is trained with. `__init__.pyi` lists the names, which load on first use."""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
