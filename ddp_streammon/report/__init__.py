"""What the monitor tells, and the shape of whoever is told. Floats and sentences only: no rank, no device."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ddp_streammon import keys
from ddp_streammon.history import History
from ddp_streammon.rules.finding import Action, Finding
from ddp_streammon.stats import StepStats

ReportKind = Literal["step", "epoch"]

STOPPED = 255
"""Exit code, for the records, of a run that somebody has asked to stop: W&B shows it as killed, others as failed."""
_LINE = "=" * 70
_UNDEFINED = "undefined"
_OVERFIT_FACTOR = 1.5
"""The guide's: a stream overfits more than another when its score is this many times larger..."""
_OVERFIT_LEAST = 0.5
"""...and is itself above the guide's mild threshold; scores near zero have meaningless quotients."""
_TRAINER = {"clip_norm": "trainer"}
"""Settings that are not an optimizer's -> the section that has them."""
_FREE_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
"""A number that is no part of a name: `4.2` in `4.2x larger`, but not the 1 of `Stream1`."""


@dataclass(frozen=True)
class Report:
    """The figures of one monitored step, or of one epoch."""

    kind: ReportKind
    step: int
    """The optimizer step that the values belong to (not the one at which they became known)."""
    epoch: float | None
    values: Mapping[str, float]
    """By the keys of keys.py: `stream1_grad_norm`, `loss`. May hold nan and infinities."""
    findings: tuple[Finding, ...] = ()
    """Everything that stands now, whether or not an earlier report had it too."""
    stats: StepStats | None = None
    """Of a step: all that the rules saw of it."""
    monitor_seconds: float | None = None
    """Of a step: what the calls of `StreamMonitor.step` since the report before have taken on rank 0's host."""


@dataclass(frozen=True)
class RunInfo:
    """What a sink is told before the first report."""

    streams: tuple[str, ...]
    config: Mapping[str, Any]
    inventory: str
    """The streams, their tensors and learning rates, and what cannot be evaluated, as text."""
    name: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a sink is told after the last report."""

    summary: Mapping[str, float]
    findings: tuple[Finding, ...]
    text: str
    """The summary for people, see `summary_text`."""
    exit_code: int = 0


class Sink(Protocol):
    """Where reports go. Sinks exist on rank 0 only (whoever builds them sees to that): none asks for a rank.

    A constructor raises where the sink is misconfigured; `write` and `close` are kept from stopping the job
    by `sinks.Guarded`, which calls them in a thread of the sink's own, unless it has a true attribute
    `in_callers_thread`.
    """

    def open(self, run: RunInfo) -> None:
        """Called once, before the first report."""

    def write(self, report: Report) -> None:
        """Called for every report, in the order of their steps."""

    def close(self, outcome: Outcome) -> None:
        """Called once, after the last report, also when training failed."""


def gist(finding: Finding) -> Hashable:
    """What makes two findings the same one: rule, whom it concerns, and the sentence but for its numbers."""
    return (
        finding.rule,
        finding.severity,
        finding.stream,
        finding.rank,
        _FREE_NUMBER.sub("#", str(finding)),
    )


@dataclass
class Told:
    """Which findings were passed on already, so that one that stands is passed on once.

    A finding is forgotten when an epoch report comes without it: if it returns, it is news again.
    """

    _gists: set[Hashable] = field(default_factory=set)

    def news(self, kind: ReportKind, findings: Iterable[Finding]) -> list[Finding]:
        """Those of `findings` that were not told, in their order; from now on they were."""
        by_gist = {gist(finding): finding for finding in findings}
        news = [finding for key, finding in by_gist.items() if key not in self._gists]
        self._gists = set(by_gist) if kind == "epoch" else self._gists | set(by_gist)
        return news


def as_override(action: Action) -> str:
    """The change as a Hydra override of the application: `optim.streams.depth.weight_decay=0.05`."""
    owner = "optim" if action.stream == keys.FULL else f"optim.streams.{action.stream}"
    return f"{_TRAINER.get(action.setting, owner)}.{action.setting}={action.value:.4g}"


def in_words(action: Action) -> str:
    """The change for a loop of one's own: `parameter group 'depth': weight_decay 0.02 -> 0.05`."""
    old = "" if math.isnan(action.old) else f"{action.old:.4g} "
    whose = "all parameter groups" if action.stream == keys.FULL else f"parameter group {action.stream!r}"
    return f"{whose}: {action.setting} {old}-> {action.value:.4g}"


