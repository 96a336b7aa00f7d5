"""Bounded memory of every figure: all that rules may look at."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ddp_streammon import keys


class Entry(NamedTuple):
    """One value and when it was true."""

    step: int
    epoch: float | None
    value: float


_FOLD = 256
"""Rows kept aside before they are sorted into columns: one pass over all keys' memory for so many steps."""


class _Series:
    """Steps, epochs and values of one key: 24 bytes an entry, trimmed from the front."""

    __slots__ = ("epochs", "steps", "values")

    def __init__(self) -> None:
        self.steps = array("q")
        self.epochs = array("d")
        self.values = array("d")

    def extend(self, steps: Sequence[int], epochs: Sequence[float], values: Sequence[float], limit: int) -> None:
        self.steps.extend(steps)
        self.epochs.extend(epochs)
        self.values.extend(values)
        if len(self.values) > limit + limit // 8:  # trimmed in blocks: one move for many appends
            for column in (self.steps, self.epochs, self.values):
                del column[:-limit]

    def tail(self, count: int) -> list[Entry]:
        start = max(len(self.values) - count, 0)
        rows = zip(self.steps[start:], self.epochs[start:], self.values[start:], strict=True)
        return [Entry(step, None if math.isnan(epoch) else epoch, value) for step, epoch, value in rows]


class History:
    """Every value with its step and epoch, at most `limit` for each key.

    `history[key]` is the list of values (empty where nothing was logged, as the guide's plotting code expects);
    `history.series(key)` has steps and epochs too. Equal on every rank, since figures arrive at fixed steps.
    """

    def __init__(self, limit: int = 10_000) -> None:
        if limit < 1:
            raise ValueError(f"history limit must be at least 1, got {limit}")
        self.limit = limit
        self._columns: dict[str, _Series] = {}
        self._rows: list[tuple[int, float, dict[str, float]]] = []

    def append(self, step: int, epoch: float | None, values: Mapping[str, float]) -> None:
        """Remember `values` as true at `step`. TypeError or ValueError for what is no number, before anything is."""
        row = {key: float(value) for key, value in values.items()}
        self._rows.append((int(step), math.nan if epoch is None else float(epoch), row))
        if len(self._rows) >= _FOLD:
            self._fold()

    def _fold(self) -> dict[str, _Series]:
        """Sort the rows kept aside into the columns, which are then complete."""
        if self._rows:
            for names, alike in itertools.groupby(self._rows, key=lambda row: tuple(row[2])):
                steps, epochs, rows = zip(*alike, strict=True)
                when = array("q", steps), array("d", epochs)
                for name, values in zip(names, zip(*map(dict.values, rows), strict=True), strict=True):
                    self._columns.setdefault(name, _Series()).extend(*when, values, self.limit)
            self._rows.clear()
        return self._columns

    def __getitem__(self, key: str) -> list[float]:
        series = self._fold().get(key)
        return [] if series is None else series.values[-self.limit :].tolist()

    def __contains__(self, key: object) -> bool:
        return key in self._fold()

    def __iter__(self) -> Iterator[str]:
        return iter(self._fold())

    def __len__(self) -> int:
        return len(self._fold())

    def keys(self) -> list[str]:
        """Every key that has a value."""
        return list(self._fold())

    def series(self, key: str) -> list[Entry]:
        """The entries of `key`, oldest first. KeyError with the nearest keys where there is none."""
        series = self._fold().get(key)
        if series is None:
            near = ", ".join(keys.nearest(key, self._columns)) or "none: nothing was logged yet"
            raise KeyError(f"no value was logged under {key!r}; nearest keys: {near}")
        return series.tail(self.limit)

    def tail(self, key: str, count: int) -> list[Entry]:
        """The last `count` entries of `key`, oldest first; empty where there is none. Copies only these."""
        series = self._fold().get(key)
        return [] if series is None else series.tail(min(count, self.limit))

    def latest(self, key: str) -> float:
        """The last value of `key`; nan where there is none."""
        series = self._fold().get(key)
        return math.nan if series is None else series.values[-1]

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, equal on every rank."""
        return {
            "limit": self.limit,
            "series": {
                key: {
                    "steps": series.steps[-self.limit :].tolist(),
                    "epochs": series.epochs[-self.limit :].tolist(),
                    "values": series.values[-self.limit :].tolist(),
                }
                for key, series in self._fold().items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by `state`; keeps this History's own limit."""
        self._columns, self._rows = {}, []
        for key, columns in state["series"].items():
            self._columns[key] = _Series()
            self._columns[key].extend(columns["steps"], columns["epochs"], columns["values"], self.limit)
