"""A curve of any length in bounded memory: the smallest and the largest value of every stretch of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

STRETCHES = 1000
"""At most so many stretches a curve, and two points of each: no more than a screen has columns."""


@dataclass(slots=True)
class _Stretch:
    """What is kept of the values of consecutive steps."""

    low: tuple[int, float]
    high: tuple[int, float]
    total: float
    count: int

    def add(self, step: int, value: float) -> None:
        if value < self.low[1]:
            self.low = (step, value)
        if value > self.high[1]:
            self.high = (step, value)
        self.total += value
        self.count += 1

    def absorb(self, later: _Stretch) -> None:
        self.low = min(self.low, later.low, key=lambda point: point[1])
        self.high = max(self.high, later.high, key=lambda point: point[1])
        self.total += later.total
        self.count += later.count


class Curve:
    """Values by step, of which every extreme is kept: min-max decimation over stretches whose width doubles.

    Stretches begin at multiples of their width (a power of two), so those of different curves lie on one another.
    A value that is not finite is kept aside, by its step.
    """

    __slots__ = ("_limit", "_strange", "_stretches", "last", "width")

    def __init__(self, limit: int = STRETCHES) -> None:
        if limit < 2:
            raise ValueError(f"a curve needs at least 2 stretches, got {limit}")
        self._limit = limit
        self._stretches: dict[int, _Stretch] = {}
        self._strange: dict[int, int] = {}
        self.last: tuple[int, float] | None = None
        """The value that came last, finite or not."""
        self.width = 1

    def add(self, step: int, value: float) -> None:
        """Take in a value. Steps may come in any order."""
        self.last = (step, value)
        place = step // self.width
        if not math.isfinite(value):
            self._strange.setdefault(place, step)
            kept = len(self._strange)
        elif (stretch := self._stretches.get(place)) is not None:
            stretch.add(step, value)
            return
        else:
            self._stretches[place] = _Stretch((step, value), (step, value), value, 1)
            kept = len(self._stretches)
        if kept > self._limit:
            self._widen()

    def _widen(self) -> None:
        while max(len(self._stretches), len(self._strange)) > self._limit:
            self.width *= 2
            wider: dict[int, _Stretch] = {}
            for place, stretch in sorted(self._stretches.items()):
                if place // 2 in wider:
                    wider[place // 2].absorb(stretch)
                else:
                    wider[place // 2] = stretch
            strange: dict[int, int] = {}
            for place, step in sorted(self._strange.items()):
                strange.setdefault(place // 2, step)
            self._stretches, self._strange = wider, strange

    def points(self) -> list[tuple[int, float]]:
        """(step, value) in the order of steps: both extremes of each stretch, and the last value if it is finite."""
        found: set[tuple[int, float]] = set()
        for stretch in self._stretches.values():
            found |= {stretch.low, stretch.high}
        if self.last is not None and math.isfinite(self.last[1]):
            found.add(self.last)
        return sorted(found)

    def strange(self) -> list[int]:
        """Steps at which the value was not finite, the first one of each stretch."""
        return sorted(self._strange.values())

    def means(self, width: int) -> dict[int, float]:
        """Number of each stretch of `width` steps (a power of two, at least the curve's) -> mean of its values."""
        sums: dict[int, list[float]] = {}
        for place, of in sorted(self._stretches.items()):
            total = sums.setdefault(place * self.width // width, [0.0, 0.0])
            total[0] += of.total
            total[1] += of.count
        return {place: total / count for place, (total, count) in sums.items()}
