"""Ready-made base losses. `__init__.pyi` lists their names, which are loaded on first use."""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
