"""Rules about statistics over windows of steps: learning rates, updates, gradients, weights and the loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.rules.engine import QUIET, Kind, Rule, Signal
from ddp_streammon.rules.finding import Action
from ddp_streammon.rules.of_training import moved_share, together
from ddp_streammon.rules.view import JUMP, View
from ddp_streammon.stats import StepStats

UNTESTED = "untested on your data"


def _update(step: StepStats, stream: str) -> float:
    sample = step.streams[stream].sample
    return math.nan if sample is None else sample.update


def _weight(step: StepStats, stream: str) -> float:
    sample = step.streams[stream].sample
    return math.nan if sample is None else sample.weight


def _ends(step: StepStats, stream: str) -> float:
    """Gradient of the first layer over that of the last; nan where one of them is zero, as with an empty input."""
    sample = step.streams[stream].sample
    return sample.first / sample.last if sample is not None and sample.last > 0 and sample.first > 0 else math.nan


def update(view: View, stream: str, count: int = 40, least: int = 20) -> float:
    """The median update-to-weight ratio of a stream's last measured steps, since its learning rate was last zero; nan
    with fewer than `least`."""
    before = view.series(_rests, count + 1, stream, view.number(stream))[-2::-1]
    awake = before.index(1.0) if 1.0 in before else len(before)
    return view.median(_update, awake, least, stream) if awake else math.nan


def _rests(step: StepStats, stream: str, number: int) -> float:
    """1 where a rank's learning rate of the stream is zero in a step."""
    return float(any(rank.lr[number] == 0 for rank in step.rank_facts))


def missed(view: View, stream: str, count: int) -> bool:
    """Whether the stream had no gradient, a learning rate of zero, or an empty input on a rank, in one of the last
    measured steps."""
    number = view.number(stream)
    return any(
        not step.streams[stream].grad_norm > 0
        or any(rank.lr[number] == 0 for rank in step.rank_facts)
        or any(rank.detail is not None and rank.detail.inputs[number].abs_max == 0 for rank in step.rank_facts)
        for step in view.steps[-count:]
    )


@dataclass(frozen=True)
class _Windowed(Rule):
    """What windowed rules have in common."""

    kind: ClassVar[Kind] = Kind.windowed
    hold: int = 3
    """Evaluations in a row: a choice, with which no healthy run of the zoo was alarmed (`python -m tests.zoo run`)."""
    clear: float = 0.8
    warm_up: int = 40
    """Measured steps: as many as the windows are long."""
    every: int = 5


