"""Rules about ranks, as the engine evaluates them: settings, modes and batches that differ, replicas that are not
equal, and a rank that stands apart by its loss or its pace."""

from __future__ import annotations

import itertools
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.rank_facts import RankFacts, alike
from ddp_streammon.ranks import outvoted
from ddp_streammon.rules.engine import QUIET, Kind, Rule, Signal
from ddp_streammon.rules.finding import Action
from ddp_streammon.rules.memory import WINDOW
from ddp_streammon.rules.of_inputs import alone, odd_one
from ddp_streammon.rules.signals import few, single
from ddp_streammon.rules.view import View
from ddp_streammon.stats import StepStats

FAR = 100.0
"""In powers of e: as good as infinite."""
BOTH = "with two ranks no vote says which is wrong"


def _known(view: View, said: Sequence[float]) -> dict[int, float]:
    """What ranks say, in their order, by rank; without those that do not know."""
    return {rank: value for rank, value in zip(view.ranks.numbers, said, strict=False) if not math.isnan(value)}


def _told(values: Mapping[int, float]) -> str:
    by_value: dict[float, list[int]] = {}
    for rank, value in values.items():
        by_value.setdefault(value, []).append(rank)
    return ", ".join(f"{value:g} on {few(ranks)}" for value, ranks in by_value.items())


def rounded(values: Mapping[int, float]) -> dict[int, float]:
    """To three digits, so that ranks that agree are told together."""
    return {rank: float(f"{value:.3g}") for rank, value in values.items()}


def _set_to(view: View, number: int, setting: str) -> dict[int, float]:
    """What each rank has a setting of a stream set to, where it is known: of a learning rate its base, where all ranks'
    are."""
    if setting == keys.WEIGHT_DECAY:
        return _known(view, view.ranks.weight_decay(number))
    return _known(view, view.ranks.base_lr(number) or view.ranks.lr(number))


@dataclass(frozen=True)
class OtherSettings(Rule):
    """LR: the learning rate or weight decay of a stream differs between ranks. The majority is right; of two ranks the
    one whose other streams have the same factor to what is declared (or the same rate). No threshold."""

    id: ClassVar[str] = "LR"
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("data ranks", "optimizer")
    preflight: ClassVar[bool] = True

    def check(self, view: View) -> Iterator[Signal]:
        for number, stream in enumerate(view.now.streams):
            for setting, word, said in (
                (keys.LEARNING_RATE, "learning rate", view.ranks.lr(number)),
                (keys.WEIGHT_DECAY, "weight decay", view.ranks.weight_decay(number)),
            ):
                if alike(said):
                    continue
                values = _known(view, said)
                out = outvoted(list(values), list(values.values()))
                if not out:
                    continue
                rank = single(out)
                if rank is None and len(values) == 2:
                    rank = self._undeclared(view, number, setting)
                if rank is None and len(values) == 2 and setting == keys.LEARNING_RATE:
                    rank = self._odd(view, number, values)
                rank = rank if rank in values else None
                yield Signal(
                    None if stream == keys.SHARED else stream,
                    rank,
                    f"the {word} of {stream} differs between ranks: {_told(values)}",
                    likely="a configuration of one rank's own" if rank is not None else f"{BOTH}",
                    do=f"build optimizer and schedule from one configuration on every rank ({setting} of {stream})",
                    confirm="this line clears; load one state on every rank",
                    evidence={f"rank {at}": value for at, value in list(values.items())[:16]},
                    action=None if rank is None else self._action(view, number, setting, rank),
                    among=out,
                )

    def _action(self, view: View, number: int, setting: str, wrong: int) -> Action | None:
        """To give a rank what another has; None where only their schedules differ."""
        set_to = _set_to(view, number, setting)
        right, old = next((value for rank, value in set_to.items() if rank != wrong), None), set_to.get(wrong)
        if right is None or old is None or right == old:
            return None
        return Action(setting, list(view.now.streams)[number], right, old)

    def _undeclared(self, view: View, number: int, setting: str) -> int | None:
        """The one rank whose setting is not the declared one; None where it is not one."""
        name = list(view.now.streams)[number]
        meant = (view.intent.lr if setting == keys.LEARNING_RATE else view.intent.weight_decay).get(name)
        if meant is None:
            return None
        set_to = _set_to(view, number, setting)
        return single([rank for rank, value in set_to.items() if not math.isclose(value, meant, rel_tol=1e-6)])

    def _odd(self, view: View, number: int, values: Mapping[int, float]) -> int | None:
        """Of two ranks the one whose rate does not fit its other streams'; None where both do, or neither."""
        names = list(view.now.streams)
        spread = {}
        for facts in view.ranks:
            scales = [view.intent.lr.get(name) or 1.0 for name in names]
            rates = [rate / scale for rate, scale in zip(facts.lr, scales, strict=True) if rate > 0]
            own = facts.lr[number] / scales[number]
            spread[facts.rank] = sum(not math.isclose(own, rate, rel_tol=1e-6) for rate in rates)
        near, far = sorted(values, key=lambda rank: spread[rank])
        return far if spread[far] > spread[near] else None


