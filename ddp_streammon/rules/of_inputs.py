"""Rules about what goes into the streams: empty, constant, unscaled, the same on two ranks, or in the same order."""

from __future__ import annotations

import itertools
import math
import statistics
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import truediv
from typing import ClassVar, NamedTuple

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.moments.sample import ABS_MAX, BITS, CONSTANT, COUNT, SQ_SUM, SUM
from ddp_streammon.rank_facts import RankFacts, alike
from ddp_streammon.ranks import LocalNorms
from ddp_streammon.rules.engine import QUIET, Kind, Rule, Signal
from ddp_streammon.rules.signals import few
from ddp_streammon.rules.view import View
from ddp_streammon.stats import StepStats

ROUNDING = 1e-6
"""Relative difference of two norms of the same float32 gradients, summed in another order."""


@dataclass(frozen=True)
class _Empty(Rule):
    """A stream's input says nothing on a rank, `hold` measured steps in a row. Batches without the modality are legal:
    where the condition has come and gone it has to last four times longer, and optional streams are left out. Where
    the caller says by `present` that there is data, it holds at once."""

    kind: ClassVar[Kind] = Kind.input
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("inputs",)
    intermittent: ClassVar[bool] = True

    hold: int = 4

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            present = view.now.scalars.get(keys.of_stream(stream, keys.PRESENT))
            absent = present is not None and present.mean == 0
            if stream in view.intent.auxiliary or absent:
                continue
            bad = self.empty(view, stream)
            if bad and len(bad) == len(view.ranks):
                everyone = len(bad) == view.setup.world > 1
                yield replace(self.signal(stream, None, "every rank" if everyone else few(bad)), among=bad)
            else:
                for rank in bad:
                    yield self.signal(stream, rank, few([rank]))

    @abstractmethod
    def empty(self, view: View, stream: str) -> list[int]:
        """The ranks on which the stream's input says nothing."""

    @abstractmethod
    def signal(self, stream: str, rank: int | None, where: str) -> Signal:
        """What is said of it."""


@dataclass(frozen=True)
class ZeroInput(_Empty):
    """INZ: a stream's input is all zeros. No threshold; see `_Empty` for batches without the modality."""

    id: ClassVar[str] = "INZ"

    def empty(self, view: View, stream: str) -> list[int]:
        return view.ranks.without_input(view.number(stream))

    def signal(self, stream: str, rank: int | None, where: str) -> Signal:
        return Signal(
            stream,
            rank,
            f"{stream}: its input has been all zeros on {where} for {self.hold} steps",
            likely="a sensor that is off, a wrong key, or empty records",
            do=f"look at what the loader gives for {stream} on {where}; pass present={{...}} where it may be missing",
            confirm="this line clears",
            evidence={"abs_max": 0.0},
        )


@dataclass(frozen=True)
class ConstantInput(_Empty):
    """INC: all items of a batch are the same for a stream, and the same as in the steps before. No threshold."""

    id: ClassVar[str] = "INC"

    hold: int = 3

    def empty(self, view: View, stream: str) -> list[int]:
        number = view.number(stream)
        if not any(view.ranks.of_input(number, CONSTANT)):
            return []
        ((ranks, steps),) = view.together(1, 2, _looks, number)
        same = {rank for rank, *looks in zip(ranks, *steps, strict=True) if len(set(looks)) == 1}
        given = view.ranks.inputs(number)
        return [rank for rank, of in given if of.constant == 1 and of.abs_max > 0 and rank in same]

    def signal(self, stream: str, rank: int | None, where: str) -> Signal:
        return Signal(
            stream,
            rank,
            f"{stream}: all items have had the same input on {where} for {self.hold} steps",
            likely="one frame is repeated: a frozen sensor, or an index that never moves",
            do=f"look at what the loader gives for {stream} on {where}",
            confirm="this line clears",
            evidence={"constant": 1.0},
        )


def _looks(step: StepStats, number: int) -> list[tuple[float, float]]:
    """Of each rank the mean of a stream's inputs, 0 where it has none, and their largest absolute value."""
    columns = (step.rank_facts.of_input(number, figure) for figure in (SUM, COUNT, ABS_MAX))
    rows = zip(*columns, strict=True)
    return [(total / count if count and not math.isnan(total) else 0.0, peak) for total, count, peak in rows]


