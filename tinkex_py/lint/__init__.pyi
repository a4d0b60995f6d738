"""The names that `__init__.py` loads on first use."""

from .findings import LossFinding as LossFinding
from .linter import (
    assert_no_findings as assert_no_findings,
    lint as lint,
)
