"""`tinkex-py demo`: fine-tunes a pretrained language model with a composed loss, and shows progress and samples."""

from tinkex_py.demo.run import DemoOptions, DemoSummary, run_demo

__all__ = ["DemoOptions", "DemoSummary", "run_demo"]
