"""Gradient noise scale: about how many samples a batch can have before more of them add little. No rule reads it.

From the gradients of two batch sizes, a rank's own and the average over ranks: McCandlish et al. 2018, arXiv
1812.06162, appendix A.1. It speaks of the next step's gradient, for losses that are means over independent samples: not
for contrastive ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ddp_streammon.stats import StepStats

WINDOW = 500
"""Measured steps that an estimate is made from, at most."""
MIN_STEPS = 30
"""Fewer say too little of their own variance."""
MIN_RANKS = 8
"""With fewer the squared norm of the true gradient is a small difference of large numbers: two ranks gave 0.6 to 3
times the truth after 200 steps, for a noise scale of 50 times a rank's batch."""
QUANTILE = 1.959964
"""Of the normal distribution at 97.5 %: bounds of a 95 % interval."""


@dataclass(frozen=True)
class NoiseStep:
    """A stream's gradients in one step; squared L2 norms, unscaled, before clipping."""

    sq_norm: float
    """Of the average over ranks."""
    mean_local_sq_norm: float
    """Mean over ranks of the squared norms of their own gradients (not the square of their mean norm)."""
    samples: float
    """Of one rank; their harmonic mean where ranks differ."""
    ranks: int


@dataclass(frozen=True)
class NoiseScale:
    """tr(Sigma) / |G|^2 in samples, with a 95 % interval; nan and [0, inf] where it is not determined, with the reason.

    A lower bound that is not positive says that no noise was seen.
    """

    value: float
    low: float
    high: float
    determined: bool
    why: str = ""


def noise_scale(steps: Sequence[NoiseStep]) -> NoiseScale:
    """The ratio of the means, over steps, of the two unbiased estimators, with Fieller's interval.

    Fieller (J. R. Stat. Soc. B 16, 1954, 175): the ratios r for which mean(trace) - r mean(sq_gradient) is not told
    from zero. They are unbounded where |G|^2 itself is not, as for noise scales of 500 times a rank's batch in 94 % of
    windows of 8 ranks and 200 steps; of the others a third lies too low, 2 % of all (simulated). What changes in the
    course of the steps widens the interval.
    """
    fewest = min((step.ranks for step in steps), default=MIN_RANKS)
    if fewest < MIN_RANKS:
        return undetermined(f"{fewest} rank{'s' * (fewest > 1)}: at least {MIN_RANKS} are needed")
    if len(steps) < MIN_STEPS:
        return undetermined(
            f"{len(steps)} measured steps with local gradients and samples: at least {MIN_STEPS} are needed; set "
            "local_gradients=True, and pass samples=n to step, on the host"
        )
    traces, sq_gradients = zip(*(estimates(step) for step in steps), strict=True)
    trace, sq_gradient = statistics.fmean(traces), statistics.fmean(sq_gradients)
    freedom = len(steps) - 1
    t_squared = (QUANTILE + (QUANTILE**3 + QUANTILE) / (4 * freedom)) ** 2  # Abramowitz and Stegun 26.7.5
    a = sq_gradient**2 - t_squared * statistics.variance(sq_gradients, sq_gradient) / len(steps)
    b = trace * sq_gradient - t_squared * statistics.covariance(traces, sq_gradients) / len(steps)
    c = trace**2 - t_squared * statistics.variance(traces, trace) / len(steps)
    if a <= 0 or sq_gradient <= 0:
        return undetermined(
            f"the squared gradient is not told from zero in {len(steps)} steps: more steps, more ranks or a larger "
            "batch are needed"
        )
    root = math.sqrt(max(b * b - a * c, 0.0))
    return NoiseScale(trace / sq_gradient, (b - root) / a, (b + root) / a, determined=True)


def undetermined(why: str) -> NoiseScale:
    """No value and no bound, for this reason."""
    return NoiseScale(math.nan, 0.0, math.inf, determined=False, why=why)


def estimates(step: NoiseStep) -> tuple[float, float]:
    """Unbiased estimates of tr(Sigma), the variance of one sample's gradient, and of |G|^2, from one step."""
    small, large = step.samples, step.samples * step.ranks
    trace = (step.mean_local_sq_norm - step.sq_norm) / (1 / small - 1 / large)
    return trace, (large * step.sq_norm - small * step.mean_local_sq_norm) / (large - small)


def steps_of(stats: StepStats) -> dict[str, NoiseStep]:
    """What a measured step says of each stream whose gradients, and all ranks' own ones, are known and finite.

    Of ranks that are heard in turns, those heard stand for all.
    """
    if not stats.local:
        return {}
    samples = stats.rank_facts.samples
    if not all(number > 0 for number in samples):
        return {}
    of_one = statistics.harmonic_mean(samples)
    steps = {}
    for number, (name, stream) in enumerate(stats.streams.items()):
        squares = [rank.norms[number] ** 2 for rank in stats.local]
        if math.isfinite(stream.grad_norm) and not stream.nonfinite and all(map(math.isfinite, squares)):
            mean = statistics.fmean(squares)
            steps[name] = NoiseStep(stream.grad_norm**2, mean, of_one, stats.ranks)
    return steps