@dataclass(frozen=True)
class OtherMode(Rule):
    """MODE: some ranks train in training mode and others in eval mode, or with modules in eval mode: these are named.
    No threshold."""

    id: ClassVar[str] = "MODE"
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("data ranks",)
    preflight: ClassVar[bool] = True

    hold: int = 2

    def check(self, view: View) -> Iterator[Signal]:
        for said, right in ((view.ranks.training, max), (view.ranks.in_eval, min)):
            values = {} if alike(said) else _known(view, said)
            if len(set(values.values())) > 1:
                most = right(values.values())
                bad = [rank for rank, value in values.items() if value != most]
                yield Signal(
                    None,
                    single(bad),
                    f"{few(bad)} train{'s' if len(bad) == 1 else ''} in eval mode, the others do not",
                    likely="model.train() is called under a rank test, or not after an evaluation",
                    do=f"call model.train() on {few(bad)}",
                    confirm="this line clears",
                    evidence={f"rank {rank}": value for rank, value in list(values.items())[:16]},
                    among=bad,
                )
                return


@dataclass(frozen=True)
class Uneven(Rule):
    """BATCH: a rank has `factor` times more, or fewer, samples than the others, `hold` measured steps in a row: DDP
    weighs ranks alike, hence the items of the small batch more. Of two ranks the smaller is named."""

    id: ClassVar[str] = "BATCH"
    requires: ClassVar[tuple[str, ...]] = ("data ranks", "samples")

    hold: int = 5
    factor: float = 2.0
    """A choice: the last batch of an epoch may be smaller, and is one step."""

    def check(self, view: View) -> Iterator[Signal]:
        if alike(view.ranks.samples):
            return
        samples = {rank: n for rank, n in view.of_data(_known(view, view.ranks.samples)).items() if n > 0}
        if len(set(samples.values())) < 2:
            return
        odd, apart = odd_one(samples)
        if len(samples) == 2:
            odd = min(samples, key=samples.__getitem__)
        rank = alone(odd, samples, self.factor)
        over = apart - math.log(self.factor) + 1e-9  # a ratio of exactly the factor counts
        if over >= 0:
            yield Signal(
                None,
                rank,
                f"batches differ in size between ranks: {_told(samples)} samples",
                likely=f"the shard of {'some ranks' if rank is None else few([rank])} is cut differently",
                do="give every rank as many items, or weigh the loss by samples / mean samples",
                confirm="this line clears",
                strength=math.exp(min(over, FAR)),
                evidence={f"rank {at}": n for at, n in list(samples.items())[:16]} | {"threshold": self.factor},
                among=list(samples),
            )


