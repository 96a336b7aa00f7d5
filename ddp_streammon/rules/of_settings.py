"""Rules about configurations that contradict what is meant, or each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.rules.engine import QUIET, Kind, Rule, Signal
from ddp_streammon.rules.finding import Action
from ddp_streammon.rules.view import View
from ddp_streammon.rules.windows import moved_share

SAME_RATE = 0.01
"""Relative difference of two learning rates that are taken for the same: they are written with two or three digits."""


@dataclass(frozen=True)
class Frozen(Rule):
    """FRZ: a stream has no trainable parameter. An error where it was declared which streams are frozen and this is
    none of them; information where nothing was declared. No threshold."""

    id: ClassVar[str] = "FRZ"
    kind: ClassVar[Kind] = Kind.configuration
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("samples of weights",)
    preflight: ClassVar[bool] = True

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            sample = view.sample(stream)
            tensors = view.setup.streams[stream].tensors
            if sample is None or not tensors or sample.trainable > 0 or view.meant_frozen(stream):
                continue
            known = view.intent.frozen is not None
            yield Signal(
                stream,
                seen=f"{stream}: none of its {tensors} tensors requires a gradient",
                likely="requires_grad_(False) was left on" if known else "it is frozen, which nobody declared",
                do=f"call requires_grad_(True) on {stream}, or declare it frozen (streams.{stream}.frozen=true)",
                confirm="this line clears, and its update is above 0",
                evidence={"tensors": float(tensors), "trainable": 0.0},
                severity=None if known else Severity.info,
            )


@dataclass(frozen=True)
class NotOptimized(Rule):
    """OPT: trainable tensors that are in no optimizer. Where none of a stream's are, and its weights do not move, an
    error; where some are missing, a warning, unless their stream's weights all move: another optimizer, which the
    monitor was not given, has them then. No threshold."""

    id: ClassVar[str] = "OPT"
    kind: ClassVar[Kind] = Kind.configuration
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("optimizer", "samples of weights", "consecutive steps")
    preflight: ClassVar[bool] = True

    hold: int = 2

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.now.streams:
            sample = view.sample(stream)
            if sample is None or view.meant_frozen(stream) or not sample.trainable > sample.optimized:
                continue
            moved = view.series(moved_share, 4, stream)
            none = sample.optimized == 0
            if not moved or (max(moved) > 0 if none else min(moved) == 1):
                continue
            missing = round(sample.trainable - sample.optimized)
            yield Signal(
                stream,
                seen=f"{stream}: {missing} of {round(sample.trainable)} trainable tensors are in no optimizer",
                likely="modules were added, or a group left out, after the optimizer was built",
                do=f"give {stream}'s parameters to the optimizer (add_param_group), or all optimizers to the monitor",
                confirm="this line clears, and its update is above 0",
                evidence={"trainable": sample.trainable, "optimized": sample.optimized},
                severity=None if none else Severity.warning,
            )


@dataclass(frozen=True)
class Rates(Rule):
    """RATE: the learning rate or weight decay of a stream's groups is not the declared one. A group's base rate counts
    (what its scheduler started from); without a scheduler only a rate above the declared one contradicts it, since a
    schedule of one's own may begin low. `SAME_RATE` of difference is none."""

    id: ClassVar[str] = "RATE"
    kind: ClassVar[Kind] = Kind.configuration
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("optimizer", "rates")
    preflight: ClassVar[bool] = True

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            setup = view.setup.streams[stream]
            of_kind = (
                (keys.LEARNING_RATE, view.intent.lr, setup.rates, setup.scheduled),
                (keys.WEIGHT_DECAY, view.intent.weight_decay, setup.decays, True),
            )
            for setting, declared, present, known in of_kind:
                meant = declared.get(stream)
                if meant is None or not present or view.meant_frozen(stream):
                    continue
                other = not any(math.isclose(meant, value, rel_tol=SAME_RATE, abs_tol=1e-15) for value in present)
                if not other or not (known or min(present) > meant):
                    continue
                nearest = min(present, key=lambda value, meant=meant: abs(value - meant))  # type: ignore[misc]
                yield Signal(
                    stream,
                    seen=f"{stream}: its {setting} is {nearest:g}, declared is {meant:g}",
                    likely="a setting did not reach the optimizer's group, or is off by a power of ten",
                    do=f"set the {setting} of {stream}'s group to {meant:g}, or declare {nearest:g}",
                    confirm="this line clears",
                    evidence={setting: nearest, "declared": meant},
                    action=Action(setting, stream, value=meant, old=nearest),
                )


