"""Rules about ranks, as the engine evaluates them: settings, modes and batches that differ, replicas that are not
equal, and a rank that stands apart by its loss, its own gradient, or its pace."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.ranks import RankFacts, outvoted
from ddp_streammon.rules.engine import QUIET, Kind, Rule, Signal
from ddp_streammon.rules.finding import Action
from ddp_streammon.rules.of_inputs import odd_one
from ddp_streammon.rules.of_training import few, single
from ddp_streammon.rules.own_gradients import FACTOR, outlier
from ddp_streammon.rules.own_gradients import factor as times
from ddp_streammon.rules.view import WINDOW, View

BOTH = "with two ranks no vote says which is wrong"


def _known(view: View, figure: Callable[[RankFacts], float]) -> dict[int, float]:
    said = {rank.rank: figure(rank) for rank in view.now.rank_facts}
    return {rank: value for rank, value in said.items() if not math.isnan(value)}


def _told(values: Mapping[int, float]) -> str:
    by_value: dict[float, list[int]] = {}
    for rank, value in values.items():
        by_value.setdefault(value, []).append(rank)
    return ", ".join(f"{value:g} on {few(ranks)}" for value, ranks in by_value.items())


def _set_to(view: View, number: int, setting: str) -> dict[int, float]:
    """What each rank has a setting of a stream set to: of a learning rate its base, where all ranks' are known."""
    if setting == keys.WEIGHT_DECAY:
        return {facts.rank: facts.weight_decay[number] for facts in view.now.rank_facts}
    if len(view.details) < len(view.now.rank_facts):
        return {facts.rank: facts.lr[number] for facts in view.now.rank_facts}
    return {rank: detail.base_lr[number] for rank, detail in view.details.items()}


@dataclass(frozen=True)
class OtherSettings(Rule):
    """LR: the learning rate or weight decay of a stream differs between ranks. The majority is right; of two ranks the
    one whose other streams have the same factor to what is declared (or the same rate). No threshold."""

    id: ClassVar[str] = "LR"
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("data ranks", "optimizer")
    preflight: ClassVar[bool] = True

    def check(self, view: View) -> Iterator[Signal]:
        first, *others = view.now.rank_facts
        if all(rank.lr == first.lr and rank.weight_decay == first.weight_decay for rank in others):
            return
        for number, stream in enumerate(view.now.streams):
            for setting, word, of in (
                (keys.LEARNING_RATE, "learning rate", lambda facts: facts.lr),
                (keys.WEIGHT_DECAY, "weight decay", lambda facts: facts.weight_decay),
            ):
                values = _known(view, lambda facts, of=of, n=number: of(facts)[n])  # type: ignore[misc]
                out = outvoted(list(values), list(values.values()))
                if not out:
                    continue
                rank = single(out)
                if rank is None and len(values) == 2:
                    rank = self._undeclared(view, number, setting)
                if rank is None and len(values) == 2 and setting == keys.LEARNING_RATE:
                    rank = self._odd(view, number, values)
                yield Signal(
                    None if stream == keys.SHARED else stream,
                    rank,
                    f"the {word} of {stream} differs between ranks: {_told(values)}",
                    likely="a configuration of one rank's own" if rank is not None else f"{BOTH}",
                    do=f"build optimizer and schedule from one configuration on every rank ({setting} of {stream})",
                    confirm="this line clears; load one state on every rank",
                    evidence={f"rank {at}": value for at, value in list(values.items())[:16]},
                    action=None if rank is None else self._action(view, number, setting, rank),
                )

    def _action(self, view: View, number: int, setting: str, wrong: int) -> Action | None:
        """To give a rank what another has; None where only their schedules differ."""
        set_to = _set_to(view, number, setting)
        right, old = next(value for rank, value in set_to.items() if rank != wrong), set_to[wrong]
        return Action(setting, list(view.now.streams)[number], right, old) if right != old else None

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
        for facts in view.now.rank_facts:
            rates = [
                rate / view.intent.lr.get(name, 1.0) for name, rate in zip(names, facts.lr, strict=True) if rate > 0
            ]
            own = facts.lr[number] / view.intent.lr.get(names[number], 1.0)
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
        modes = _known(view, lambda facts: facts.training)
        inside = _known(view, lambda facts: math.nan if facts.detail is None else -facts.detail.in_eval)
        for values in (modes, inside):
            most = max(values.values(), default=math.nan)
            bad = [rank for rank, value in values.items() if value < most]
            if bad:
                yield Signal(
                    None,
                    single(bad),
                    f"{few(bad)} train{'s' if len(bad) == 1 else ''} in eval mode, the others do not",
                    likely="model.train() is called under a rank test, or not after an evaluation",
                    do=f"call model.train() on {few(bad)}",
                    confirm="this line clears",
                    evidence={f"rank {rank}": abs(value) for rank, value in list(values.items())[:16]},
                )
                return