@dataclass(frozen=True)
class NotSynchronised(Rule):
    """SYNC: at an audit, gradients differ between ranks that hold the same weights, bit for bit: nobody averages them.
    It stands until the next audit. No threshold."""

    id: ClassVar[str] = "SYNC"
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("replicas",)
    preflight: ClassVar[bool] = True

    def check(self, view: View) -> Iterator[Signal]:
        audit = view.memory.audit
        bad = [of for of in audit if of.weights and not of.gradients]
        whole = len(bad) == len(audit) > 1
        for found in bad[:1] if whole else bad:
            stream = None if whole or found.stream == keys.SHARED else found.stream
            yield Signal(
                stream,
                None if whole else single(found.ranks),
                f"{'all gradients' if whole else f'the gradients of {found.stream}'} differ between ranks that hold "
                "the same weights",
                likely="nobody averages them: the model is called past its DistributedDataParallel wrapper, or "
                "no_sync() is left on",
                do="call the wrapped model, and leave no_sync() before the last backward() of a step",
                confirm="this line clears at the next audit",
                evidence={f"rank {rank}": 1.0 for rank in found.ranks[:16]},
            )


@dataclass(frozen=True)
class Diverged(Rule):
    """DESYNC: ranks that should hold the same weights do not: a sample of each stream's that all of them hold, compared
    bit for bit in every measured step, or all of them at an audit; what an audit alone could see stands until the next
    one. The majority is right; of two ranks the one whose weights have just jumped (`jump` times its usual step, and
    the other's not) is named, or none. No threshold otherwise."""

    id: ClassVar[str] = "DESYNC"
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("replicas",)
    preflight: ClassVar[bool] = True

    jump: float = 3.0
    """A choice: above what steps of one learning rate differ by; a rank whose updates are clipped does not jump up."""

    def check(self, view: View) -> Iterator[Signal]:
        prints = map(view.ranks.weights, range(len(view.now.streams)))
        if all(map(alike, prints)) and not view.now.replicas and not view.memory.unseen:
            return
        found = dict(self._found(view))
        whole = len(found) == len(view.now.streams) > 1
        everyone = sorted({rank for out in found.values() for rank in out})
        for stream, out in ({None: everyone} if whole else found).items():
            rank = single(out)
            if rank is None and len(out) == 2 and stream is not None:
                rank = self._jumped(view, stream, out)
            yield Signal(
                None if stream == keys.SHARED else stream,
                rank,
                f"{stream or 'all streams'}: {few(out)} {'holds' if len(out) == 1 else 'hold'} other weights",
                likely="something changes weights on one rank alone: a clip, a step, or memory"
                if len(out) != 2 or rank is not None
                else f"something changes weights on one rank alone; {BOTH}",
                do="broadcast the state of a good rank; look for what is done under a rank test between backward() and "
                "the next forward",
                confirm="this line clears and does not come back",
                evidence={f"rank {at}": 1.0 for at in out[:16]},
                among=out,
            )

    def _found(self, view: View) -> Iterator[tuple[str, list[int]]]:
        for number, stream in enumerate(view.now.streams):
            prints = view.ranks.weights(number) if view.setup.streams[stream].whole else ()
            out = outvoted(view.ranks.numbers, prints) if prints else []
            told = view.memory.audit if view.now.replicas or stream in view.memory.unseen else []
            audited = {rank for of in told if of.stream == stream and not of.weights for rank in of.ranks}
            if out or audited:
                yield stream, sorted(out or audited)

    def _jumped(self, view: View, stream: str, ranks: Sequence[int]) -> int | None:
        number = view.number(stream)
        peaks, usual = {}, {}
        for rank in ranks:
            moves = view.of_rank(rank, lambda facts: _moved(facts, number), WINDOW)
            peaks[rank] = max(moves[5:], default=0.0)
            usual[rank] = statistics.median(moves) if moves else 0.0
        jumped = [rank for rank, peak in peaks.items() if peak > self.jump * usual[rank]]
        return single(jumped)


def _moved(facts: RankFacts, number: int) -> float:
    return math.nan if facts.detail is None else facts.detail.moved[number]


def _told_by_all(rows: Sequence[array[float]]) -> list[array[float]]:
    """Of a figure of ranks that are heard together the steps in which all of them gave one."""
    return [row for row in rows if math.isfinite(sum(row))]