@dataclass(frozen=True)
class Unscaled(Rule):
    """INN: the mean or the standard deviation of what a stream's first linear or convolution layer sees is above
    `most`, in `hold` steps in a row. Not evaluated where a norm layer, an embedding or the model's own scaling comes
    before it, since then it sees what they give."""

    id: ClassVar[str] = "INN"
    destabilises: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.input
    requires: ClassVar[tuple[str, ...]] = ("inputs",)

    hold: int = 5
    most: float = 10.0
    """A choice: ten times what standardised inputs have; torch-audit (TA301) has 50 for single values."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            sizes = []
            for _, of in view.ranks.inputs(view.number(stream)):
                if not math.isnan(of.first_std):
                    sizes.append((abs(of.first_mean), of.first_std))
                    if max(sizes[-1]) < QUIET * self.most:
                        break  # the best rank decides: where some only are unscaled, INR says so
            if not sizes or not view.trained(stream):
                continue
            mean, std = min(sizes, key=max)
            if max(mean, std) < QUIET * self.most:
                continue
            yield Signal(
                stream,
                seen=f"{stream}: its first layer sees inputs of mean {mean:.3g} and standard deviation {std:.3g}",
                likely="raw values that nobody has normalised",
                do=f"normalise {stream}: subtract {mean:.3g} and divide by {std:.3g} (of the training set)",
                confirm="mean near 0 and standard deviation near 1",
                strength=max(mean, std) / self.most,
                evidence={"mean": mean, "std": std, "threshold": self.most},
            )


@dataclass(frozen=True)
class OtherScale(Rule):
    """INR: the size of a stream's input on one rank is `factor` times that on the others, or its mean is `shift`
    standard deviations away, in the median of `WINDOW` steps. With two ranks the one that is farther from a root mean
    square of 1 is named where that is clear (`factor` again), or none."""

    id: ClassVar[str] = "INR"
    destabilises: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.input
    requires: ClassVar[tuple[str, ...]] = ("inputs", "data ranks")

    WINDOW: ClassVar[int] = 10
    hold: int = 2
    every: int = 5
    clear: float = 0.8
    warm_up: int = 9
    factor: float = 2.5
    """A choice: batches of 8 items of one data set differ by less than 1.5 in the median of ten."""
    shift: float = 2.0
    """In standard deviations of the others' inputs: a choice."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            for ranks, steps in view.together(self.every, self.WINDOW, _given, view.number(stream)):
                if not self._close(steps):
                    yield from self._among(stream, view.of_data(_means_and_sizes(ranks, steps)))

    def _close(self, steps: Sequence[_Given]) -> bool:
        """Whether ranks are so close in every step that their medians cannot stand apart. Where in each step one rank
        has at most a factor times another's size, or a distance more than its mean, so it has in their medians."""
        told = [step for step in steps if not math.isnan(step.least)]
        factor = max((step.factor for step in told), default=1.0)
        shift = max((step.shift for step in told), default=0.0)
        least = min((step.least for step in told), default=1.0)
        return factor < self.factor**QUIET and shift < QUIET * self.shift * least

    def _among(self, stream: str, given: Mapping[int, Sequence[tuple[float, float]]]) -> Iterator[Signal]:
        """Of ranks that are heard together; `given`: mean and root mean square of the inputs of each step."""
        sizes, means = {}, {}
        for rank, inputs in given.items():
            if len(inputs) >= self.WINDOW // 2 and (size := statistics.median([rms for _, rms in inputs])) > 0:
                sizes[rank] = size
                means[rank] = statistics.median([mean for mean, _ in inputs])
        if len(sizes) < 2:
            return
        odd, strength = self._odd(sizes, means)
        if strength < QUIET:
            return
        told = ", ".join(f"{size:.3g} on rank {at}" for at, size in list(sizes.items())[:4])
        yield Signal(
            stream,
            odd,
            f"{stream}: its inputs differ between ranks: root mean square {told}",
            likely=f"the shard of {few([odd]) if odd is not None else 'one of them'} was written or normalised "
            "differently",
            do=f"compare the {stream} records of {few(list(sizes)[:2])}"
            if odd is None
            else f"look at the {stream} records of rank {odd}",
            confirm="the root mean squares agree",
            strength=strength,
            evidence={f"rank {at}": size for at, size in list(sizes.items())[:16]},
            among=list(sizes),
        )

    def _odd(self, sizes: Mapping[int, float], means: Mapping[int, float]) -> tuple[int | None, float]:
        """The rank that stands apart, and how far in thresholds."""
        usual, middle = of_others(sizes), of_others(means)
        found = []
        for rank, size in sizes.items():
            apart = abs(math.log(size) - math.log(usual[rank])) / math.log(self.factor)
            found.append((max(apart, abs(means[rank] - middle[rank]) / usual[rank] / self.shift), rank))
        strength, rank = max(found)
        if len(sizes) > 2:
            rest = [mean for at, mean in means.items() if at != rank]
            agree = max(rest) - min(rest) < self.shift * usual[rank]
            return alone(rank, sizes, self.factor) if agree else None, strength
        far = {at: max(abs(math.log(size)), abs(means[at])) for at, size in sizes.items()}
        near, most = sorted(far, key=far.__getitem__)
        return (most if far[most] > far[near] + math.log(self.factor) / 2 else None), strength