@dataclass(frozen=True)
class Uneven(Rule):
    """BATCH: a rank has `factor` times more, or fewer, samples than the others, `hold` measured steps in a row: DDP
    weighs ranks alike, hence the items of the small batch more. Of two ranks the smaller is named."""

    id: ClassVar[str] = "BATCH"
    requires: ClassVar[tuple[str, ...]] = ("data ranks", "no model peers", "samples")

    hold: int = 5
    factor: float = 2.0
    """A choice: the last batch of an epoch may be smaller, and is one step."""

    def check(self, view: View) -> Iterator[Signal]:
        samples = {rank: n for rank, n in _known(view, lambda facts: facts.samples).items() if n > 0}
        if len(set(samples.values())) < 2:
            return
        rank, apart = odd_one(samples)
        if len(samples) == 2:
            rank = min(samples, key=samples.__getitem__)
        if apart >= math.log(self.factor):
            yield Signal(
                None,
                rank,
                f"batches differ in size between ranks: {_told(samples)} samples",
                likely=f"the shard of rank {rank} is cut differently",
                do="give every rank as many items, or weigh the loss by samples / mean samples",
                confirm="this line clears",
                strength=math.exp(apart) / self.factor,
                evidence={f"rank {at}": n for at, n in list(samples.items())[:16]} | {"threshold": self.factor},
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
        audit = next((step for step in reversed(view.steps) if step.replicas), None)
        bad = [of for of in audit.replicas if of.weights and not of.gradients] if audit is not None else []
        whole = bool(bad) and audit is not None and len(bad) == len(audit.replicas) > 1
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
    """DESYNC: ranks that should hold the same weights do not: a sample of each stream's, compared bit for bit in every
    measured step, or all of them at an audit. The majority is right; of two ranks the one whose weights have just
    jumped (`jump` times its usual step, and the other's not) is named, or none. No threshold otherwise."""

    id: ClassVar[str] = "DESYNC"
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("replicas",)
    preflight: ClassVar[bool] = True

    jump: float = 3.0
    """A choice: above what steps of one learning rate differ by; a rank whose updates are clipped does not jump up."""

    def check(self, view: View) -> Iterator[Signal]:
        prints = {detail.weights for detail in view.details.values()}
        if len(prints) < 2 and not view.now.replicas:
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
            )

    def _found(self, view: View) -> Iterator[tuple[str, list[int]]]:
        for number, stream in enumerate(view.now.streams):
            prints = {rank: detail.weights[number] for rank, detail in view.details.items()}
            out = outvoted(list(prints), list(prints.values()))
            audited = {r for of in view.now.replicas if of.stream == stream and not of.weights for r in of.ranks}
            if out or audited:
                yield stream, sorted(out or audited)

    def _jumped(self, view: View, stream: str, ranks: Sequence[int]) -> int | None:
        number = view.number(stream)
        peaks = {}
        for rank in ranks:
            moves = view.of_rank(rank, lambda facts: _moved(facts, number), WINDOW)
            peaks[rank] = max(moves[5:], default=0.0) / statistics.median(moves) if moves and max(moves) > 0 else 0.0
        jumped = [rank for rank, peak in peaks.items() if peak > self.jump]
        return single(jumped)


def _moved(facts: RankFacts, number: int) -> float:
    return math.nan if facts.detail is None else facts.detail.moved[number]


