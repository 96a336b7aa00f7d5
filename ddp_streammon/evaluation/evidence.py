"""What an evaluation has to say of each stream, as evidence for claims; and what it remembers for the next one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ddp_streammon import keys
from ddp_streammon.evaluation import readings
from ddp_streammon.evaluation.claims import (
    COMPLEMENT_MARGIN,
    OVERFITTING_MARGIN,
    WORTH,
    Claim,
    Evidence,
    Figure,
    Statement,
    margin,
)
from ddp_streammon.evaluation.intervals import Estimate, difference, scaled
from ddp_streammon.evaluation.knowledge import Knowledge
from ddp_streammon.evaluation.table import LEVEL, Table
from ddp_streammon.stats import ratio


@dataclass(frozen=True)
class Past:
    """Earlier evaluations of a split: how many there were, and at its best, by item, what each stream's probe explained
    and minus the loss of the whole model."""

    count: int = 0
    best: Mapping[str, list[float]] = field(default_factory=dict)
    claimed: Sequence[tuple[str, str]] = ()
    """What stands since the last look: streams and statements."""
    accuracy: float | None = None
    """Of the whole model where its loss was best; None where it is not scored."""
    knew: Mapping[str, float] = field(default_factory=dict)
    """The accuracy (or R^2) of each stream's probe at its best."""


def of_use(table: Table, estimates: Mapping[str, Estimate], name: str, split: str, streams: Sequence[str]) -> Evidence:
    """Of stream `name`, one of `streams`."""
    least = margin(table.value(keys.FULL, readings.LOSS), share=False)
    uses = estimates.get(keys.of_stream(name, f"{split}_{keys.USES}"))
    denied = {Statement.redundant} if _needs_the_others(estimates, name, split, streams) else ()
    return Evidence(uses=Figure(uses, least) if uses is not None and least > 0 else None, denied=denied)


def _needs_the_others(estimates: Mapping[str, Estimate], name: str, split: str, streams: Sequence[str]) -> bool:
    """Whether every other stream loses its worth with this one, so that none stands in for it: the two towers of a
    contrastive loss, whatever a probe of either knows of the target."""
    with_it = [keys.cover(a, b, split) for a, b in keys.pairs(streams) if name in (a, b)]
    covers = [estimates[key] for key in with_it if key in estimates]
    return bool(covers) and all(estimate.high < 0 for estimate in covers)


def of_probe(own: Evidence, known: Knowledge, past: Past, name: str) -> Evidence:
    """The evidence with what the probe found of the stream."""
    stats = known.stats
    if stats is None or name not in stats.alone:
        return own
    least = margin(1.0, share=True)
    scores, then = stats.items, past.best.get(name)
    change = None
    if then is not None and len(then) == len(scores.base):
        change = scores.change(torch.tensor(then, dtype=torch.float64, device="cpu"), name, LEVEL)
    complement = None
    if len(stats.alone) > 1:
        share = max(least, COMPLEMENT_MARGIN * stats.everything.explained.value)  # the least where that is nan
        complement = Figure(stats.explained_complement[name], share, stats.complement[name])
    as_good = stats.alone[name].score.value > past.knew.get(name, math.inf) - least
    return replace(
        own,
        knows=Figure(stats.alone[name].explained, least, stats.alone[name].advantage),
        complement=complement,
        change=None if change is None else Figure(change, least),
        choices=max(past.count, 1),
        denied={*own.denied, Statement.regressed} if as_good else own.denied,
    )


def of_memory(own: Evidence, estimates: Mapping[str, Estimate], name: str, split: str) -> Evidence:
    """The evidence with how much less the stream is worth on held-out items than in training."""
    if own.uses is None:
        return own
    trained = estimates[keys.of_stream(name, f"{readings.TRAIN}_{keys.USES}")]
    held_out = estimates[keys.of_stream(name, f"{split}_{keys.USES}")]
    return replace(own, memory=Figure(difference(scaled(trained, WORTH), held_out), own.uses.margin))


def of_overfitting(table: Table, estimates: Mapping[str, Estimate], past: Past) -> Evidence:
    """The held-out loss against its best, and against the training loss."""
    losses, then = table.figures[keys.FULL, readings.LOSS], past.best.get(keys.FULL, [])
    if len(then) != int(table.tried.sum()):
        return Evidence()
    best = losses.clone()
    best[table.tried] = -torch.tensor(then, dtype=torch.float64, device="cpu")
    least = abs(ratio(float((best * table.weight)[table.tried].sum()), float(table.weight[table.tried].sum())))
    if not least > 0:
        return Evidence()
    rise = Figure(table.contrast(losses - best, [], []), OVERFITTING_MARGIN * least)
    gap = Figure(estimates[keys.of_stream(keys.FULL, keys.LOSS_GAP)], margin(least, share=False))
    return Evidence(rise=rise, gap=gap, choices=past.count)


def remembered(past: Past, known: Knowledge | None, table: Table, stated: Sequence[Claim] | None) -> Past:
    """The past with this evaluation in it; by item what is better when it is larger, 0 for what has no weight."""
    weight, losses = table.weight[table.tried], table.figures[keys.FULL, readings.LOSS][table.tried]
    now = {keys.FULL: torch.where(weight > 0, -losses, 0.0)}
    if known is not None and known.stats is not None:
        now |= known.stats.items.alone
    best, accuracy, knew = dict(past.best), past.accuracy, dict(past.knew)
    for name, scores in now.items():
        then = torch.tensor(best.get(name, []), dtype=torch.float64, device="cpu")
        counts = weight if name == keys.FULL else torch.ones_like(scores)
        better = len(then) != len(scores) or float(counts @ (scores - then)) > 0
        if better and not bool(scores.isnan().any()):
            best[name] = scores.tolist()
            if known is not None and known.stats is not None and name in known.stats.alone:
                knew[name] = known.stats.alone[name].score.value
            if name == keys.FULL and table.has(keys.FULL, readings.CORRECT):
                accuracy = table.value(keys.FULL, readings.CORRECT)
    claimed = past.claimed if stated is None else [(claim.stream, claim.statement.value) for claim in stated]
    return Past(past.count + 1, best, claimed, accuracy, knew)
