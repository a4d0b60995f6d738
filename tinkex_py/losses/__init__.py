"""Composes a loss from a base loss and weighted regularizers. `__init__.pyi` lists the names, which load lazily."""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
