"""The numbers of a run over its steps, in bounded memory."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# More points than a picture has pixels across show nothing more.
POINTS = 2000

Numbers = NDArray[np.float64]


class Curves:
    """One curve per name of `tinkex_py.runs.records.scalars`.

    However long a run is, at most `most_points` points are kept. When they are full, each two neighbours become one,
    and from then on a point stands for twice as many steps: its value is their mean, its step the last of them.

    Args:
        most_points: how many to keep at most; even.

    Attributes:
        stride: how many steps one point stands for.
        last_step: the last step that was added; 0 before any.
        steps_made: how many steps were added.
        non_finite: name -> how many values were NaN or infinite; those are left out of the means.
    """

    def __init__(self, most_points: int = POINTS) -> None:
        if most_points < 2 or most_points % 2:
            raise ValueError(f"most_points must be even and at least 2, got {most_points}")
        self.stride = 1
        self.last_step = 0
        self.steps_made = 0
        self.non_finite: dict[str, int] = {}
        self._most_points = most_points
        self._last_steps: NDArray[np.int64] = np.zeros(most_points, dtype=np.int64)
        self._sums: dict[str, Numbers] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    @property
    def points(self) -> int:
        """How many points there are."""
        return math.ceil(self.steps_made / self.stride)

    @property
    def names(self) -> list[str]:
        """The curves there are, in order of their first value."""
        return list(self._sums)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds the numbers of one step. A step that is not after the last one is left out."""
        if step <= self.last_step:
            return
        if self.steps_made == self._most_points * self.stride:
            self._join_neighbours()
        point = self.steps_made // self.stride
        self.steps_made += 1
        self.last_step = step
        self._last_steps[point] = step
        for name, value in numbers.items():
            self._add_value(name, point, value)

    def steps(self, start: int = 0) -> list[int]:
        """The step of each point, from point `start` on."""
        return self._last_steps[start : self.points].tolist()

    def values(self, name: str, start: int = 0) -> Numbers:
        """The points of one curve, from point `start` on; NaN where a point has no value.

        Args:
            name: one of `names`, or another, which gives NaN everywhere.
            start: number of points to leave out.
        """
        if name not in self._sums:
            return np.full(max(self.points - start, 0), math.nan)
        sums, counts = self._sums[name][start : self.points], self._counts[name][start : self.points]
        return np.divide(sums, counts, out=np.full(len(sums), math.nan), where=counts > 0)

    def _add_value(self, name: str, point: int, value: float) -> None:
        if name not in self._sums:
            self._sums[name] = np.zeros(self._most_points)
            self._counts[name] = np.zeros(self._most_points, dtype=np.int64)
        if math.isfinite(value):
            self._sums[name][point] += value
            self._counts[name][point] += 1
        else:
            self.non_finite[name] = self.non_finite.get(name, 0) + 1

    def _join_neighbours(self) -> None:
        half = self._most_points // 2
        self._last_steps[:half] = self._last_steps[1::2]
        for name in self._sums:
            for values in (self._sums[name], self._counts[name]):
                values[:half] = values.reshape(half, 2).sum(axis=1)
                values[half:] = 0
        self.stride *= 2