@dataclass(frozen=True)
class RateJump(Rule):
    """LRJ: a learning rate is multiplied by `jump` or more from one step to the next, above `peak` times anything that
    it has been or is based on. Warm-up and restarts go to a rate that was declared or has been reached before."""

    id: ClassVar[str] = "LRJ"
    destabilises: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("optimizer",)

    warm_up: int = 10
    jump: float = JUMP
    """A choice: half of the tenfold that trainpulse calls a jump; `peak` makes it safe."""
    peak: float = 3.0
    """A choice: schedules return to their peak; none is known to go beyond it by so much in one step."""
    stands: int = 20
    """Measured steps for which it is told: a choice."""

    def check(self, view: View) -> Iterator[Signal]:
        if view.memory.jumps:
            yield from together(view, self._of_streams(view), lambda: self._all(view))

    def _of_streams(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            jumped = self._jumped(view, stream)
            if jumped is not None:
                yield self._signal(view, stream, stream, *jumped)

    def _jumped(self, view: View, stream: str) -> tuple[float, float] | None:
        count, before, now, peak = view.memory.jumps.get(stream, (0, 0.0, 0.0, 0.0))
        reached = max([view.intent.lr.get(stream, 0.0), peak, *view.setup.streams[stream].rates])
        late = count > self.warm_up and view.memory.count - count < self.stands
        return (before, now) if late and now >= self.jump * before and now > self.peak * reached else None

    def _all(self, view: View) -> Signal:
        jumped = self._jumped(view, view.streams[0])
        before, now = jumped or (math.nan, math.nan)
        return self._signal(view, None, view.streams[0], before, now)

    def _signal(self, view: View, stream: str | None, of: str, before: float, now: float) -> Signal:
        return Signal(
            stream,
            seen=f"the learning rate of {stream or 'all streams'} jumped from {before:.3g} to {now:.3g}",
            likely="a schedule that multiplies where it should set, or one that is stepped by the wrong count",
            do=f"set the learning rate back to {before:.3g}, and go on from the last checkpoint before the jump",
            confirm="this line clears, and the loss falls",
            evidence={"before": before, keys.LEARNING_RATE: now},
        )


@dataclass(frozen=True)
class RateGone(Rule):
    """LRS: the learning rate has fallen to `low` of its peak, or below, before `late` of the declared training, for
    `share` of it. Two step decays of a tenth each, and the ends of cosine cycles, stay above or are over sooner."""

    id: ClassVar[str] = "LRS"
    requires: ClassVar[tuple[str, ...]] = ("optimizer", "length")

    low: float = 1e-3
    """Three decays of a tenth: a choice. gradsnitch (GS010) has 1e-2, which the usual two decays reach."""
    late: float = 0.8
    """Of the declared training: gradsnitch, GS010."""
    share: float = 0.06
    """Arithmetic: a cosine is below 1 % of its peak for the last 6.4 % of its length, below 0.1 % for 2 %."""
    hold: int = 10
    """A choice."""

    def check(self, view: View) -> Iterator[Signal]:
        total = view.intent.total_steps
        if total is None or view.now.step > self.late * total:
            return
        yield from together(view, self._of_streams(view, total), lambda: self._signal(view, None, total))

    def _of_streams(self, view: View, total: int) -> Iterator[Signal]:
        for stream in view.streams:
            peak = view.memory.peak_lr.get(stream, 0.0)
            if not peak > 0 or view.meant_frozen(stream):
                continue
            number, low = view.number(stream), 0
            for step in reversed(view.steps):
                rates = [rank.lr[number] for rank in step.rank_facts]
                if not rates or max(rates) > self.low * peak:
                    break
                low += 1
            spent = 0 if not low else view.now.step - view.steps[-low].step + 1
            wanted = min(self.share * total, view.now.step - view.steps[0].step + 1)
            if low and spent >= wanted:
                yield self._signal(view, stream, total)

    def _signal(self, view: View, stream: str | None, total: int) -> Signal:
        of = stream or view.streams[0]
        peak, now = view.memory.peak_lr.get(of, math.nan), view.lr(of)
        return Signal(
            stream,
            seen=f"the learning rate of {stream or 'all streams'} is {now:.3g} at step {view.now.step} of {total}, its "
            f"peak was {peak:.3g}",
            likely="the schedule's length is not that of the training",
            do=f"give the schedule the number of optimizer steps, {total}",
            confirm="this line clears",
            evidence={keys.LEARNING_RATE: now, "peak": peak, "steps": float(total)},
        )


@dataclass(frozen=True)
class Vanishing(_Windowed):
    """VAN: within a stream the gradient of the first layer is below `ratio` of that of the last, root mean squares, in
    the median of 40 steps. Layers of a homogeneous network have gradients of one size at usual initialisations, however
    deep it is; saturating activations and wrong scales lose a factor in every layer. Streams with layers that begin at
    zero (LoRA, zero-initialised branches) are left out: what is before these has no gradient at first."""

    id: ClassVar[str] = "VAN"
    requires: ClassVar[tuple[str, ...]] = ("samples of weights",)

    warm_up: int = 20
    ratio: float = 0.03
    """A choice between AutoTrainer's beta1, 1e-3 (Zhang et al., ICSE 2021), and healthy runs of the zoo, above 0.8
    (`python -m tests.zoo run`)."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            if not view.trained(stream) or view.setup.streams[stream].zeros:
                continue
            ratio = view.median(_ends, 40, 20, stream)
            if not ratio * QUIET < self.ratio:
                continue
            yield Signal(
                stream,
                seen=f"{stream}: the gradient of its first layer is {ratio:.1e} of that of its last",
                likely="saturating activations, or weights of too small a scale, in a deep stream",
                do=f"normalise or add residual connections in {stream}, or other activations ({UNTESTED})",
                confirm=f"the ratio is above {self.ratio:g}",
                strength=self.ratio / ratio if ratio > 0 else math.inf,
                evidence={"ratio": ratio, "threshold": self.ratio},
            )


@dataclass(frozen=True)
class RateLow(_Windowed):
    """LRL: a stream's weights hardly move though it has gradients: its update-to-weight ratio is below `least`, or
    below `slow` where the loss is still where it began, in the median of 40 steps, at a rate that is not decayed (at
    least half of its peak, which the end of a schedule is not). What weight decay alone changes teaches nothing: where
    the loss is flat, it does not count."""

    id: ClassVar[str] = "LRL"
    requires: ClassVar[tuple[str, ...]] = ("optimizer", "samples of weights", "consecutive steps")

    least: float = 1e-6
    """A choice: a training of a million such steps moves weights by their own size at most."""
    slow: float = 3e-5
    """A choice: thousands of such steps leave weights where they are; healthy runs of the zoo whose loss stays are
    above 1e-4."""

    def check(self, view: View) -> Iterator[Signal]:
        yield from together(view, self._of_streams(view), lambda: self._whole(view))

    def _of_streams(self, view: View) -> Iterator[Signal]:
        flat = self._flat(view)
        for stream in view.streams:
            q, rate = self._learned(view, stream, flat), view.lr(stream)
            alive = view.now.streams[stream].grad_norm > 0
            decayed = rate < 0.5 * view.memory.peak_lr.get(stream, 0.0)
            slow = q * QUIET < (self.slow if flat else self.least)
            if not slow or not alive or decayed or not rate > 0 or not view.trained(stream):
                continue
            yield self._signal(view, stream, stream, flat)

    def _whole(self, view: View) -> Signal:
        flat = self._flat(view)
        slowest = min(view.streams, key=lambda stream: self._learned(view, stream, flat))
        return self._signal(view, None, slowest, flat)

    def _flat(self, view: View) -> bool:
        """Whether the loss is still where it began."""
        if not view.memory.losses or not (recent := view.losses(20)):
            return False
        start = statistics.fmean(view.memory.losses)
        return statistics.fmean(recent) > start - 0.05 * abs(start)

    def _learned(self, view: View, stream: str, flat: bool) -> float:
        """What a step changes of the weights; where the loss is flat, without what weight decay does."""
        q = update(view, stream)
        return q * _by_gradient(view, stream) if flat else q

    def _signal(self, view: View, stream: str | None, of: str, flat: bool) -> Signal:
        q, rate, limit = self._learned(view, of, flat), view.lr(of), self.slow if flat else self.least
        usual = 1e-3
        factor = min(usual / q, 1e4) if q > 0 else math.nan
        change = _scaled(view, stream, factor)
        clip = view.intent.clip_norm
        clipped = clip is not None and _total(view) > 10 * clip
        outweighed = flat and _by_gradient(view, of) < 0.5
        seen = f"{stream or 'all streams'}: a step changes {q:.1e} of the weights, at learning rate {rate:g}"
        likely = "the learning rate is off by powers of ten"
        do = f"{_told(change, factor)} ({UNTESTED}), or declare the stream frozen"
        if clip is not None and clipped:
            wider = float(f"{2 * _total(view):.2g}")
            likely, do = "clipping leaves nothing of the gradient", f"raise clip_norm to {wider:g}"
            change = Action("clip_norm", keys.FULL, wider, clip)
        elif outweighed:
            seen += ", and weight decay changes more"
            likely = "the loss, and with it every gradient, is smaller than meant: divided once too often"
            do = "look for what divides the loss"
            change = None
        return Signal(
            stream,
            seen=seen,
            likely=likely,
            do=do,
            confirm=f"updates near {usual:g} of the weights, and a falling loss",
            strength=limit / q if q > 0 else math.inf,
            evidence={"update_ratio": q, keys.LEARNING_RATE: rate, "threshold": limit},
            action=change,
        )


def _scaled(view: View, stream: str | None, factor: float) -> Action | None:
    """The learning rate times `factor`, to one digit, as a change of what its schedule starts from; None where that is
    not known, or of all streams where they differ in it."""
    bases = {view.base_lr(name) for name in ([stream] if stream else view.now.streams)}
    old = bases.pop()
    value = old * factor
    if bases or not 0 < value < math.inf:
        return None
    return Action(keys.LEARNING_RATE, stream or keys.FULL, float(f"{value:.1g}"), old)


def _told(change: Action | None, factor: float) -> str:
    return f"learning rate x {factor:.1g}" if change is None else f"learning rate {change.old:g} -> {change.value:g}"


def _by_gradient(view: View, stream: str) -> float:
    """The share of a stream's update that is not its weight decay, median of 40 steps: g / (g + decay x w) where the
    optimizer adds decay to the gradient, whatever its momentum; 1 for adaptive optimizers, and where it is unknown."""
    share = math.nan if view.setup.adaptive else view.median(_share, 40, 2, stream, view.number(stream))
    return 1.0 if math.isnan(share) else share


def _share(step: StepStats, stream: str, number: int) -> float:
    of = step.streams[stream]
    if not step.rank_facts or not of.update_ratio > 0 or not of.grad_norm > 0:
        return math.nan
    decay = max(step.rank_facts[0].weight_decay[number], 0.0)
    return of.grad_norm / (of.grad_norm + decay * of.update_norm / of.update_ratio)


def _total(view: View) -> float:
    """The median norm of the whole gradient."""
    return view.median(_whole, 20, 1, tuple(view.now.streams))


def _whole(step: StepStats, streams: Sequence[str]) -> float:
    return math.hypot(*[step.streams[stream].grad_norm for stream in streams if step.streams[stream].elements])


@dataclass(frozen=True)
class RateHigh(_Windowed):
    """LRH: a step changes a stream's weights by more than `most` of their norm, in the median of 20 steps."""

    id: ClassVar[str] = "LRH"
    destabilises: ClassVar[bool] = True
    severity: ClassVar[Severity] = Severity.warning
    requires: ClassVar[tuple[str, ...]] = ("optimizer", "samples of weights", "consecutive steps")

    warm_up: int = 5
    every: int = 2
    most: float = 0.1
    """torchmortem's upper bound of the update-to-weight ratio; healthy runs of the zoo stay below 0.033."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            q, rate = update(view, stream, 20, 5), view.lr(stream)
            if not q > QUIET * self.most or not view.trained(stream) or not rate > 0:
                continue
            change = _scaled(view, stream, 0.01 / q)
            yield Signal(
                stream,
                seen=f"{stream}: a step changes its weights by {q:.0%} of their norm, at learning rate {rate:g}",
                likely="the learning rate is too high",
                do=f"{_told(change, 0.01 / q)} ({UNTESTED})",
                confirm="updates below 3 % of the weights, and a falling loss",
                strength=q / self.most,
                evidence={"update_ratio": q, keys.LEARNING_RATE: rate, "threshold": self.most},
                action=change,
            )


@dataclass(frozen=True)
class UpdatesApart(_Windowed):
    """UPD: a stream's weights move, relative to their norm, `apart` times less than another's. A tower that was trained
    before is given a hundredth of the rate on purpose, hence: by `apart` where its own rate is a tenth or less, by
    `alike` where the rates are similar, and there is another reason."""

    id: ClassVar[str] = "UPD"
    requires: ClassVar[tuple[str, ...]] = ("optimizer", "two streams", "samples of weights", "consecutive steps")

    apart: float = 1e-3
    """A choice: a tenth of the rates that are given to trained towers on purpose."""
    alike: float = 0.03
    """A choice below 0.05, with which none of 56 healthy runs was alarmed (the zoo's controls with two seeds:
    `python -m tests.zoo run`)."""

    def check(self, view: View) -> Iterator[Signal]:
        moving = {s: update(view, s) for s in view.streams if view.trained(s) and view.lr(s) > 0}
        moving = {stream: q for stream, q in moving.items() if q > 0}
        if len(moving) < 2:
            return
        fast = max(moving, key=moving.__getitem__)
        for stream, q in moving.items():
            if stream == fast:
                continue
            by_rate = view.lr(stream) <= 0.1 * view.lr(fast)
            limit = self.apart if by_rate else self.alike
            if limit * moving[fast] < QUIET * q:
                continue
            yield Signal(
                stream,
                seen=f"{stream} moves by {q:.1e} of its weights a step, {fast} by {moving[fast]:.1e}",
                likely=f"its learning rate, {view.lr(stream):g}, is far below {fast}'s, {view.lr(fast):g}"
                if by_rate
                else "little gradient reaches it: saturation, an uninformative input, or a small weight in the fusion",
                do="say which is meant: give both streams rates of one order, or declare the slow one frozen "
                f"({UNTESTED}: balance alone does not improve accuracy)"
                if by_rate
                else f"look at {stream}'s input, its activations and its weight in the fusion",
                confirm="its validation figures move",
                strength=limit * moving[fast] / q,
                evidence={stream: q, fast: moving[fast], "rate": 1.0 if by_rate else 0.0, "threshold": limit},
            )


@dataclass(frozen=True)
class Imbalance(_Windowed):
    """IMB: the gradient of a stream's last layer (root mean square) and its whole gradient (norm) are both `factor`
    times another's, in the median of 40 steps. Where they were not in the first steps, the stream that has lost its
    gradient is named, else the one that always had more. It is a pointer, and gives way to any other finding: the ratio
    is no property of the function (features scaled up and the head down change it: tests/test_invariance.py), and with
    depth, width and normalisation it changes, too. Streams that miss steps have smaller gradients for that reason, and
    those that thaw one after the other are not equally far: both are left out. So is the time in which the loss is
    below `fitted` of where it began: few items make up the gradients then, and who has learned all has the least."""

    id: ClassVar[str] = "IMB"
    pointer: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("two streams", "samples of weights")

    factor: float = 4.5
    """A choice: healthy medians of 40 steps are below 3.3 in the zoo (`python -m tests.zoo run`), 2.9 of both."""
    fitted: float = 0.05
    """A choice. Streams with losses of their own beside the common one, which made models better, had ratios up to 2.4
    before and up to 9 afterwards (`python -m tests.benchmarks.better`, splits from 100 on)."""

    def check(self, view: View) -> Iterator[Signal]:
        if _fitted(view, self.fitted):
            return
        sizes = {}
        for stream in view.streams:
            if not view.trained(stream):
                continue
            whole = view.median(_norm, 40, 20, stream)
            last = view.median(_last, 40, 20, stream)
            if whole > 0 and last > 0:
                sizes[stream] = (whole, last)
        if len(sizes) < 2:
            return
        high = max(sizes, key=lambda stream: sizes[stream][0])
        low = min(sizes, key=lambda stream: sizes[stream][0])
        ratio = min(sizes[high][0] / sizes[low][0], sizes[high][1] / sizes[low][1])
        if ratio < QUIET * self.factor or missed(view, low, 40) or missed(view, high, 40):
            return
        if view.memory.idle.get(low, 0) != view.memory.idle.get(high, 0):
            return
        start = view.memory.start_grad
        began = start[high] / start[low] if start.get(low, 0.0) > 0 and high in start else math.nan
        lost = began < self.factor / 2
        yield Signal(
            low if lost else high,
            seen=f"the gradients of {high} are {ratio:.2g} times those of {low}"
            + (f", and were {began:.2g} times at the start" if lost else " since the start"),
            likely=f"the features of {low} say little of the target: items that do not belong together, or noise"
            if lost
            else f"the features of {high} are larger than those of {low}",
            do=f"check that the items of {low} belong to the labels"
            if lost
            else f"compare the scales of both streams' features; normalise them before the fusion ({UNTESTED})",
            confirm=f"{low}'s validation figures, alone and left out",
            strength=ratio / self.factor,
            evidence={"ratio": ratio, "at the start": began, "threshold": self.factor},
        )


def _fitted(view: View, share: float) -> bool:
    """Whether the mean of the last 20 losses is between 0 and this share of the loss at the start."""
    recent = view.losses(20)
    return bool(view.memory.losses and recent) and (
        0 <= statistics.fmean(recent) < share * statistics.fmean(view.memory.losses)
    )


def _norm(step: StepStats, stream: str) -> float:
    return step.streams[stream].grad_norm


def _last(step: StepStats, stream: str) -> float:
    sample = step.streams[stream].sample
    return math.nan if sample is None else sample.last


@dataclass(frozen=True)
class WeightsGrow(_Windowed):
    """WGR: a stream's weights have grown `factor`-fold within 40 steps and `since_start`-fold since the start, and go
    on growing: by two percent a step, which is exponential growth and no learning."""

    id: ClassVar[str] = "WGR"
    destabilises: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("samples of weights",)

    warm_up: int = 15
    every: int = 5
    hold: int = 2
    factor: float = 2.0
    """A choice: healthy growth over whole runs of the zoo is below 1.6, most of it in the first steps."""
    since_start: float = 3.0
    """A choice; torchmortem has 10."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            weights = view.series(_weight, 40, stream)
            start = view.memory.start_weight.get(stream, math.nan)
            if len(weights) < 10 or not min(start, weights[0], weights[len(weights) // 2]) > 0:
                continue
            growth, whole = weights[-1] / weights[0], weights[-1] / start
            if growth < QUIET * self.factor or whole < QUIET * self.since_start:
                continue
            half = weights[-1] / weights[len(weights) // 2]
            still = math.log(half) / (0.25 * math.log(self.factor)) if half > 0 else 0.0
            decay = view.now.rank_facts[0].weight_decay[view.number(stream)]
            change = _scaled(view, stream, 0.1)
            yield Signal(
                stream,
                seen=f"{stream}: its weights have grown {growth:.2g}-fold in {len(weights)} steps, {whole:.2g}-fold "
                "since the start",
                likely="a learning rate that is too high, or a decay with the wrong sign",
                do=f"{_told(change, 0.1)} ({UNTESTED}); look for what else changes the weights",
                confirm="its weight norm stops growing",
                strength=min(growth / self.factor, whole / self.since_start, still),
                evidence={"growth": growth, "since_start": whole, keys.WEIGHT_DECAY: decay, "threshold": self.factor},
                action=change,
            )


@dataclass(frozen=True)
class WeightsShrink(_Windowed):
    """WSH: a stream's weights have lost `share` of their norm within 100 steps."""

    id: ClassVar[str] = "WSH"
    requires: ClassVar[tuple[str, ...]] = ("samples of weights",)

    share: float = 0.4
    """A choice: half a percent a step, and a weight decay that is meant takes thousands of steps."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            first, last = (_weight(view.steps[place], stream) for place in (-min(100, len(view.steps)), -1))
            if len(view.steps) < 20 or not first > 0 or not view.trained(stream):
                continue
            lost = 1 - last / first
            if not lost > QUIET * self.share:
                continue
            decay = view.now.rank_facts[0].weight_decay[view.number(stream)] if view.now.rank_facts else math.nan
            action = Action(keys.WEIGHT_DECAY, stream, decay / 10, decay) if decay > 0 else None
            yield Signal(
                stream,
                seen=f"{stream}: its weights have lost {lost:.0%} of their norm in {min(100, len(view.steps))} steps",
                likely="a weight decay that is stronger than the gradients",
                do=f"weight_decay {decay:g} -> {decay / 10:g} ({UNTESTED})",
                confirm="its weight norm stops falling",
                strength=lost / self.share,
                evidence={"lost": lost, keys.WEIGHT_DECAY: decay, "threshold": self.share},
                action=action,
            )


@dataclass(frozen=True)
class ClippedAway(_Windowed):
    """CLP: the whole gradient is more than `factor` times the declared clipping norm, in the median of 20 steps: every
    step is cut to the same tiny length. Information with optimizers whose updates do not depend on that length."""

    id: ClassVar[str] = "CLP"
    requires: ClassVar[tuple[str, ...]] = ("clipping",)

    warm_up: int = 20
    factor: float = 50.0
    """A choice: clipping norms that are meant are of the order of the norm."""

    def check(self, view: View) -> Iterator[Signal]:
        clip, norm = view.intent.clip_norm or math.nan, _total(view)
        if not norm > QUIET * self.factor * clip:
            return
        wanted = float(f"{2 * norm:.2g}")
        yield Signal(
            seen=f"the gradient's norm is {norm:.3g}, and it is clipped to {clip:g} in every step",
            likely="the clipping norm is off by powers of ten",
            do=f"clip_norm {clip:g} -> {wanted:g}, twice the median norm ({UNTESTED})",
            confirm="most steps are not clipped",
            strength=norm / clip / self.factor,
            evidence={"norm": norm, "clip_norm": clip, "threshold": self.factor},
            action=Action("clip_norm", keys.FULL, wanted, clip),
            severity=Severity.info if view.setup.adaptive else None,
        )


@dataclass(frozen=True)
class Stalled(_Windowed):
    """STL: after `after` steps, and a twentieth of the declared training, the loss of a declared classification is
    still at chance, ln(classes), within `near`, and within `ratio` of where it began. Without declared classes the
    second half is information: fine-tuning begins low."""

    id: ClassVar[str] = "STL"
    requires: ClassVar[tuple[str, ...]] = ("loss",)

    hold: int = 2
    every: int = 10
    warm_up: int = 79
    after: float = 0.05
    """Of the declared training: a choice."""
    ratio: float = 0.95
    """A choice; runmedic calls 2 % of progress none."""
    near: float = 0.05
    """A choice: the loss of shuffled labels stays within 1 % of ln(classes) in the zoo."""

    def check(self, view: View) -> Iterator[Signal]:
        if not view.memory.losses or view.now.step < self.after * (view.intent.total_steps or 0):
            return
        recent = view.losses(20)
        start, now = statistics.fmean(view.memory.losses), statistics.fmean(recent) if recent else math.nan
        if not now > start - (1 - self.ratio) * abs(start):
            return
        classes = view.intent.classes
        chance = math.log(classes) if classes and classes > 1 else math.nan
        at_chance = abs(now - chance) <= self.near * chance
        yield Signal(
            seen=f"the loss is {now:.3g} after {view.now.step} steps and was {start:.3g} at the start"
            + (f"; chance is {chance:.3g}" if at_chance else ""),
            likely="labels that do not belong to the inputs, a loss of the wrong quantity (probabilities for logits), "
            "or a learning rate that is far too low",
            do="train on one batch until its loss is near 0: if that fails look at the loss, else at the labels",
            confirm="the loss falls below chance",
            evidence={"loss": now, "start": start} | ({"chance": chance} if at_chance else {}),
            severity=None if at_chance else Severity.info,
        )


@dataclass(frozen=True)
class Diverging(_Windowed):
    """DIV: the loss has lost `share` of all that it had gained, and `least` at least, in the mean of 20 steps, and is
    not on its way back: what the last 5 have lost is still `back` of the most that any 5 in a row of these have. Other
    data (a curriculum's next stage) raise it at once, and it falls again."""

    id: ClassVar[str] = "DIV"
    severity: ClassVar[Severity] = Severity.error
    destabilises: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("loss",)

    hold: int = 2
    warm_up: int = 30
    share: float = 0.5
    """runmedic: divergence is half of the progress lost."""
    least: float = 0.5
    """A choice, in nats; in other units a quarter of the loss at the start where that is less."""
    back: float = 0.5
    """A choice: half of what was lost is won back within 20 steps."""

    def check(self, view: View) -> Iterator[Signal]:
        recent = view.losses(20)
        if not view.memory.losses or len(recent) < 20 or not math.isfinite(view.memory.best_loss):
            return
        start, best, now = statistics.fmean(view.memory.losses), view.memory.best_loss, statistics.fmean(recent)
        gained = start - best
        least = min(self.least, abs(start) / 4) or self.least
        if gained < least:  # never learned: nothing to lose, but it may explode from the start
            gained = max(abs(start), least)
        if now - best < QUIET * least:
            return
        by_five = [statistics.fmean(recent[place : place + 5]) for place in range(16)]
        returned = (by_five[-1] - best) / (max(by_five) - best)
        yield Signal(
            seen=f"the loss is {now:.3g}, its best was {best:.3g}, and it began at {start:.3g}",
            likely="a learning rate that is too high for where the training is, or other data than before",
            do=f"go on from the best checkpoint at a third of the learning rate ({UNTESTED})",
            confirm="the loss is below its best again",
            strength=min((now - best) / (self.share * gained), (now - best) / least, returned / self.back),
            evidence={"loss": now, "best": best, "start": start, "threshold": self.share},
        )


@dataclass(frozen=True)
class Rounded(_Windowed):
    """BF16: less than `share` of the sampled elements of a stream that is trained in 16-bit weights change in a step:
    the updates of the others round to nothing. Information: whether that hurts is unknown. Optimizers that round
    stochastically, or carry the rest over (Kahan), move more."""

    id: ClassVar[str] = "BF16"
    severity: ClassVar[Severity] = Severity.info
    requires: ClassVar[tuple[str, ...]] = ("optimizer", "samples of weights", "consecutive steps")
    preflight: ClassVar[bool] = True

    share: float = 0.1
    """A choice: AdamW in pure bf16 was seen to move 8.5 % of the elements a step at a rate of 2e-5, 0.4 % at 1e-6."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            if not view.setup.streams[stream].low_precision or not view.lr(stream) > 0:
                continue
            moved = view.median(moved_share, 20, 10, stream)
            if math.isnan(moved):
                continue
            yield Signal(
                stream,
                seen=f"{stream}: {1 - moved:.0%} of its 16-bit weights do not change in a step, at learning rate "
                f"{view.lr(stream):g}",
                likely="updates below the weights' rounding",
                do="keep float32 master weights, or round stochastically",
                confirm="more than 90 % of the weights change",
                strength=self.share / moved if moved > 0 else math.inf,
                evidence={"moved": moved, "threshold": self.share},
            )


RULES: tuple[Rule, ...] = (
    RateJump(),
    RateGone(),
    WeightsGrow(),
    RateHigh(),
    Diverging(),
    Vanishing(),
    ClippedAway(),
    RateLow(),
    WeightsShrink(),
    UpdatesApart(),
    Imbalance(),
    Stalled(),
    Rounded(),
)