@dataclass(frozen=True)
class ZeroRate(Rule):
    """LR0: a stream's learning rate is zero though it is to be trained: its base rate is, or the rate has been so since
    the first step for `share` of the declared training (a schedule that thaws streams in turn has begun by then)."""

    id: ClassVar[str] = "LR0"
    kind: ClassVar[Kind] = Kind.configuration
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("optimizer",)
    preflight: ClassVar[bool] = True

    share: float = 0.5
    """Half of the training: a choice."""

    def check(self, view: View) -> Iterator[Signal]:
        known = view.intent.frozen is not None
        total = view.intent.total_steps or math.inf
        for stream in view.streams:
            setup, since = view.setup.streams[stream], view.memory.low_lr.get(stream, -1)
            if since < 1 or view.meant_frozen(stream) or not setup.optimized:
                continue
            base = setup.scheduled and bool(setup.rates) and not any(setup.rates)
            if base or since >= self.share * total or not setup.scheduled:
                yield Signal(
                    stream,
                    seen=f"{stream}: its learning rate is 0",
                    likely="its group's learning rate was left at 0" if base else "its schedule never begins",
                    do=f"give {stream} a learning rate, or declare it frozen (streams.{stream}.frozen=true)",
                    confirm="this line clears, and its update is above 0",
                    strength=1.0 if base or since >= self.share * total or since >= 50 else 0.0,
                    evidence={keys.LEARNING_RATE: 0.0, "steps": float(since)},
                    severity=None if known and (base or since >= self.share * total) else Severity.info,
                )


@dataclass(frozen=True)
class Decay(Rule):
    """DECAY: learning rate x weight decay takes more than `most` of the weights away in every step: what gradients
    build is gone within a few dozen steps. Usual settings are 1e-7 to 1e-3 (SGD 0.1 x 5e-4, AdamW 1e-3 x 0.1).
    Nothing where all of a declared training is too short for a fall by 1/e."""

    id: ClassVar[str] = "DECAY"
    kind: ClassVar[Kind] = Kind.configuration
    requires: ClassVar[tuple[str, ...]] = ("optimizer",)

    most: float = 0.01
    """A choice: ten times the largest of the usual settings; weights halve in 69 steps."""

    def check(self, view: View) -> Iterator[Signal]:
        if not view.ranks:
            return
        first = view.ranks[0]
        for number, stream in enumerate(view.now.streams):
            lr, decay = first.lr[number], first.weight_decay[number]
            if not lr * decay > QUIET * self.most or view.meant_frozen(stream):
                continue
            old = decay
            new = float(f"{1 / (lr * (view.intent.total_steps or 10_000)):.1g}")
            if new >= old:
                continue
            yield Signal(
                stream if stream != keys.SHARED else None,
                seen=f"{stream}: weight decay {old:g} at learning rate {lr:g} takes {lr * decay:.1%} of it a step",
                likely="a weight decay of another optimizer's convention, or off by powers of ten",
                do=f"weight_decay {old:g} -> {new:g} (a fall by 1/e over the training; untested on your data)",
                confirm="its weight norm stops falling",
                strength=lr * decay / self.most,
                evidence={
                    keys.LEARNING_RATE: lr,
                    keys.WEIGHT_DECAY: decay,
                    "share": lr * decay,
                    "threshold": self.most,
                },
                action=Action(keys.WEIGHT_DECAY, stream, value=new, old=old),
            )


@dataclass(frozen=True)
class Initial(Rule):
    """INIT: the weights of a stream without norm layers are drawn at another scale than any usual initialisation.

    The root mean square of w x sqrt(fan-in) is 0.58 in PyTorch's default, 1 in LeCun's, 1.41 in He's, 1.7 in an
    orthogonal one for tanh; a factor of two beyond is left to both sides, and depth makes a power of what is beyond.
    Where norm layers are, the scale of what is before them does not matter. Weights that were trained stay within."""

    id: ClassVar[str] = "INIT"
    kind: ClassVar[Kind] = Kind.configuration

    least: float = 0.03
    """A choice: a twentieth of PyTorch's default."""
    most: float = 3.0
    """A choice: twice He's (He et al. 2015)."""
    until: int = 1000
    """Measured steps for which the start is worth a word: a choice."""

    def check(self, view: View) -> Iterator[Signal]:
        if view.memory.count > self.until:
            return
        for stream in view.streams:
            setup = view.setup.streams[stream]
            if setup.norm or not setup.scale > 0 or not setup.trainable or view.meant_frozen(stream):
                continue
            small = setup.scale < self.least
            if self.least < setup.scale < self.most:
                continue
            yield Signal(
                stream,
                seen=f"{stream}: the scale of its weights, w x sqrt(fan-in), is {setup.scale:.2g} at the start",
                likely="an initialisation by the wrong fan, or a factor too many",
                do=f"initialise {stream} anew (PyTorch's default has 0.58, He's 1.41)",
                confirm="the scale is between 0.1 and 2 at the next start",
                strength=max(setup.scale / self.most, self.least / setup.scale),
                evidence={"scale": setup.scale, "threshold": self.least if small else self.most},
            )
