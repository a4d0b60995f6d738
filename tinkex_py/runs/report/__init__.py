"""`tinkex-py report`: runs as one HTML page and its pictures."""

from tinkex_py.runs.report.summary import RunSummary
from tinkex_py.runs.report.writing import Report, write_report

__all__ = ["Report", "RunSummary", "write_report"]
