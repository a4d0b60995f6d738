"""Early-stopping state."""

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from tinkex_py.errors import ConfigError
from tinkex_py.runs.settings import EarlyStop


class Patience(BaseModel):
    """The best measurement and how long ago it was.

    Attributes:
        best: the best measurement; None before the first.
        since: number of measurements after the best one.
    """

    model_config = ConfigDict(frozen=True)

    best: float | None = None
    since: int = 0

    def after(self, rule: EarlyStop, numbers: Mapping[str, float]) -> "Patience":
        """The state after one more step.

        Args:
            rule: what is monitored.
            numbers: of the step. Evaluations may be missing: not every step has one.

        Raises:
            ConfigError: the monitored number is missing.
        """
        value = numbers.get(rule.metric)
        if value is None:
            evaluated = any(name.startswith("evaluation/") for name in numbers)
            if rule.metric.startswith("evaluation/") and not evaluated:
                return self
            raise ConfigError(f"early_stop: there is no {rule.metric!r}; there are {', '.join(sorted(numbers))}")
        if self._is_better(rule, value):
            return Patience(best=value)
        return Patience(best=self.best, since=self.since + 1)

    def is_over(self, rule: EarlyStop) -> bool:
        """Whether the run must end."""
        return self.since >= rule.patience

    def _is_better(self, rule: EarlyStop, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if rule.better == "lower" else value - self.best
        return gain > rule.min_change
