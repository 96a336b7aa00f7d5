"""The guide's rules about weight norms."""

from __future__ import annotations

import math
from itertools import pairwise

from ddp_streammon import keys
from ddp_streammon.rules.finding import Finding
from ddp_streammon.rules.guide_context import (
    RAISE_LR,
    RAISE_WEIGHT_DECAY,
    WARN,
    WEIGHT_RATIO_BAND,
    WINDOW,
    Comparison,
    Context,
    compare,
    outside,
    quotient,
    times,
    title,
)

GROWTH = WEIGHT_RATIO_BAND[1]
"""Weights that grew more over the window diverge: the guide's bound between two streams, put to a stream's
own past (torchmortem: 10 over a run)."""
UNCHANGED = 1e-5
"""Relative change of a norm below which weights stand still (smdebug's UnchangedTensor: rtol 1e-5)."""
MOVING = 1e-4
"""Relative change above which weights move (torchmortem: stagnation); in between nothing is said."""


def non_finite_weights(context: Context) -> list[Finding]:
    """S-NF: such weights stay so whatever is set, hence no action."""
    return [
        context.finding(
            "S-NF",
            f"{WARN}{title(stream)} weights non-finite (norm {norm}) - restore a checkpoint and reduce {stream}_lr",
            (keys.WEIGHT_NORM,),
            {"norm": norm},
            stream=stream,
        )
        for stream, norm in context.latest(keys.WEIGHT_NORM).items()
        if not math.isfinite(norm)
    ]


def missing_weights(context: Context) -> list[Finding]:
    """S-WR where a norm is 0: nothing is divided by it."""
    norms = context.latest(keys.WEIGHT_NORM)
    return [
        context.finding(
            "S-WR",
            f"{WARN}Weight ratio undefined: {title(stream)} has no weights (norm {norm:g})",
            (keys.WEIGHT_NORM,),
            {"norm": norm, "threshold": 0.0},
            stream=stream,
        )
        for stream, norm in norms.items()
        if -math.inf < norm <= 0 and len(norms) > 1
    ]


def weight_ratio(context: Context) -> list[Finding]:
    """S-WR: inside the band nothing is said."""
    pair = imbalance(context)
    if pair is None:
        return []
    return [
        context.finding(
            "S-WR",
            f"{WARN}{title(pair.high)} weights {times(pair.factor)} larger than {title(pair.low)}"
            f" - consider increasing {pair.high}_weight_decay",
            (keys.WEIGHT_NORM,),
            pair.evidence(keys.WEIGHT_NORM, WEIGHT_RATIO_BAND),
            stream=pair.high,
            among=pair.norms,
            action=context.scale_weight_decay(pair.high, RAISE_WEIGHT_DECAY),
        )
    ]


def diverging_weights(context: Context) -> list[Finding]:
    """S-WD: growth at every entry of the window, so that one jump (a restart, a thaw) is not divergence."""
    findings = []
    for stream in context.streams:
        norms = context.recent(stream, keys.WEIGHT_NORM, WINDOW + 1)
        growing = len(norms) > WINDOW and norms[0] > 0 and all(a < b < math.inf for a, b in pairwise(norms))
        if growing and norms[-1] > GROWTH * norms[0]:
            factor = quotient(norms[-1], norms[0])
            finding = context.finding(
                "S-WD",
                f"{WARN}{title(stream)} weights diverging over time ({times(factor)} in {WINDOW} entries),"
                f" unstable training - increase {stream}_weight_decay",
                (keys.WEIGHT_NORM,),
                {"growth": factor, "norm": norms[-1], "threshold": GROWTH, "entries": WINDOW},
                stream=stream,
                action=context.scale_weight_decay(stream, RAISE_WEIGHT_DECAY),
            )
            findings.append(finding)
    return findings


def stagnant_weights(context: Context) -> list[Finding]:
    """S-WS: only beside a stream that moves, since at the end of a schedule all stand still."""
    changes = {stream: _change(context.recent(stream, keys.WEIGHT_NORM)) for stream in context.streams}
    most = max((change for change in changes.values() if change is not None), default=0.0)
    return [
        context.finding(
            "S-WS",
            f"{WARN}{title(stream)} weights stagnant (norm unchanged over {WINDOW} entries) - increase {stream}_lr",
            (keys.WEIGHT_NORM,),
            {"change": change, "largest_change": most, "threshold": UNCHANGED, "entries": WINDOW},
            stream=stream,
            action=context.scale_lr(stream, RAISE_LR),
        )
        for stream, change in changes.items()
        if change is not None and change < UNCHANGED and most > MOVING and not context.frozen(stream)
    ]


def imbalance(context: Context) -> Comparison | None:
    """The streams whose weight ratio (of the latest norms) is outside the band; None where it is inside."""
    pair = compare(context.latest(keys.WEIGHT_NORM))
    return pair if pair is not None and outside(pair.ratio, WEIGHT_RATIO_BAND) else None


def _change(norms: list[float]) -> float | None:
    """Range over size; None where it is too early to say, or a norm is not positive and finite."""
    if len(norms) < WINDOW or not all(0 < norm < math.inf for norm in norms):
        return None
    return (max(norms) - min(norms)) / max(norms)


RULES = (non_finite_weights, missing_weights, weight_ratio, diverging_weights, stagnant_weights)
"""In the order in which they are said."""