def _medians(rows: Sequence[array[float]]) -> list[float]:
    """The median of each column; of 128 columns of 20 rows in a third of the time that `statistics.median` takes."""
    table = torch.frombuffer(bytearray().join(rows), dtype=torch.float64).view(len(rows), -1).sort(dim=0).values
    return ((table[(len(rows) - 1) // 2] + table[len(rows) // 2]) / 2).tolist()


@dataclass(frozen=True)
class OtherLoss(Rule):
    """LOSS: in the median of `WINDOW` steps a rank's own loss is `factor` times that of the others, and `least` above,
    and in `always` of these steps it is above their median: its labels, or its items, are others. In small batches, or
    where a loss is a sum over many items, medians differ by chance, but not always the same way."""

    id: ClassVar[str] = "LOSS"
    kind: ClassVar[Kind] = Kind.windowed
    requires: ClassVar[tuple[str, ...]] = ("data ranks", "loss")

    WINDOW: ClassVar[int] = 20
    hold: int = 3
    every: int = 5
    clear: float = 0.8
    warm_up: int = 20
    factor: float = 1.5
    """A choice, and what pulseml calls an outlier among ranks; up to 4.3 was seen near zero loss, hence `least`."""
    least: float = 0.5
    """A choice, in nats. In other units, half of the loss at the start where that is less."""
    always: float = 0.9
    """Of two ranks whose items are drawn alike one is so often above the other in one of 2,500 windows (binomial)."""

    def check(self, view: View) -> Iterator[Signal]:
        for ranks, losses in view.together(self.every, self.WINDOW, _losses):
            told = _told_by_all(losses)
            if len(told) >= self.WINDOW // 2:
                yield from self._among(view, ranks, told)

    def _among(self, view: View, ranks: Sequence[int], told: Sequence[array[float]]) -> Iterator[Signal]:
        """Of ranks that are heard together, their losses in several steps."""
        losses = view.of_data(dict(zip(ranks, _medians(told), strict=True)))
        if len(losses) < 2:
            return
        worst = max(losses, key=losses.__getitem__)
        usual = statistics.median(sorted(losses.values())[:-1])
        start = abs(statistics.fmean(view.memory.losses)) if view.memory.losses else math.inf
        least = min(self.least, start / 2)
        over = (losses[worst] - usual) / least if least > 0 else 0.0
        ratio = losses[worst] / usual / self.factor if usual > 0 else math.inf
        if min(over, ratio) < QUIET:
            return
        own = view.of_data(dict(zip(ranks, zip(*told, strict=True), strict=True)))
        rank = alone(worst, losses, self.factor)
        seen = f"the loss of rank {worst} is {losses[worst]:.3g}, that of the others {usual:.3g}"
        yield Signal(
            None,
            rank,
            seen if rank is not None else f"losses differ between ranks: {_told(rounded(losses))}",
            likely=f"the labels, or the items, of {'some shards' if rank is None else f'the shard of rank {rank}'} are "
            "others",
            do=f"compare items and labels of rank {worst} with those of another rank",
            confirm="the losses agree",
            strength=min(over, ratio, _above(own, worst) / self.always),
            evidence={f"rank {rank}": loss for rank, loss in list(losses.items())[:16]} | {"threshold": self.factor},
            among=list(losses),
        )


def _losses(step: StepStats) -> array[float]:
    return step.rank_facts.loss or array("d", [math.nan] * len(step.rank_facts))


class _Pace(NamedTuple):
    """Seconds that ranks are busy in a step, those of the whole step, and the ranks that are `behind` the others; None
    where one does not know."""

    busy: array[float]
    whole: array[float]
    behind: list[int] | None


def _pace(step: StepStats, seconds: float) -> _Pace:
    """`seconds`: by which a rank is busy longer than the median of the others to be behind."""
    facts = step.rank_facts
    busy, behind = facts.busy_seconds, None
    if len(busy) > 1 and math.isfinite(sum(busy)):
        *others, last = sorted(busy)
        least = statistics.median(others) + seconds  # of the others, whichever rank above it is left out
        behind = [] if last < least else [rank for rank, own in zip(facts.numbers, busy, strict=True) if own >= least]
    return _Pace(busy, facts.step_seconds, behind)


def _above(of_ranks: Mapping[int, Sequence[float]], rank: int) -> float:
    """The share of the steps in which this rank's figure is above the median of the others'."""
    others = zip(*(values for at, values in of_ranks.items() if at != rank), strict=True)
    return statistics.fmean(own > statistics.median(row) for own, row in zip(of_ranks[rank], others, strict=True))


@dataclass(frozen=True)
class Slow(Rule):
    """SLOW: in nine of ten of `WINDOW` steps a rank is busy (data, forward, optimizer, before it could wait for others)
    for longer than the median of the others in the same step, by `share` of a step and by `least`, and for `factor`
    times as long in the median. What else a shared machine does hits ranks in turn, and not in nine of ten steps."""

    id: ClassVar[str] = "SLOW"
    kind: ClassVar[Kind] = Kind.windowed
    requires: ClassVar[tuple[str, ...]] = ("data ranks",)
    explains: ClassVar[bool] = False

    WINDOW: ClassVar[int] = 40
    LEAST: ClassVar[int] = 10
    """Steps do for ranks that are heard in turns, which take long to fill the window."""
    hold: int = 3
    every: int = 5
    warm_up: int = 44
    factor: float = 1.5
    """A choice: twice what the busy times of equal ranks on one shared machine differ by."""
    least: float = 0.005
    """Seconds: a choice, several times the jitter of a shared machine."""
    share: float = 0.1
    """Of a step: a choice, less is not worth a word."""

    def check(self, view: View) -> Iterator[Signal]:
        for ranks, steps in view.together(self.every, self.WINDOW, _pace, QUIET * self.least):
            if self._one_lags([step.behind for step in steps]):
                rows = (_told_by_all([step.busy for step in steps]), [step.whole for step in steps])
                yield from self._among(*(dict(zip(ranks, zip(*of, strict=True), strict=True)) for of in rows))

    def _one_lags(self, behind: Sequence[Sequence[int] | None]) -> bool:
        """Whether a rank is behind the others in nearly all of the steps that tell."""
        told = [ranks for ranks in behind if ranks is not None]
        steps = max(Counter(itertools.chain(*told)).values(), default=0)
        return len(told) >= self.LEAST and steps >= len(told) - len(told) // 10

    def _among(self, rows: Mapping[int, Sequence[float]], seconds: Mapping[int, Sequence[float]]) -> Iterator[Signal]:
        """Of ranks that are heard together; `rows`: their busy times, `seconds`: those of whole steps."""
        busy = {rank: statistics.median(row) for rank, row in rows.items()}
        slowest = max(busy, key=busy.__getitem__)
        others = zip(*(row for rank, row in rows.items() if rank != slowest), strict=True)
        over = sorted(own - statistics.median(row) for own, row in zip(rows[slowest], others, strict=True))
        usual = statistics.median(seconds for rank, seconds in busy.items() if rank != slowest)
        nearly_always = over[len(over) // 10]
        ratio = busy[slowest] / usual / self.factor if usual > 0 else math.inf
        if nearly_always < QUIET * self.least:
            return
        length = statistics.median(list(filter(math.isfinite, seconds[slowest])) or [0.0])
        yield Signal(
            None,
            slowest,
            f"rank {slowest} is busy for {1e3 * busy[slowest]:.3g} ms of a step, the others for {1e3 * usual:.3g} ms",
            likely="its data loading, its machine, or more work than the others have",
            do=f"look at the loader's workers and the host of rank {slowest}",
            confirm="busy times agree",
            strength=min(ratio, nearly_always / max(self.least, self.share * length)),
            evidence={f"rank {rank}": seconds for rank, seconds in list(busy.items())[:16]},
        )
