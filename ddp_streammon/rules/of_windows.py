"""Rules about gradients and the loss over windows of steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.rules.engine import QUIET, Signal
from ddp_streammon.rules.finding import Action
from ddp_streammon.rules.view import View
from ddp_streammon.rules.windows import UNTESTED, Windowed, missed, total
from ddp_streammon.stats import StepStats


@dataclass(frozen=True)
class Vanishing(Windowed):
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


def _ends(step: StepStats, stream: str) -> float:
    """Gradient of the first layer over that of the last; nan where one of them is zero, as with an empty input."""
    sample = step.streams[stream].sample
    return sample.first / sample.last if sample is not None and sample.last > 0 and sample.first > 0 else math.nan


@dataclass(frozen=True)
class Imbalance(Windowed):
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
class ClippedAway(Windowed):
    """CLP: the whole gradient is more than `factor` times the declared clipping norm, in the median of 20 steps: every
    step is cut to the same tiny length. Information with optimizers whose updates do not depend on that length."""

    id: ClassVar[str] = "CLP"
    requires: ClassVar[tuple[str, ...]] = ("clipping",)

    warm_up: int = 20
    factor: float = 50.0
    """A choice: clipping norms that are meant are of the order of the norm."""

    def check(self, view: View) -> Iterator[Signal]:
        clip, norm = view.intent.clip_norm or math.nan, total(view)
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
class Stalled(Windowed):
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
class Diverging(Windowed):
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