class _Given(NamedTuple):
    """Of each rank the sum, the sum of squares and the number of the elements of a stream's inputs of a step, and how
    far ranks are apart: the largest root mean square over the least, the largest mean less the least, and the least
    root mean square. nan where no rank has any, infinite where some have none."""

    totals: array[float]
    squares: array[float]
    counts: array[float]
    factor: float
    shift: float
    least: float


def _given(step: StepStats, number: int) -> _Given:
    totals, squares, counts = (step.rank_facts.of_input(number, figure) for figure in (SUM, SQ_SUM, COUNT))
    if 0.0 in counts or not math.isfinite(sum(squares)):
        known = any(math.isfinite(square) and count for square, count in zip(squares, counts, strict=True))
        far, least = (math.inf, 0.0) if known else (math.nan, math.nan)
        return _Given(totals, squares, counts, far, far, least)
    if not counts:
        return _Given(totals, squares, counts, math.nan, math.nan, math.nan)
    if alike(counts):
        smallest, largest, lowest, highest = (of / counts[0] for of in _extremes(squares) + _extremes(totals))
    else:
        sizes, means = list(map(truediv, squares, counts)), list(map(truediv, totals, counts))
        smallest, largest, lowest, highest = _extremes(sizes) + _extremes(means)
    least = math.sqrt(smallest)
    factor = math.sqrt(largest) / least if least else math.inf
    return _Given(totals, squares, counts, factor, highest - lowest, least)


