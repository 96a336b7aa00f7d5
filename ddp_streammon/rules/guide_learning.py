"""The guide's rules about each stream alone: overfitting scores and train accuracy."""

from __future__ import annotations

import math

from ddp_streammon import keys
from ddp_streammon.rules.finding import Finding
from ddp_streammon.rules.guide_context import (
    OVERFITTING,
    RAISE_LR,
    RAISE_WEIGHT_DECAY,
    WARN,
    WINDOW,
    Context,
    title,
)

MILD = 0.5
"""An overfitting score above is mild overfitting (guide)."""
SIGNIFICANTLY = 2.0
"""Times the other's score (guide)."""
STALLED = 0.001
"""A mean gain of train accuracy below is no learning (guide)."""
CONVERGED = 0.99
"""A train accuracy from which no gain is expected: what is left, 0.01, is ten entries of `STALLED`."""


def overfitting(context: Context) -> list[Finding]:
    """S-OF."""
    return [
        context.finding(
            "S-OF",
            f"{WARN}{title(stream)} overfitting (score: {score:.2f}) - increase {stream}_weight_decay or add dropout",
            (keys.OVERFITTING_SCORE,),
            {"score": score, "threshold": OVERFITTING},
            stream=stream,
            action=context.scale_weight_decay(stream, RAISE_WEIGHT_DECAY),
        )
        for stream, score in context.latest(keys.OVERFITTING_SCORE).items()
        if score > OVERFITTING
    ]


def mild_overfitting(context: Context) -> list[Finding]:
    """S-OM: said, with nothing to change yet."""
    return [
        context.finding(
            "S-OM",
            f"{WARN}{title(stream)} mild overfitting (score: {score:.2f})",
            (keys.OVERFITTING_SCORE,),
            {"score": score, "threshold": MILD},
            stream=stream,
        )
        for stream, score in context.latest(keys.OVERFITTING_SCORE).items()
        if MILD < score <= OVERFITTING
    ]


def overfitting_more(context: Context) -> list[Finding]:
    """S-OR: the largest score against the second. No ratio is computed, since a score may be 0 or below."""
    scores = {name: value for name, value in context.latest(keys.OVERFITTING_SCORE).items() if value == value}
    ranked = sorted(scores, key=lambda name: scores[name], reverse=True)[:2]
    if len(ranked) < 2 or not scores[ranked[0]] > max(OVERFITTING, SIGNIFICANTLY * scores[ranked[1]]):
        return []
    stream = ranked[0]
    named = {keys.of_stream(name, keys.OVERFITTING_SCORE): scores[name] for name in ranked}
    return [
        context.finding(
            "S-OR",
            f"{WARN}{title(stream)} overfitting significantly more - boost {stream} regularization",
            (keys.OVERFITTING_SCORE,),
            {**named, "threshold": OVERFITTING, "times": SIGNIFICANTLY},
            stream=stream,
            among=ranked,
            action=context.scale_weight_decay(stream, RAISE_WEIGHT_DECAY),
        )
    ]


def all_overfitting(context: Context) -> list[Finding]:
    """S-OB. What to set is the model's `dropout_p`, which is in no optimizer: advice without an action."""
    scores = context.latest(keys.OVERFITTING_SCORE)
    if len(scores) < 2 or len(scores) < len(context.streams) or not min(scores.values()) > OVERFITTING:
        return []
    named = {keys.of_stream(stream, keys.OVERFITTING_SCORE): score for stream, score in scores.items()}
    return [
        context.finding(
            "S-OB",
            f"{WARN}{'Both' if len(scores) == 2 else f'All {len(scores)}'} streams overfitting"
            " - increase global dropout_p or add data augmentation",
            (keys.OVERFITTING_SCORE,),
            {**named, "threshold": OVERFITTING},
            stream=keys.SHARED,
        )
    ]


def stalled(context: Context) -> list[Finding]:
    """S-ST: as the guide's code has it, more than 5 entries and the mean difference of the last 5."""
    findings = []
    for stream in context.streams:
        accuracies = context.recent(stream, keys.TRAIN_ACC, WINDOW + 1)
        if len(accuracies) <= WINDOW or context.frozen(stream) or accuracies[-1] >= CONVERGED:
            continue
        gain = (accuracies[-1] - accuracies[-WINDOW]) / (WINDOW - 1)
        if gain < STALLED and all(map(math.isfinite, accuracies[-WINDOW:])):
            finding = context.finding(
                "S-ST",
                f"{WARN}{title(stream)} learning stalled - consider increasing {stream}_lr",
                (keys.TRAIN_ACC,),
                {"gain": gain, "train_acc": accuracies[-1], "threshold": STALLED, "entries": WINDOW},
                stream=stream,
                action=context.scale_lr(stream, RAISE_LR),
            )
            findings.append(finding)
    return findings


RULES = (overfitting, mild_overfitting, overfitting_more, all_overfitting, stalled)
"""In the order in which they are said."""
