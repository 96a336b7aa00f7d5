"""The guide's rules about gradient norms: means over the window, non-finite streams apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ddp_streammon import keys
from ddp_streammon.rules.finding import Finding
from ddp_streammon.rules.guide_context import (
    FINE,
    GRAD_RATIO_BAND,
    RAISE_LR,
    REDUCE_LR,
    WARN,
    Comparison,
    Context,
    compare,
    outside,
    times,
    title,
)

VANISHING = 1e-7
"""A smaller norm is vanishing. smdebug's VanishingGradient asks it of mean |g|, which is below the norm;
torchmortem and gradscope take 1e-8 for a layer's norm."""
EXPLODING = 1e3
"""A larger norm is exploding (traintools, torchmortem, gradscope)."""


def non_finite_gradients(context: Context) -> list[Finding]:
    """S-NF. The exact rule, which sees every rank, also names the rank."""
    return [
        context.finding(
            "S-NF",
            f"{WARN}{title(stream)} gradients non-finite ({_said(seen)}) - check {stream} inputs and loss,"
            f" reduce {stream}_lr or clip gradients",
            (keys.GRAD_NORM, keys.GRAD_NONFINITE),
            seen,
            stream=stream,
        )
        for stream, seen in context.non_finite().items()
    ]


def _said(figures: Mapping[str, float]) -> str:
    return f"{figures['elements']:g} elements" if "elements" in figures else f"norm {figures['norm']}"


def missing_gradients(context: Context) -> list[Finding]:
    """S-GV where the norm is 0, or of nothing (nan): no ratio, and no learning rate that would help."""
    undefined = "Gradient ratio undefined: " if len(context.streams) > 1 else ""
    return [
        context.finding(
            "S-GV",
            f"{WARN}{undefined}{title(stream)} has no gradient (norm {norm:g})",
            (keys.GRAD_NORM,),
            {"norm": norm, "threshold": 0.0, "entries": context.entries(keys.GRAD_NORM, stream)},
            stream=stream,
        )
        for stream, norm in context.grad_norms().items()
        if not norm > 0
    ]


def vanishing_gradients(context: Context) -> list[Finding]:
    """S-GV: each stream by itself, so that two that vanish together are not "balanced"."""
    return [
        context.finding(
            "S-GV",
            f"{WARN}{title(stream)} gradients vanishing (norm {norm:.2g})"
            f" - increase {stream}_lr or reduce {stream}_weight_decay",
            (keys.GRAD_NORM,),
            {"norm": norm, "threshold": VANISHING, "entries": context.entries(keys.GRAD_NORM, stream)},
            stream=stream,
            action=context.scale_lr(stream, RAISE_LR),
        )
        for stream, norm in context.grad_norms().items()
        if 0 < norm < VANISHING
    ]


def exploding_gradients(context: Context) -> list[Finding]:
    """S-GX."""
    return [
        context.finding(
            "S-GX",
            f"{WARN}{title(stream)} gradients exploding (norm {norm:.2g}) - reduce {stream}_lr or clip gradients",
            (keys.GRAD_NORM,),
            {"norm": norm, "threshold": EXPLODING, "entries": context.entries(keys.GRAD_NORM, stream)},
            stream=stream,
            action=context.scale_lr(stream, REDUCE_LR),
        )
        for stream, norm in context.grad_norms().items()
        if norm > EXPLODING
    ]


def gradient_ratio(context: Context) -> list[Finding]:
    """S-GR: which stream's gradients are too large, or that all are balanced; nothing where all vanish."""
    far, near = imbalance(context), balance(context)
    if far is not None:
        return [
            context.finding(
                "S-GR",
                f"{WARN}{title(far.high)} gradients {times(far.factor)} larger than {title(far.low)}"
                f" - consider reducing {far.high}_lr",
                (keys.GRAD_NORM,),
                evidence(context, far),
                stream=far.high,
                among=far.norms,
                action=context.scale_lr(far.high, REDUCE_LR),
            )
        ]
    if near is not None:
        return [
            context.finding(
                "S-GR",
                f"{FINE}Gradient ratio balanced ({near.ratio:.2f})",
                (keys.GRAD_NORM,),
                evidence(context, near),
                among=near.norms,
            )
        ]
    return []


def imbalance(context: Context) -> Comparison | None:
    """The streams whose gradient ratio is outside the band; None where it is inside, or all vanish."""
    pair = compare(context.grad_norms())
    if pair is None or pair.norms[pair.high] < VANISHING or not outside(pair.ratio, GRAD_RATIO_BAND):
        return None
    return pair


def balance(context: Context) -> Comparison | None:
    """The streams whose gradient ratio is inside the band, where *all* streams' are alive and finite."""
    norms = context.grad_norms()
    pair = compare(norms)
    alive = not context.non_finite() and all(VANISHING <= norm < math.inf for norm in norms.values())
    return pair if pair is not None and alive and not outside(pair.ratio, GRAD_RATIO_BAND) else None


def evidence(context: Context, pair: Comparison) -> dict[str, float]:
    """The ratio, its threshold, the two norms and how many entries each is the mean of."""
    entries = context.entries(keys.GRAD_NORM, *pair.norms)
    return {**pair.evidence(keys.GRAD_NORM, GRAD_RATIO_BAND), "entries": entries}


RULES = (non_finite_gradients, missing_gradients, vanishing_gradients, exploding_gradients, gradient_ratio)
"""In the order in which they are said."""