def _extremes(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _means_and_sizes(ranks: Sequence[int], steps: Sequence[_Given]) -> dict[int, list[tuple[float, float]]]:
    """Of each rank mean and root mean square of its inputs in the steps in which they are known."""
    found: dict[int, list[tuple[float, float]]] = {rank: [] for rank in ranks}
    for step in steps:
        for rank, total, squares, count in zip(ranks, step.totals, step.squares, step.counts, strict=False):
            if count and math.isfinite(squares):
                found[rank].append((total / count, math.sqrt(squares / count)))
    return found


@dataclass(frozen=True)
class SameBatch(Rule):
    """SAME: ranks are fed the same batches: samples of all streams' inputs agree bit for bit, `hold` measured steps in
    a row, while batches change from step to step. Where a stream's inputs cannot be seen, the ranks' losses have to,
    too; without these, the norms of their own gradients in every stream. No threshold; of ranks that share a batch on
    purpose (tensor parallel) the first is compared with those of other data."""

    id: ClassVar[str] = "SAME"
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("data ranks",)
    explains: ClassVar[bool] = False
    preflight: ClassVar[bool] = True

    hold: int = 3
    """A choice: chance does not do it once."""

    def check(self, view: View) -> Iterator[Signal]:
        numbers = [view.number(stream) for stream in view.streams]
        if any(_all_differ(view.ranks.of_input(number, BITS)) for number in numbers):
            return
        losses = [loss for loss in view.ranks.loss if not math.isnan(loss)]
        if not all(any(view.ranks.calls(number)) for number in numbers) and _all_differ(losses):
            return
        told = view.of_data(view.details)
        by_batch: dict[tuple[float, float], list[int]] = {}
        for rank, detail in told.items():
            seen = all(detail.inputs[view.number(stream)].calls > 0 for stream in view.streams)
            figures = (0.0 if math.isnan(detail.batch) else detail.batch, 0.0 if seen else detail.loss)
            if not math.isnan(figures[1]):
                by_batch.setdefault(figures, []).append(rank)
        if by_batch:
            same = [rank for ranks in by_batch.values() if len(ranks) > 1 for rank in ranks]
            batches = view.of_ranks(_batch, self.hold) if same else {}
            twins = [rank for rank in same if self._change(batches.get(rank, []))]
        elif len(view.setup.data_ranks) == view.setup.world:
            twins = _of_one_norm(view.now.local)
        else:
            twins = []
        if twins:
            yield Signal(
                seen=f"{few(sorted(twins))} are fed the same batches",
                likely="a sampler that was built without rank and number of replicas",
                do="use DistributedSampler(dataset, num_replicas, rank), or split the shards by rank",
                confirm="this line clears",
                evidence={f"rank {rank}": 1.0 for rank in sorted(twins)[:16]},
                among=twins,
            )

    def _change(self, batches: Sequence[float]) -> bool:
        return len(batches) < 2 or len(set(batches)) == len(batches)


def _all_differ(values: Sequence[float]) -> bool:
    return len(set(values)) == len(values) > 0


def _of_one_norm(local: Sequence[LocalNorms]) -> list[int]:
    """Ranks whose own gradients have the norms of another's in every stream; sorted by them, these are neighbours."""
    told = [of for of in local if all(map(math.isfinite, of.norms)) and any(of.norms)]
    pairs = itertools.pairwise(sorted(told, key=lambda of: of.norms))
    twins = [(a.rank, b.rank) for a, b in pairs if all(map(_equal, a.norms, b.norms))]
    return sorted({rank for pair in twins for rank in pair})


def _equal(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=ROUNDING)


def _batch(facts: RankFacts) -> float:
    if facts.detail is None:
        return math.nan
    return facts.detail.loss if math.isnan(facts.detail.batch) else facts.detail.batch


@dataclass(frozen=True)
class SameOrder(Rule):
    """ORDER: the batches of an epoch come in the order of the epoch before: `repeats` in a row, at one distance of at
    least as many steps. No threshold; epochs of few batches cannot be told from one batch that comes again."""

    id: ClassVar[str] = "ORDER"
    requires: ClassVar[tuple[str, ...]] = ("inputs",)
    explains: ClassVar[bool] = False

    repeats: int = 4
    """A choice, of batches whose samples agree bit for bit, which chance does not do once."""

    def check(self, view: View) -> Iterator[Signal]:
        memory = view.memory
        if memory.lag_held >= self.repeats <= memory.lag:
            yield Signal(
                seen=f"batches come in the same order every {memory.lag} measured steps",
                likely="sampler.set_epoch(epoch) is not called, or the data are not shuffled",
                do="call sampler.set_epoch(epoch) before each epoch, or shuffle",
                confirm="this line clears in the next epoch",
                evidence={"steps": float(memory.lag)},
            )


def odd_one(values: Mapping[int, float]) -> tuple[int, float]:
    """The rank farthest from the median of the others, in powers of e; of two, the larger one. Values are positive."""
    others = of_others(values)
    apart, _, rank = max((abs(math.log(value) - math.log(others[rank])), value, rank) for rank, value in values.items())
    return rank, apart


def alone(rank: int, values: Mapping[int, float], factor: float) -> int | None:
    """The rank, if the others agree up to a factor without it; None where no single rank stands apart."""
    rest = [value for at, value in values.items() if at != rank]
    return rank if max(rest) < factor * min(rest) else None


def of_others(values: Mapping[int, float]) -> dict[int, float]:
    """For each of several ranks the median of the other ranks' values; all are sorted once."""
    ranks = sorted(values, key=values.__getitem__)
    low, high = (len(ranks) - 2) // 2, (len(ranks) - 1) // 2
    found = {}
    for place, rank in enumerate(ranks):
        below, above = (values[ranks[at + (at >= place)]] for at in (low, high))
        found[rank] = below if low == high else (below + above) / 2
    return found
