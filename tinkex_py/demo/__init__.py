"""`tinkex-py demo`: fine-tunes a real language model with a composed loss, and shows what happens."""

from tinkex_py.demo.run import DemoOptions, DemoSummary, run_demo

__all__ = ["DemoOptions", "DemoSummary", "run_demo"]