@dataclass(frozen=True)
class OtherLoss(Rule):
    """LOSS: in the median of `WINDOW` steps a rank's own loss is `factor` times that of the others, and `least` above,
    and in `always` of these steps it is above their median: its labels, or its items, are others. In small batches, or
    where a loss is a sum over many items, medians differ by chance, but not always the same way."""

    id: ClassVar[str] = "LOSS"
    kind: ClassVar[Kind] = Kind.windowed
    requires: ClassVar[tuple[str, ...]] = ("data ranks", "no model peers", "loss")

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
        said = view.of_ranks(lambda facts: math.nan if facts.detail is None else facts.detail.loss, self.WINDOW)
        own = {rank: said.get(rank, []) for rank in view.ranks()}
        losses = {rank: statistics.median(of) for rank, of in own.items() if len(of) >= self.WINDOW // 2}
        if len(losses) < 2:
            return
        worst = max(losses, key=losses.__getitem__)
        usual = statistics.median(loss for rank, loss in losses.items() if rank != worst)
        start = abs(statistics.fmean(view.memory.losses)) if view.memory.losses else math.inf
        least = min(self.least, start / 2)
        over = (losses[worst] - usual) / least if least > 0 else 0.0
        ratio = losses[worst] / usual / self.factor if usual > 0 else math.inf
        if min(over, ratio) < QUIET:
            return
        above = _above(view, worst, self.WINDOW)
        yield Signal(
            None,
            worst,
            f"the loss of rank {worst} is {losses[worst]:.3g}, that of the others {usual:.3g}",
            likely=f"the labels, or the items, of rank {worst}'s shard are others",
            do=f"compare items and labels of rank {worst} with those of another rank",
            confirm="the losses agree",
            strength=min(over, ratio, above / self.always),
            evidence={f"rank {rank}": loss for rank, loss in list(losses.items())[:16]} | {"threshold": self.factor},
        )


def _above(view: View, rank: int, count: int) -> float:
    """Of the last measured steps in which this rank was heard with others: the share in which its loss is above the
    median of theirs."""
    outcomes = []
    for step in view.steps[-count:]:
        own = {facts.rank: facts.detail.loss for facts in step.rank_facts if facts.detail is not None}
        others = [loss for at, loss in own.items() if at != rank and math.isfinite(loss)]
        if others and math.isfinite(own.get(rank, math.nan)):
            outcomes.append(own[rank] > statistics.median(others))
    return statistics.fmean(outcomes) if outcomes else 0.0


@dataclass(frozen=True)
class Outlier(Rule):
    """OUTLIER: a rank whose own gradient of a stream is the largest, or the smallest, in nearly all of `WINDOW` steps,
    and far from the others' (rules.own_gradients, where the numbers come from). With two ranks none is named."""

    id: ClassVar[str] = "OUTLIER"
    kind: ClassVar[Kind] = Kind.windowed
    requires: ClassVar[tuple[str, ...]] = ("local gradients", "data ranks", "no model peers")

    WINDOW: ClassVar[int] = 40
    hold: int = 2
    every: int = 10
    warm_up: int = 39
    factor: float = FACTOR
    """See `rules.own_gradients.FACTOR`: above what equal data give on healthy ranks."""

    def check(self, view: View) -> Iterator[Signal]:
        ranks = [of.rank for of in view.now.local]
        steps = [step.local for step in view.steps if [of.rank for of in step.local] == ranks][-self.WINDOW :]
        if len(steps) < self.WINDOW or len(ranks) < 2:
            return
        for number, stream in enumerate(view.now.streams):
            rows = [[of.norms[number] for of in step] for step in steps]
            rows = [row for row in rows if all(math.isfinite(norm) and norm > 0 for norm in row)]
            place = outlier(rows) if rows else None
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
        rows: dict[int, dict[int, float]] = {}
        lengths = []
        for step in view.steps[-self.WINDOW :]:
            for facts in step.rank_facts:
                if not math.isnan(facts.busy_seconds):
                    rows.setdefault(facts.rank, {})[step.step] = facts.busy_seconds
                    lengths.append(facts.step_seconds)
        common = sorted(set.intersection(*map(set, rows.values()))) if len(rows) > 1 else []
        if len(common) < self.WINDOW // 2:
            return
        busy = {rank: statistics.median(row.values()) for rank, row in rows.items()}
        slowest = max(busy, key=busy.__getitem__)
        others = [row for rank, row in rows.items() if rank != slowest]
        over = sorted(rows[slowest][at] - statistics.median(row[at] for row in others) for at in common)
        usual = statistics.median(seconds for rank, seconds in busy.items() if rank != slowest)
        length = statistics.median(lengths)
        nearly_always = over[len(over) // 10]
        ratio = busy[slowest] / usual / self.factor if usual > 0 else math.inf
        if nearly_always < QUIET * self.least:
            return
        yield Signal(
            None,
            slowest,
            f"rank {slowest} is busy for {1e3 * busy[slowest]:.3g} ms of a step, the others for {1e3 * usual:.3g} ms",
            likely="its data loading, its machine, or more work than the others have",
            do=f"look at the loader's workers and the host of rank {slowest}",
            confirm="busy times agree",
            strength=min(ratio, nearly_always / self.least, nearly_always / (self.share * length)),
            evidence={f"rank {rank}": seconds for rank, seconds in list(busy.items())[:16]},
        )


RULES: tuple[Rule, ...] = (
    OtherSettings(),
    OtherMode(),
    Uneven(),
    NotSynchronised(),
    Diverged(),
    OtherLoss(),
    Outlier(),
    Slow(),
)
