"""What the guide's rules share: figures by stream, comparisons that never divide by 0, actions."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.history import History
from ddp_streammon.rules.finding import Action, Finding, StreamSettings

WARN, FINE = "⚠️  ", "✓ "
"""How the guide's sentences begin (two spaces after the warning sign)."""
WINDOW = 5
"""Entries that means, trends and changes are taken over (guide)."""

GRAD_RATIO_BAND = (0.33, 3.0)
"""Gradient ratios outside are reported (guide)."""
WEIGHT_RATIO_BAND = (0.5, 2.0)
"""Weight ratios outside are reported (guide)."""
OVERFITTING = 1.0
"""An overfitting score above is significant (guide)."""

REDUCE_LR = 0.5
"""Guide, Pattern 3: `pg['lr'] *= 0.5`; Scenario 2: 1e-4 to 5e-5."""
RAISE_LR = 5.0
"""Guide, Scenario 1: 1e-4 to 5e-4."""
RAISE_WEIGHT_DECAY = 2.5
"""Guide, Scenario 2: 2e-2 to 5e-2."""
REDUCE_WEIGHT_DECAY = 0.05
"""Guide, Scenario 1: 2e-2 to 1e-3."""
FIRST_WEIGHT_DECAY = 1e-4
"""What "increase" means from 0. The weight decay of the ResNet paper (He et al. 2016): mild where the
optimizer adds it to the gradient (SGD), milder still where it does not (AdamW)."""


def mean(values: Sequence[float]) -> float:
    """nan and inf stay what they are."""
    return sum(values) / len(values)


def title(stream: str) -> str:
    """`stream1` is written `Stream1`."""
    return stream[:1].upper() + stream[1:]


def times(factor: float) -> str:
    """`4.2x`; far beyond that, in powers of ten."""
    return f"{factor:.1f}x" if factor < 1e6 else f"{factor:.1e}x"


def quotient(a: float, b: float) -> float:
    """a / b of positive numbers, never infinite."""
    return min(a / b, sys.float_info.max)


def outside(ratio: float, band: tuple[float, float]) -> bool:
    """Strictly below the lower or above the upper end."""
    return ratio < band[0] or ratio > band[1]


@dataclass(frozen=True)
class Comparison:
    """The largest and the smallest of several streams' norms."""

    high: str
    low: str
    factor: float
    """Norm of `high` over norm of `low`, at least 1."""
    ratio: float
    """The same two, but the stream named first by the user over the other: what bands are about."""
    norms: Mapping[str, float]
    """The norms of the two."""

    def evidence(self, figure: str, band: tuple[float, float]) -> dict[str, float]:
        """The ratio, the norms it is of, and the end of the band that is nearer."""
        named = {keys.of_stream(stream, figure): norm for stream, norm in self.norms.items()}
        return {"ratio": self.ratio, "threshold": band[0] if self.ratio < 1 else band[1], **named}


def compare(norms: Mapping[str, float]) -> Comparison | None:
    """Largest against smallest of those that can be divided by; None where fewer than two can."""
    norms = {stream: norm for stream, norm in norms.items() if norm > 0 and math.isfinite(norm)}
    if len(norms) < 2:
        return None
    ranked = sorted(norms, key=lambda stream: norms[stream], reverse=True)
    high, low = ranked[0], ranked[-1]
    first, second = (stream for stream in norms if stream in (high, low))
    return Comparison(
        high=high,
        low=low,
        factor=quotient(norms[high], norms[low]),
        ratio=quotient(norms[first], norms[second]),
        norms={first: norms[first], second: norms[second]},
    )


