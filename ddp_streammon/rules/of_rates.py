"""Rules about learning rates: they jump, are gone, are too high or too low."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.rules.engine import QUIET, Rule, Signal
from ddp_streammon.rules.finding import Action
from ddp_streammon.rules.memory import JUMP
from ddp_streammon.rules.signals import together
from ddp_streammon.rules.view import View
from ddp_streammon.rules.windows import UNTESTED, Windowed, by_gradient, in_words, scaled, total, update


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
                rates = step.rank_facts.lr(number)
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
class RateHigh(Windowed):
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
            change = scaled(view, stream, 0.01 / q)
            yield Signal(
                stream,
                seen=f"{stream}: a step changes its weights by {q:.0%} of their norm, at learning rate {rate:g}",
                likely="the learning rate is too high",
                do=f"{in_words(change, 0.01 / q)} ({UNTESTED})",
                confirm="updates below 3 % of the weights, and a falling loss",
                strength=q / self.most,
                evidence={"update_ratio": q, keys.LEARNING_RATE: rate, "threshold": self.most},
                action=change,
            )


@dataclass(frozen=True)
class RateLow(Windowed):
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
        return q * by_gradient(view, stream) if flat else q

    def _signal(self, view: View, stream: str | None, of: str, flat: bool) -> Signal:
        q, rate, limit = self._learned(view, of, flat), view.lr(of), self.slow if flat else self.least
        usual = 1e-3
        factor = min(usual / q, 1e4) if q > 0 else math.nan
        change = scaled(view, stream, factor)
        clip = view.intent.clip_norm
        clipped = clip is not None and total(view) > 10 * clip
        outweighed = flat and by_gradient(view, of) < 0.5
        seen = f"{stream or 'all streams'}: a step changes {q:.1e} of the weights, at learning rate {rate:g}"
        likely = "the learning rate is off by powers of ten"
        do = f"{in_words(change, factor)} ({UNTESTED}), or declare the stream frozen"
        if clip is not None and clipped:
            wider = float(f"{2 * total(view):.2g}")
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
