"""A rank whose own gradient, before the average, stands apart from the others'."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ddp_streammon import keys
from ddp_streammon.ranks import LocalNorms
from ddp_streammon.rules.engine import Kind, Rule, Signal
from ddp_streammon.rules.of_ranks import BOTH
from ddp_streammon.rules.signals import few
from ddp_streammon.rules.view import View
from ddp_streammon.stats import StepStats

WINDOW = 40
"""Measured steps that are looked at together."""
ALWAYS = 0.9
"""In this share of them the rank must be the largest (or in so many the smallest). Of W ranks whose items are drawn
alike, each is the largest of a step with a probability of 1 / W, whatever the distribution: two are told apart by
chance in one window of 5 million, more ranks hardly ever (the binomial tail; tests/test_own_gradient_rules.py)."""
FEW, MANY = 12, 8
"""So few steps do where so many ranks are compared, by the same tail: heard in turns, they take long to fill more."""


@dataclass(frozen=True)
class Outlier(Rule):
    """OUTLIER: a rank whose own gradient of a stream is the largest, or the smallest, in nearly all of `WINDOW` steps,
    and far from the others' (`ALWAYS`, `factor`). With two ranks none is named."""

    id: ClassVar[str] = "OUTLIER"
    kind: ClassVar[Kind] = Kind.windowed
    requires: ClassVar[tuple[str, ...]] = ("local gradients", "data ranks", "no model peers")

    hold: int = 2
    every: int = 10
    warm_up: int = 39
    factor: float = 1.5
    """Geometric mean, over the window, of the rank's norm against the median of the others (or its inverse): what is
    certain but small is not worth a word. A choice: ranks whose batches differ twofold in size differ by up to 1.41,
    the root of it, where noise makes up their gradients."""

    def check(self, view: View) -> Iterator[Signal]:
        for _, steps in view.together(self.every, WINDOW, _local):
            yield from self._among(view, [local for local in steps if local])

    def _among(self, view: View, steps: Sequence[Sequence[LocalNorms]]) -> Iterator[Signal]:
        """Of ranks that are heard together."""
        ranks = [of.rank for of in steps[-1]] if steps else []
        if len(ranks) < 2 or len(steps) < (FEW if len(ranks) >= MANY else WINDOW):
            return
        for number, stream in enumerate(view.now.streams):
            rows = [[of.norms[number] for of in step] for step in steps]
            rows = [row for row in rows if all(math.isfinite(norm) and norm > 0 for norm in row)]
            place = outlier(rows) if len(rows) >= ALWAYS * len(steps) else None
            if place is None:
                continue
            far = times(rows, place)
            yield Signal(
                None if stream == keys.SHARED else stream,
                ranks[place] if len(ranks) > 2 else None,
                f"{stream}: the own gradient of rank {ranks[place]} is {far:.2g} times that of the others, before the "
                "average",
                likely=f"the data of rank {ranks[place]} are others" if len(ranks) > 2 else f"other data; {BOTH}",
                do=f"compare the data of {few(ranks[:2] if len(ranks) == 2 else [ranks[place]])} with another rank's",
                confirm="their ratio is near 1",
                strength=abs(math.log(far)) / math.log(self.factor),
                evidence={"factor": far, "threshold": self.factor},
            )


def _local(step: StepStats) -> Sequence[LocalNorms]:
    return step.local


def outlier(rows: Sequence[Sequence[float]]) -> int | None:
    """The rank, by its place, that is the largest, or the smallest, in nearly all of a window's steps; None without
    one. `rows`: [steps][ranks] norms, positive. Of two ranks, the larger one."""
    least = math.ceil(ALWAYS * len(rows))
    found = []
    for extreme in (max, min) if len(rows[0]) > 2 else (max,):
        places = Counter(row.index(extreme(row)) for row in rows)
        found += [place for place, count in places.items() if count >= least]
    return max(found, key=lambda place: abs(math.log(times(rows, place))), default=None)


def times(rows: Sequence[Sequence[float]], place: int) -> float:
    """Geometric mean, over the steps, of a rank's norm against the median of the other ranks'."""
    others = [statistics.median([*row[:place], *row[place + 1 :]]) for row in rows]
    return math.exp(
        statistics.fmean(math.log(row[place]) - math.log(other) for row, other in zip(rows, others, strict=True))
    )
