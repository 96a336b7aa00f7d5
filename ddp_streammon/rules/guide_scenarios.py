"""The guide's four scenarios and its advice for late training: rules about several figures at once.

Each is a diagnosis with the guide's solutions, with numbers where the present settings are known. The action
is the first of them; in Scenario 2 the second, since S-OF carries the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ddp_streammon import keys
from ddp_streammon.rules import guide_gradients, guide_weights
from ddp_streammon.rules.finding import Finding
from ddp_streammon.rules.guide_context import (
    OVERFITTING,
    RAISE_LR,
    RAISE_WEIGHT_DECAY,
    REDUCE_LR,
    REDUCE_WEIGHT_DECAY,
    WARN,
    WEIGHT_RATIO_BAND,
    Context,
    advise,
    title,
)

HALF = 0.5
"""An accuracy below this part of another is far below. The guide's samples are 0.12 (0.10 of 0.85, Scenario
1) and 0.13 (0.12 of 0.95, Scenario 2); half is the plainest bound that both clear."""
DOMINATING = 2.0
"""Contribution of the heavy stream over the other's: the same bound (guide's sample: 95 % and 15 %)."""
NOT_LEARNING = 0.15
"""A train accuracy below is no learning. The guide's sample is 0.11, measured on 160 items: a standard error
of 0.025, so 0.15 is 1.6 of them above."""
LATE = 50
"""First epoch of late training (guide: "epochs 50+")."""


def not_contributing(context: Context) -> list[Finding]:
    """S-S1, Scenario 1: `Stream1 (RGB) Not Learning`."""
    pair = guide_gradients.imbalance(context)
    accuracies = context.latest(keys.TRAIN_ACC)
    if pair is None or not _below(accuracies, pair.low, pair.high):
        return []
    weak = pair.low
    raised = context.scale_lr(weak, RAISE_LR)
    relaxed = context.scale_weight_decay(weak, REDUCE_WEIGHT_DECAY)
    named = {keys.of_stream(stream, keys.TRAIN_ACC): accuracies[stream] for stream in pair.norms}
    return [
        context.finding(
            "S-S1",
            f"{WARN}{title(weak)} gradients vanishing, not contributing to learning"
            f" - {advise('increase', f'{weak}_lr', raised)},"
            f" {advise('reduce', f'{weak}_weight_decay', relaxed)},"
            " check fusion weights, try a different fusion strategy",
            (keys.GRAD_NORM, keys.TRAIN_ACC),
            {**guide_gradients.evidence(context, pair), **named},
            stream=weak,
            among=pair.norms,
            action=raised,
        )
    ]


def memorizing(context: Context) -> list[Finding]:
    """S-S2, Scenario 2: `Stream2 (Depth) Overfitting`. S-OF has the weight decay, this the rate."""
    train, val = context.latest(keys.TRAIN_ACC), context.latest(keys.VAL_ACC)
    findings = []
    for stream, score in context.latest(keys.OVERFITTING_SCORE).items():
        seen = {keys.TRAIN_ACC: train.get(stream, math.nan), keys.VAL_ACC: val.get(stream, math.nan)}
        if score > OVERFITTING and _below(seen, keys.VAL_ACC, keys.TRAIN_ACC):
            reduced = context.scale_lr(stream, REDUCE_LR)
            decayed = context.scale_weight_decay(stream, RAISE_WEIGHT_DECAY)
            finding = context.finding(
                "S-S2",
                f"{WARN}{title(stream)} memorizing training data"
                f" - {advise('increase', f'{stream}_weight_decay', decayed)},"
                f" {advise('reduce', f'{stream}_lr', reduced)},"
                f" add {stream} dropout, augment {stream} inputs",
                (keys.OVERFITTING_SCORE, keys.TRAIN_ACC, keys.VAL_ACC),
                {"score": score, **seen, "threshold": OVERFITTING},
                stream=stream,
                action=reduced,
            )
            findings.append(finding)
    return findings


def not_learning(context: Context) -> list[Finding]:
    """S-NL, Scenario 3: `Balanced but Not Learning`. Speaks of the base values (`shared`)."""
    pair = guide_gradients.balance(context)
    accuracies = context.latest(keys.TRAIN_ACC)
    if pair is None or len(accuracies) < len(context.streams):
        return []
    if not all(accuracy < NOT_LEARNING for accuracy in accuracies.values()):
        return []
    raised = context.scale_lr(keys.SHARED, RAISE_LR)
    relaxed = context.scale_weight_decay(keys.SHARED, REDUCE_WEIGHT_DECAY)
    named = {keys.of_stream(stream, keys.TRAIN_ACC): accuracy for stream, accuracy in accuracies.items()}
    return [
        context.finding(
            "S-NL",
            f"{WARN}Gradients balanced but too small globally"
            f" - {advise('increase', 'learning_rate', raised)}, check loss function, normalize inputs,"
            f" {advise('reduce', 'weight_decay', relaxed)}",
            (keys.GRAD_NORM, keys.TRAIN_ACC),
            {**guide_gradients.evidence(context, pair), **named, "threshold": NOT_LEARNING},
            stream=keys.SHARED,
            action=raised,
        )
    ]


def dominating(context: Context) -> list[Finding]:
    """S-S4, Scenario 4: `One Stream Dominating`. S-WR says which is heavy, this that it decides."""
    pair = guide_weights.imbalance(context)
    if pair is None:
        return []
    heavy, light = pair.high, pair.low
    figure = _contribution_figure(context, (heavy, light))
    contributions = context.latest(figure)
    if not _below(contributions, light, heavy, 1 / DOMINATING):
        return []
    decayed = context.scale_weight_decay(heavy, RAISE_WEIGHT_DECAY)
    raised = context.scale_lr(light, RAISE_LR)
    named = {keys.of_stream(stream, figure): contributions[stream] for stream in pair.norms}
    return [
        context.finding(
            "S-S4",
            f"{WARN}{title(heavy)} weights growing much faster, dominating predictions"
            f" - {advise('increase', f'{heavy}_weight_decay', decayed)},"
            f" {advise('increase', f'{light}_lr', raised)}, use WeightedFusion, check fusion.{light}_weight",
            (keys.WEIGHT_NORM, figure),
            {**pair.evidence(keys.WEIGHT_NORM, WEIGHT_RATIO_BAND), **named, "times": DOMINATING},
            stream=heavy,
            among=pair.norms,
            action=decayed,
        )
    ]


RULES = (not_contributing, memorizing, not_learning, dominating)
"""In the guide's order."""


