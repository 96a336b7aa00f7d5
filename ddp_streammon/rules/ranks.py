"""Rules about ranks: replicas that are not equal, settings that differ, and a rank that the others wait for."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddp_streammon.config import Severity
from ddp_streammon.ranks import RankFacts, outvoted
from ddp_streammon.rules.finding import Finding
from ddp_streammon.stats import StepStats

NOT_SYNCHRONISED, DESYNCHRONISED, LEARNING_RATE, MODE, BATCH, STRAGGLER = (
    "SYNC",
    "DESYNC",
    "LR",
    "MODE",
    "BATCH",
    "SLOW",
)
WINDOW = 50
"""Measured steps over which the pace of ranks is compared."""
SLOWER = 1.5
"""How many times the median rank's busy time makes a straggler. A choice: twice what the busy times of
equal ranks on one shared machine differ by."""
SHARE = 0.1
"""Of a step: a smaller excess of busy time is not worth a word."""


def replicas(stats: StepStats) -> list[Finding]:
    """What an audit says of each stream whose parameters several ranks hold.

    DESYNC (error): their weights differ. SYNC (warning): their weights are equal and their gradients are not, so they
    will drift apart. The step is that of the audit; differences may be older.
    """
    findings = []
    for found in stats.replicas:
        if found.gradients and found.weights:
            continue
        common: dict[str, Any] = {"stream": found.stream, "rank": _single(found.ranks), "step": stats.step}
        if found.weights:
            findings.append(
                Finding(
                    f"⚠️  {found.stream}: gradients differ between ranks at step {stats.step} while weights are equal: "
                    "nobody synchronises them, and the replicas will drift apart; wrap the model in "
                    "DistributedDataParallel, or leave no_sync() before the last backward",
                    rule=NOT_SYNCHRONISED,
                    severity=Severity.warning,
                    **common,
                )
            )
        else:
            findings.append(
                Finding(
                    f"⚠️  {found.stream}: the ranks hold different weights at step {stats.step} ({_who(found.ranks)}): "
                    "reload one state on every rank, and look for what changes weights outside of the optimizer",
                    rule=DESYNCHRONISED,
                    severity=Severity.error,
                    **common,
                )
            )
    return findings


def settings(stats: StepStats) -> list[Finding]:
    """What differs between ranks that should be alike in one step.

    LR (error): a stream's learning rate or weight decay. MODE (error): some ranks train and others are in eval mode.
    BATCH (info): batch sizes differ, so that items of smaller batches weigh more in the averaged gradient.
    """
    facts = stats.rank_facts
    findings: list[Finding] = []
    if len(facts) < 2:
        return findings
    for number, stream in enumerate(stats.streams):
        for name, values in (
            ("learning rate", [rank.lr[number] for rank in facts]),
            ("weight decay", [rank.weight_decay[number] for rank in facts]),
        ):
            findings += _difference(facts, values, stats.step, f"the {name} of {stream}", LEARNING_RATE, stream=stream)
    modes = {0.0: "eval", 1.0: "training"}
    findings += _difference(
        facts, [rank.training for rank in facts], stats.step, "the model's mode", MODE, shown=lambda v: modes[v]
    )
    samples = [rank.samples for rank in facts]
    findings += _difference(facts, samples, stats.step, "the batch size", BATCH, severity=Severity.info)
    return findings


class Pace:
    """SLOW (warning): a rank that is busy for longer than the others, so that they wait for it, over a window of steps.

    State is what ranks said in a window (not all say the same number of times where they are heard in turn); it starts
    anew with every monitor.
    """

    def __init__(self) -> None:
        self._busy: dict[int, list[float]] = defaultdict(list)
        self._step: dict[int, list[float]] = defaultdict(list)
        self._steps = 0
        self._standing: list[Finding] = []

    def check(self, stats: StepStats) -> list[Finding]:
        """Take in a step; what stands since the last whole window."""
        for facts in stats.rank_facts:
            if not math.isnan(facts.step_seconds):
                self._busy[facts.rank].append(facts.busy_seconds)
                self._step[facts.rank].append(facts.step_seconds)
        self._steps += 1
        if self._steps == WINDOW:
            self._standing = _straggler(_means(self._busy), _means(self._step), stats.step)
            self._busy.clear()
            self._step.clear()
            self._steps = 0
        return self._standing


def _means(said: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {rank: statistics.fmean(seconds) for rank, seconds in said.items()}


def _straggler(busy: Mapping[int, float], step: Mapping[int, float], now: int) -> list[Finding]:
    """`busy`, `step`: mean seconds of each rank."""
    if len(busy) < 2:
        return []
    slowest = max(busy, key=lambda rank: busy[rank])
    others = [seconds for rank, seconds in busy.items() if rank != slowest]
    usual = statistics.median(others)
    length = statistics.median(step.values())
    if busy[slowest] < SLOWER * usual or busy[slowest] - usual < SHARE * length:
        return []
    return [
        Finding(
            f"⚠️  rank {slowest} is busy for {busy[slowest] / length:.0%} of a step, the others for "
            f"{usual / length:.0%}, with data, forward and optimizer ({WINDOW} steps up to step {now}): they wait for "
            "it; look at its data loading and its machine",
            rule=STRAGGLER,
            severity=Severity.warning,
            rank=slowest,
            step=now,
            evidence={"busy": busy[slowest] / length, "others": usual / length},
        )
    ]


def _difference(
    facts: Sequence[RankFacts],
    values: Sequence[float],
    step: int,
    what: str,
    rule: str,
    *,
    stream: str | None = None,
    severity: Severity = Severity.error,
    shown: Callable[[float], str] = lambda value: f"{value:g}",
) -> list[Finding]:
    if len(set(values)) < 2:
        return []
    known = [(rank.rank, value) for rank, value in zip(facts, values, strict=True) if not math.isnan(value)]
    out = outvoted([rank for rank, _ in known], [value for _, value in known])
    if not out:
        return []
    by_value: dict[float, list[int]] = defaultdict(list)
    for rank, value in known:
        by_value[value].append(rank)
    told = ", ".join(f"{shown(value)} on {_ranks(ranks)}" for value, ranks in by_value.items())
    return [
        Finding(
            f"⚠️  {what} differs between ranks at step {step}: {told}",
            rule=rule,
            severity=severity,
            stream=stream,
            rank=_single(out),
            step=step,
            evidence={f"rank {rank}": value for rank, value in known[:16]},
        )
    ]


def _single(ranks: Sequence[int]) -> int | None:
    return ranks[0] if len(ranks) == 1 else None


def _ranks(ranks: Sequence[int]) -> str:
    few = ", ".join(str(rank) for rank in ranks[:8])
    return f"rank {few}" if len(ranks) == 1 else f"ranks {few}{', ...' if len(ranks) > 8 else ''}"


def _who(ranks: Sequence[int]) -> str:
    """Which ranks are to blame, as far as a vote can say."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} differs from the others"
    return (
        f"{_ranks(ranks)} differ, and no majority says which is right" if len(ranks) == 2 else f"{_ranks(ranks)} differ"
    )