@dataclass(frozen=True)
class Context:
    """All that a rule may look at."""

    history: History
    streams: Sequence[str]
    settings: Mapping[str, StreamSettings]
    severity: Severity

    def recent(self, stream: str, figure: str, count: int = WINDOW) -> list[float]:
        """The last values of a stream's figure, at most `count`."""
        return [entry.value for entry in self.history.tail(keys.of_stream(stream, figure), count)]

    def gradients(self, stream: str, figure: str) -> list[float]:
        """`recent` for a gradient's figure, without the steps that a GradScaler skipped: it is looking for its scale.

        A window in which it skipped every step is no search any more, and comes as it is.
        """
        entries = self.history.tail(keys.of_stream(stream, figure), WINDOW)
        skipped = {entry.step for entry in self.history.tail(keys.SKIPPED, WINDOW) if entry.value}
        taken = [entry.value for entry in entries if entry.step not in skipped]
        return [entry.value for entry in entries] if not taken and len(entries) == WINDOW else taken

    def entries(self, figure: str, *streams: str) -> int:
        """How many entries the window has so far; of several streams, the fewest."""
        return min(len(self.recent(stream, figure)) for stream in streams)

    def latest(self, figure: str) -> dict[str, float]:
        """The latest value of each stream that has one; it may be nan."""
        columns = {stream: self.recent(stream, figure, 1) for stream in self.streams}
        return {stream: values[-1] for stream, values in columns.items() if values}

    def non_finite(self) -> dict[str, dict[str, float]]:
        """The streams whose gradients were nan or inf within the window, by what: `elements` or `norm`.

        Norms are taken over the finite elements, so that the count speaks, and a norm of nan is that of no gradient.
        Where no count was logged, the norm speaks.
        """
        seen: dict[str, dict[str, float]] = {}
        for stream in self.streams:
            counts = self.gradients(stream, keys.GRAD_NONFINITE)
            norms = [norm for norm in self.gradients(stream, keys.GRAD_NORM) if not math.isfinite(norm)]
            if any(count > 0 for count in counts):
                seen[stream] = {"elements": max(counts)}
            elif norms and not counts:
                seen[stream] = {"norm": norms[-1]}
        return seen

    def grad_norms(self) -> dict[str, float]:
        """Each stream's mean gradient norm over the window, without the streams of `non_finite`."""
        sick = self.non_finite()
        columns = {stream: self.gradients(stream, keys.GRAD_NORM) for stream in self.streams}
        return {stream: mean(norms) for stream, norms in columns.items() if norms and stream not in sick}

    def now(self) -> int | None:
        """The step of the latest entry of all."""
        return self._step(self.history)

    def frozen(self, stream: str) -> bool:
        """A learning rate of exactly 0: the stream is not meant to learn."""
        return self.setting(stream).lr == 0.0

    def setting(self, stream: str) -> StreamSettings:
        """What is known of a stream's optimizer settings; nan where nothing is."""
        return self.settings.get(stream, StreamSettings())

    def scale_lr(self, stream: str, factor: float) -> Action | None:
        """The learning rate times `factor`; None where it is not known, or 0. Of `shared`: the base value."""
        return _change(keys.LEARNING_RATE, stream, self.setting(stream).lr, factor)

    def scale_weight_decay(self, stream: str, factor: float) -> Action | None:
        """The weight decay times `factor`; from 0 an increase goes to `FIRST_WEIGHT_DECAY`."""
        old = self.setting(stream).weight_decay
        if old == 0.0 and factor > 1.0:
            return Action(keys.WEIGHT_DECAY, stream, value=FIRST_WEIGHT_DECAY, old=old)
        return _change(keys.WEIGHT_DECAY, stream, old, factor)

    def finding(
        self,
        rule: str,
        sentence: str,
        figures: Iterable[str],
        evidence: Mapping[str, float],
        *,
        stream: str | None = None,
        among: Iterable[str] = (),
        action: Action | None = None,
    ) -> Finding:
        """A finding; its sign decides how loud it is.

        Its step is that of the latest entry of `figures`: of the streams which it compares (`among`), else of
        its `stream`, else of all.
        """
        own = self.streams if stream is None or stream == keys.SHARED else (stream,)
        of = tuple(among) or own
        return Finding(
            sentence,
            rule=rule,
            severity=self.severity if sentence.startswith(WARN) else Severity.info,
            stream=stream,
            step=self._step(keys.of_stream(name, figure) for figure in figures for name in of),
            evidence=dict(evidence),
            action=action,
        )

    def _step(self, names: Iterable[str]) -> int | None:
        return max((entry.step for name in names for entry in self.history.tail(name, 1)), default=None)


def _change(setting: str, stream: str, old: float, factor: float) -> Action | None:
    new = old * factor
    whose = keys.FULL if stream == keys.SHARED else stream
    return Action(setting, whose, value=new, old=old) if 0 < new < math.inf else None


def advise(verb: str, setting: str, action: Action | None) -> str:
    """`reduce stream1_lr`, with the numbers where the present value is known: `(0.0001 -> 5e-05)`."""
    return f"{verb} {setting}" + (f" ({action.old:g} -> {action.value:g})" if action else "")