def late_training(context: Context, findings: Sequence[Finding]) -> list[Finding]:
    """S-PH, what the guide says to do "if metrics show issues", in the phase in which it says so: late."""
    epoch = context.history.latest(keys.EPOCH)
    issues = sum(finding.startswith(WARN) for finding in findings)
    if not (epoch >= LATE and issues):
        return []
    return [
        Finding(
            f"{WARN}Metrics show issues late in training (epoch {epoch:g})"
            " - monitor more frequently, consider early stopping",
            rule="S-PH",
            severity=context.severity,
            step=context.now(),
            evidence={"epoch": epoch, "issues": issues, "threshold": LATE},
        )
    ]


def _below(values: Mapping[str, float], low: str, high: str, part: float = HALF) -> bool:
    """values[low] < part x values[high], the latter positive; False where one of them is missing or nan."""
    least, most = values.get(low, math.nan), values.get(high, math.nan)
    return most > 0 and least < part * most


def _contribution_figure(context: Context, streams: Sequence[str]) -> str:
    """Contribution, where it was logged for both; else each stream's validation accuracy alone."""
    logged = context.latest(keys.CONTRIBUTION)
    known = all(math.isfinite(logged.get(stream, math.nan)) for stream in streams)
    return keys.CONTRIBUTION if known else keys.VAL_ACC