def to_set(action: Action | None) -> str:
    """What to set, as the watched loop says it, else in words; empty where there is nothing to set."""
    return "" if action is None else action.how or in_words(action)


def display_name(stream: str) -> str:
    """`stream1` is shown as `Stream1`; the rest of the name is the user's."""
    return stream[:1].upper() + stream[1:]


def summary_text(history: History, streams: Sequence[str]) -> str:
    """The guide's `get_summary`: a table of gradient norms, weight norms and overfitting scores.

    A section is there where a stream has its figure. Averages are over the finite values. What cannot be said
    (a zero denominator, a nan) is `undefined`.
    """
    grad_norms = {name: _mean(values) for name, values in _logged(history, streams, keys.GRAD_NORM).items()}
    weight_norms = {name: values[-1] for name, values in _logged(history, streams, keys.WEIGHT_NORM).items()}
    scores = {name: values[-1] for name, values in _logged(history, streams, keys.OVERFITTING_SCORE).items()}
    if keys.EPOCH not in history and not (grad_norms or weight_norms or scores):
        return "No monitoring data available"
    lines = [_LINE, "Stream Monitoring Summary", _LINE]
    lines += _norm_lines("Gradient Norms (average):", grad_norms, two=len(streams) == 2)
    lines += _norm_lines("Weight Norms (latest):", weight_norms, two=len(streams) == 2)
    lines += _score_lines("Overfitting Indicators (latest):", scores)
    return "\n".join([*lines, _LINE])


def _logged(history: History, streams: Sequence[str], figure: str) -> dict[str, list[float]]:
    """The values of one figure for every stream that has any."""
    values = {name: history[keys.of_stream(name, figure)] for name in streams}
    return {name: series for name, series in values.items() if series}


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values; nan where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else _UNDEFINED


def _ratio(a: float, b: float) -> float:
    """a / b; nan where b is zero."""
    return a / b if b else math.nan


def _norm_lines(title: str, norms: Mapping[str, float], two: bool) -> list[str]:
    if not norms:
        return []
    lines = ["", title]
    lines += [f"  {display_name(name)}: {_number(norm, 4)}" for name, norm in norms.items()]
    for a, b in keys.pairs(norms):
        label = "S1/S2" if two else f"{display_name(a)}/{display_name(b)}"
        lines.append(f"  Ratio ({label}): {_number(_ratio(norms[a], norms[b]), 2)}")
    return lines


def _score_lines(title: str, scores: Mapping[str, float]) -> list[str]:
    if not scores:
        return []
    lines = ["", title]
    lines += [f"  {display_name(name)} score: {_number(score, 4)}" for name, score in scores.items()]
    pairs = keys.pairs(scores)
    if any(math.isnan(score) for score in scores.values()):
        return [*lines, f"  Comparison: {_UNDEFINED}"] if pairs else lines
    worse = [
        f"  ⚠️  {display_name(more)} overfitting more than {display_name(less)}"
        for more, less in (sorted(pair, key=scores.__getitem__, reverse=True) for pair in pairs)
        if scores[more] > _OVERFIT_LEAST and scores[more] > _OVERFIT_FACTOR * scores[less]
    ]
    balanced = ["  ✓ Balanced overfitting"] if pairs else []
    return lines + (worse or balanced)
