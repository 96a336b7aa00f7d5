"""What rules over windows of steps have in common: updates, gradients and weights, and a rate that is to be changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ddp_streammon import keys
from ddp_streammon.rules.engine import Kind, Rule
from ddp_streammon.rules.finding import Action
from ddp_streammon.rules.view import View
from ddp_streammon.stats import StepStats

UNTESTED = "untested on your data"


@dataclass(frozen=True)
class Windowed(Rule):
    """What windowed rules have in common."""

    kind: ClassVar[Kind] = Kind.windowed
    hold: int = 3
    """Evaluations in a row: a choice, with which no healthy run of the zoo was alarmed (`python -m tests.zoo run`)."""
    clear: float = 0.8
    warm_up: int = 40
    """Measured steps: as many as the windows are long."""
    every: int = 5


def update(view: View, stream: str, count: int = 40, least: int = 20) -> float:
    """The median update-to-weight ratio of a stream's last measured steps, since its learning rate was last zero; nan
    with fewer than `least`."""
    before = view.series(_rests, count + 1, stream, view.number(stream))[-2::-1]
    awake = before.index(1.0) if 1.0 in before else len(before)
    return view.median(_update, awake, least, stream) if awake else math.nan


def _update(step: StepStats, stream: str) -> float:
    sample = step.streams[stream].sample
    return math.nan if sample is None else sample.update


def _rests(step: StepStats, stream: str, number: int) -> float:
    """1 where a rank's learning rate of the stream is zero in a step."""
    return float(0.0 in step.rank_facts.lr(number))


def missed(view: View, stream: str, count: int) -> bool:
    """Whether the stream had no gradient, a learning rate of zero, or an empty input on a rank, in one of the last
    measured steps."""
    number = view.number(stream)
    return any(
        not step.streams[stream].grad_norm > 0
        or 0.0 in step.rank_facts.lr(number)
        or step.rank_facts.without_input(number)
        for step in view.steps[-count:]
    )


def moved_share(step: StepStats, stream: str) -> float:
    """The share of a stream's sampled weights that changed; nan where it is not known."""
    sample = step.streams[stream].sample
    return math.nan if sample is None else sample.moved


def weight(step: StepStats, stream: str) -> float:
    sample = step.streams[stream].sample
    return math.nan if sample is None else sample.weight


def scaled(view: View, stream: str | None, factor: float) -> Action | None:
    """The learning rate times `factor`, to one digit, as a change of what its schedule starts from; None where that is
    not known, or of all streams where they differ in it."""
    bases = {view.base_lr(name) for name in ([stream] if stream else view.now.streams)}
    old = bases.pop()
    value = old * factor
    if bases or not 0 < value < math.inf:
        return None
    return Action(keys.LEARNING_RATE, stream or keys.FULL, float(f"{value:.1g}"), old)


def in_words(change: Action | None, factor: float) -> str:
    return f"learning rate x {factor:.1g}" if change is None else f"learning rate {change.old:g} -> {change.value:g}"


def by_gradient(view: View, stream: str) -> float:
    """The share of a stream's update that is not its weight decay, median of 40 steps: g / (g + decay x w) where the
    optimizer adds decay to the gradient, whatever its momentum; 1 for adaptive optimizers, and where it is unknown."""
    share = math.nan if view.setup.adaptive else view.median(_share, 40, 2, stream, view.number(stream))
    return 1.0 if math.isnan(share) else share


def _share(step: StepStats, stream: str, number: int) -> float:
    of = step.streams[stream]
    if not step.rank_facts or not of.update_ratio > 0 or not of.grad_norm > 0:
        return math.nan
    decay = max(step.rank_facts.weight_decay(number)[0], 0.0)
    return of.grad_norm / (of.grad_norm + decay * of.update_norm / of.update_ratio)


def total(view: View) -> float:
    """The median norm of the whole gradient."""
    return view.median(_whole, 20, 1, tuple(view.now.streams))


def _whole(step: StepStats, streams: Sequence[str]) -> float:
    return math.hypot(*[step.streams[stream].grad_norm for stream in streams if step.streams[stream].elements])
