"""Composing a loss from a base loss and weighted regularizers."""

from tinkex_py.losses.direct import Executor, GradientTracker, execute
from tinkex_py.losses.logprobs import packed_field, split
from tinkex_py.losses.output import BaseLossOutput, CustomLossOutput, RegularizerOutput
from tinkex_py.losses.pipeline import Pipeline
from tinkex_py.losses.spec import Metric, Regularizer, RegularizerSpec, Term, TermResult, per_datum

__all__ = [
    "BaseLossOutput",
    "CustomLossOutput",
    "Executor",
    "GradientTracker",
    "Metric",
    "Pipeline",
    "Regularizer",
    "RegularizerOutput",
    "RegularizerSpec",
    "Term",
    "TermResult",
    "execute",
    "packed_field",
    "per_datum",
    "split",
]
