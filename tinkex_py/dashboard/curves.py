"""The numbers of a run over its steps, in bounded memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# A chart is not wider than so many pixels.
POINTS = 2000


@dataclass
class _Sums:
    """Sum and number of the values of each point."""

    sums: list[float] = field(default_factory=list[float])
    counts: list[int] = field(default_factory=list[int])

    def grow(self, points: int) -> None:
        missing = points - len(self.sums)
        if missing > 0:
            self.sums += [0.0] * missing
            self.counts += [0] * missing

    def join_neighbours(self, points: int) -> None:
        self.grow(points)
        self.sums = [a + b for a, b in zip(self.sums[::2], self.sums[1::2], strict=True)]
        self.counts = [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]


class Curves:
    """One curve per name of `tinkex_py.runs.scalars`.

    At most `most_points` points are kept. When they are full, each two neighbours are joined, and from then on a point
    stands for twice as many steps: its value is their mean, its position on an x axis that of the last of them.

    Args:
        most_points: number of points to keep; even.

    Attributes:
        axes: name of the x axis -> position of each point; "step" is always there.
        stride: number of steps per point.
        steps_made: number of steps that were added.
    """

    def __init__(self, most_points: int = POINTS) -> None:
        if most_points < 2 or most_points % 2:
            raise ValueError(f"most_points must be even and at least 2, got {most_points}")
        self.axes: dict[str, list[float]] = {"step": []}
        self.stride = 1
        self.steps_made = 0
        self._most_points = most_points
        self._curves: dict[str, _Sums] = {}

    @property
    def points(self) -> int:
        """The number of points."""
        return len(self.axes["step"])

    @property
    def names(self) -> list[str]:
        """The names, in order of their first value."""
        return list(self._curves)

    def add(self, step: int, numbers: Mapping[str, float], **positions: float) -> None:
        """Adds the numbers of one step. A step that is not after the last one is ignored.

        Args:
            step: its number.
            numbers: name -> value. Values that are not finite are ignored.
            positions: on further x axes, the same ones for every step.
        """
        if self.points and step <= self.axes["step"][-1]:
            return
        if self.steps_made == self._most_points * self.stride:
            self._join_neighbours()
        point = self.steps_made // self.stride
        self.steps_made += 1
        for axis, position in {"step": step, **positions}.items():
            self.axes.setdefault(axis, [])[point:] = [position]
        for name, value in numbers.items():
            curve = self._curves.get(name)
            if curve is None:
                curve = self._curves[name] = _Sums()
            curve.grow(point + 1)
            if math.isfinite(value):
                curve.sums[point] += value
                curve.counts[point] += 1

    def values(self, name: str, start: int = 0) -> list[float | None]:
        """Returns the points of one curve from point `start` on; None where a point has no value."""
        curve = self._curves.get(name) or _Sums()
        curve.grow(self.points)
        points = zip(curve.sums[start:], curve.counts[start:], strict=True)
        return [total / count if count else None for total, count in points]

    def _join_neighbours(self) -> None:
        for curve in self._curves.values():
            curve.join_neighbours(self._most_points)
        self.axes = {axis: positions[1::2] for axis, positions in self.axes.items()}
        self.stride *= 2
