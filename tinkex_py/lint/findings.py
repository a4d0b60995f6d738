"""What the linter finds."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class LossFinding:
    """A likely mistake in a term.

    Attributes:
        term: name of the term; "base_loss" for the base loss.
        rule: the rule that found it.
        severity: "error" trains something else than intended, or stops the training; "warning" may be intended.
        problem: what was observed, with numbers.
        way_out: what to do.
    """

    term: str
    rule: str
    severity: Severity
    problem: str
    way_out: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.severity}: {self.term}: {self.rule}: {self.problem}. {self.way_out}"
