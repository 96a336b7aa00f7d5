"""Rules about weights and their updates over windows of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.rules.engine import QUIET, Signal
from ddp_streammon.rules.finding import Action
from ddp_streammon.rules.view import View
from ddp_streammon.rules.windows import UNTESTED, Windowed, in_words, moved_share, scaled, update, weight


@dataclass(frozen=True)
class WeightsGrow(Windowed):
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
            weights = view.series(weight, 40, stream)
            start = view.memory.start_weight.get(stream, math.nan)
            if len(weights) < 10 or not min(start, weights[0], weights[len(weights) // 2]) > 0:
                continue
            growth, whole = weights[-1] / weights[0], weights[-1] / start
            if growth < QUIET * self.factor or whole < QUIET * self.since_start:
                continue
            half = weights[-1] / weights[len(weights) // 2]
            still = math.log(half) / (0.25 * math.log(self.factor)) if half > 0 else 0.0
            decay = view.ranks.weight_decay(view.number(stream))[0]
            change = scaled(view, stream, 0.1)
            yield Signal(
                stream,
                seen=f"{stream}: its weights have grown {growth:.2g}-fold in {len(weights)} steps, {whole:.2g}-fold "
                "since the start",
                likely="a learning rate that is too high, or a decay with the wrong sign",
                do=f"{in_words(change, 0.1)} ({UNTESTED}); look for what else changes the weights",
                confirm="its weight norm stops growing",
                strength=min(growth / self.factor, whole / self.since_start, still),
                evidence={"growth": growth, "since_start": whole, keys.WEIGHT_DECAY: decay, "threshold": self.factor},
                action=change,
            )


@dataclass(frozen=True)
class WeightsShrink(Windowed):
    """WSH: a stream's weights have lost `share` of their norm within 100 steps."""

    id: ClassVar[str] = "WSH"
    requires: ClassVar[tuple[str, ...]] = ("samples of weights",)

    share: float = 0.4
    """A choice: half a percent a step, and a weight decay that is meant takes thousands of steps."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            first, last = (weight(view.steps[place], stream) for place in (-min(100, len(view.steps)), -1))
            if len(view.steps) < 20 or not first > 0 or not view.trained(stream):
                continue
            lost = 1 - last / first
            if not lost > QUIET * self.share:
                continue
            decay = view.ranks.weight_decay(view.number(stream))[0] if view.ranks else math.nan
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
class UpdatesApart(Windowed):
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
class Rounded(Windowed):
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
