"""How losses look in a notebook."""

import functools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

from tinkex_py.html_table import html_facts, html_table
from tinkex_py.losses.output import CustomLossOutput, GradientDiagnosis
from tinkex_py.losses.spec import BASE_LOSS_NAME, PerDatum, RegularizerSpec
from tinkex_py.losses.weights import WeightController

_COLUMNS = ("value", "weight", "weight x value", "gradient norm", "x weight", "share", "cosine with base")


def output_html(output: CustomLossOutput) -> str:
    """A row per term, then the total."""
    base, none = output.base_loss, GradientDiagnosis()
    own = output.diagnosis.get(BASE_LOSS_NAME, none)
    rows: list[Sequence[object]] = [
        ("base loss", base.value, None, base.value, base.grad_norm, base.grad_norm, own.share_of_total, None)
    ]
    for name, term in output.regularizers.items():
        lies = output.diagnosis.get(name, none)
        rows.append(
            (
                name,
                term.value,
                term.weight,
                term.contribution,
                term.grad_norm,
                term.grad_norm_weighted,
                lies.share_of_total,
                lies.cosine_with_base,
            )
        )
    rows.append(("total", None, None, output.loss_total, None, output.total_grad_norm, None, None))
    skipped = ", ".join(f"{name} ({reason})" for name, reason in output.skipped.items())
    return html_table("Composed loss", ("term", *_COLUMNS), rows, below=f"skipped: {skipped}" if skipped else "")


def spec_html(spec: RegularizerSpec) -> str:
    """One regularizer; what was left at its default is left out."""
    return html_facts(f"Regularizer {spec.name}", _facts(spec))


def pipeline_html(base_loss: object, specs: Sequence[RegularizerSpec], options: dict[str, object]) -> str:
    """The base loss and a row per regularizer."""
    facts: list[tuple[str, dict[str, object]]] = [("base loss", {"fn": _code(base_loss)})]
    facts += [(spec.name, _facts(spec)) for spec in specs]
    columns = list(dict.fromkeys(column for _, own in facts for column in own))
    rows = [(name, *(own.get(column) for column in columns)) for name, own in facts]
    told = ", ".join(f"{name}={value}" for name, value in options.items())
    return html_table("Pipeline", ("term", *columns), rows, below=told)


def _facts(spec: RegularizerSpec) -> dict[str, object]:
    return {
        "fn": _code(spec.fn),
        "weight": _weight(spec),
        "timeout": None if spec.timeout is None else "no limit" if math.isinf(spec.timeout) else f"{spec.timeout:g} s",
        "options": dict(spec.options) or None,
        "on error": None if spec.on_error == "raise" else spec.on_error,
        "enabled": None if spec.enabled else False,
        "max_grad_norm": spec.max_grad_norm,
        "retry": spec.retry if spec.retry is None or isinstance(spec.retry, int) else type(spec.retry).__name__,
    }


def _weight(spec: RegularizerSpec) -> object:
    weight = spec.weight
    if isinstance(weight, WeightController):
        return f"{type(weight).__name__}, now {weight.weights.get(spec.name, weight.initial):.5g}"
    return float(weight) if isinstance(weight, int | float) else _code(weight)


def _code(term: object) -> str:
    """What the user wrote, as near as can be told without its address in memory."""
    if isinstance(term, PerDatum):
        return f"per_datum({_code(term.fn)})"
    if isinstance(term, functools.partial):
        return f"partial({_code(term.func)})"
    if is_dataclass(term):
        return textwrap.shorten(repr(term), 120, placeholder=" ...")
    named: Any = term if hasattr(term, "__qualname__") or hasattr(term, "__name__") else type(term)
    return str(getattr(named, "__qualname__", named.__name__))
