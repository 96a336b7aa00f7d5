"""Rules about the ranks' own gradients, before the average: an outlier among them, and ranks fed the same batch."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ddp_streammon.config import Severity
from ddp_streammon.ranks import LocalNorms
from ddp_streammon.rules.finding import Finding
from ddp_streammon.stats import StepStats

OUTLIER, SAME_BATCH = "OUTLIER", "SAME"
WINDOW = 40
"""Measured steps that are looked at together, once each."""
ALWAYS = 36
"""In so many of them the rank must be the largest (or in so many the smallest). Of W ranks whose items are drawn alike,
each is the largest of a step with a probability of 1 / W, whatever the distribution: two are told apart by chance in
one window of 5 million, more ranks hardly ever (the binomial tail; tests/test_own_gradient_rules.py)."""
FACTOR = 1.5
"""Geometric mean, over the window, of the rank's norm against the median of the others (or its inverse): a difference
that is certain but small is not worth a word. A choice: ranks whose batches differ twofold in size
differ by up to 1.41, the root of it, where noise makes up their gradients."""
ROUNDING = 1e-6
"""Relative difference of two norms of the same float32 gradients, summed in another order."""
REPEATS = 3
"""Steps in a row in which ranks have the same norms in every stream."""


@dataclass
class _Watched:
    """Ranks that are heard together."""

    steps: deque[tuple[LocalNorms, ...]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    count: int = 0
    outliers: list[Finding] = field(default_factory=list)
    same: list[Finding] = field(default_factory=list)


class OwnGradients:
    """OUTLIER (warning): a rank whose gradient of a stream is nearly always the largest, or the smallest, and far from
    the median of the others, over a window of steps; with two ranks both are named. SAME (warning): ranks whose
    gradients have the same norms in every stream, step after step: they are fed the same batches.

    `shared_data`: some ranks see the same data on purpose (tensor parallel), so SAME is not looked for. Ranks that are
    heard in turns are compared with those of their turn. State starts anew with every monitor.
    """

    def __init__(self, *, shared_data: bool = False) -> None:
        self._shared_data = shared_data
        self._watched: dict[tuple[int, ...], _Watched] = {}

    def check(self, stats: StepStats) -> list[Finding]:
        """Take in a step; what stands: SAME as of now, OUTLIER since the last whole window."""
        if len(stats.local) > 1:
            watched = self._watched.setdefault(tuple(rank.rank for rank in stats.local), _Watched())
            watched.steps.append(stats.local)
            watched.count += 1
            watched.same = [] if self._shared_data else _same(watched.steps, stats.step)
            if watched.count % WINDOW == 0:
                watched.outliers = _outliers(watched.steps, tuple(stats.streams), stats.step)
        return [finding for heard in self._watched.values() for finding in (*heard.same, *heard.outliers)]


def _same(steps: Sequence[Sequence[LocalNorms]], now: int) -> list[Finding]:
    """One finding for each set of ranks that agree; ranks that do are neighbours when sorted by their norms."""
    if len(steps) < REPEATS:
        return []
    recent = [steps[-back] for back in range(1, REPEATS + 1)]
    places = sorted(range(len(recent[0])), key=lambda place: [_sortable(norm) for norm in recent[0][place].norms])
    groups = [[places[0]]]
    for before, place in itertools.pairwise(places):
        if all(_equal(ranks[before].norms, ranks[place].norms) for ranks in recent):
            groups[-1].append(place)
        else:
            groups.append([place])
    alike = [sorted(recent[0][place].rank for place in group) for group in groups if len(group) > 1]
    return [
        Finding(
            f"⚠️  ranks {_few(ranks)} have had gradients of the same norm in every stream for {REPEATS} steps up to "
            f"step {now}: they are fed the same batches; use a DistributedSampler, call its set_epoch, and seed random "
            "augmentation by rank",
            rule=SAME_BATCH,
            severity=Severity.warning,
            step=now,
            evidence={f"rank {rank}": 1.0 for rank in ranks[:16]},
        )
        for ranks in sorted(alike)
    ]


def _sortable(norm: float) -> float:
    return -1.0 if math.isnan(norm) else norm


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether all norms that both know agree; where both are zero nothing is said."""
    known = [(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y) and (x or y)]
    return bool(known) and all(math.isclose(x, y, rel_tol=ROUNDING) for x, y in known)


def _outliers(steps: Sequence[Sequence[LocalNorms]], streams: Sequence[str], now: int) -> list[Finding]:
    ranks = [rank.rank for rank in steps[-1]]
    findings = []
    for number, stream in enumerate(streams):
        table = [[rank.norms[number] for rank in step] for step in steps]
        rows = [row for row in table if all(math.isfinite(norm) and norm > 0 for norm in row)]
        place = outlier(rows)
        if place is not None:
            findings.append(_told(stream, ranks, rows, place, now))
    return findings


def outlier(rows: Sequence[Sequence[float]]) -> int | None:
    """The rank, by its place, that stands apart from the others in nearly all of a window's steps; None without one.

    `rows`: [steps][ranks] norms, positive. Of two ranks, the larger one.
    """
    candidates = []
    for extreme in (max, min):
        places = Counter(row.index(extreme(row)) for row in rows)
        candidates += [place for place, count in places.items() if count >= ALWAYS]
    far = {place: abs(math.log(factor(rows, place))) for place in candidates}
    best = max(far, key=lambda place: far[place], default=None)
    return best if best is not None and far[best] > math.log(FACTOR) else None


def factor(rows: Sequence[Sequence[float]], place: int) -> float:
    """Geometric mean, over the steps, of a rank's norm against the median of the other ranks'."""
    others = [statistics.median([*row[:place], *row[place + 1 :]]) for row in rows]
    return math.exp(
        statistics.fmean(math.log(row[place]) - math.log(other) for row, other in zip(rows, others, strict=True))
    )


def _told(stream: str, ranks: Sequence[int], rows: Sequence[Sequence[float]], place: int, now: int) -> Finding:
    rank, times = ranks[place], factor(rows, place)
    if len(ranks) == 2:
        whose = f"that of rank {ranks[1 - place]}"
        do = f"with two ranks it cannot be said which is wrong; compare the data of ranks {ranks[0]} and {ranks[1]}"
    else:
        whose = "the median of the other ranks'"
        do = f"compare the data of rank {rank} with that of another"
    return Finding(
        f"⚠️  {stream}: the gradient of rank {rank} is {times:.2g} times {whose}, before the average, in nearly all of "
        f"the {WINDOW} measured steps up to step {now}: {do}",
        rule=OUTLIER,
        severity=Severity.warning,
        stream=stream,
        rank=rank if len(ranks) > 2 else None,
        step=now,
        evidence={"factor": times}
        | {f"rank {number}": _usual([row[at] for row in rows]) for at, number in enumerate(ranks[:16])},
    )


def _usual(norms: Sequence[float]) -> float:
    """Their geometric mean."""
    return math.exp(statistics.fmean(map(math.log, norms)))


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
