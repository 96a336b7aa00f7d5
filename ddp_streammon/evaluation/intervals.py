"""Intervals from additive sums: proportions, means and ratios of items in groups, differences; and sample sizes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ddp_streammon.evaluation.student_t import t_quantile, t_tail

Record = TypeVar("Record")


@dataclass(frozen=True)
class Estimate:
    """A figure with its two-sided interval at `level`, in the figure's own unit.

    `items` is how many items it was read from, `groups` how many independent groups they form (as many as items where
    no groups were given): none gives nan, one infinite bounds. `dof` are the degrees of freedom of its t distribution
    (inf: normal). One-sided bounds and p values take each side of the interval as a multiple of a
    standard error (exact for `ratio`, an approximation for Wilson and Newcombe) and allow for `skew`, the skewness of
    the figure's error, which the interval does not: where few items carry a mean, a draw without them is low and looks
    sure. Hall's transformation (J. R. Stat. Soc. B 54, 1992, 221) makes t' = ((1 + a t / 3)^3 - 1) / a + a / 6 of t.
    No bound leaves the figure's range, `least` to `most`.
    """

    value: float
    low: float
    high: float
    items: int
    groups: int
    dof: float = math.inf
    level: float = 0.95
    skew: float = 0.0
    least: float = -math.inf
    most: float = math.inf

    def lower(self, alpha: float) -> float:
        """The one-sided lower bound that is above the truth with probability `alpha`."""
        bound = self.value - self._error(self.value - self.low) * _from_hall(self._quantile(1 - alpha), self.skew)
        return max(bound, self.least)

    def upper(self, alpha: float) -> float:
        """The one-sided upper bound that is below the truth with probability `alpha`."""
        bound = self.value - self._error(self.high - self.value) * _from_hall(self._quantile(alpha), self.skew)
        return min(bound, self.most)

    def p_above(self, margin: float) -> float:
        """One-sided p value against "the truth is `margin` or less"; 1 where the figure is undetermined."""
        return self._p(self.value - margin, self.value - self.low, self.skew)

    def p_below(self, margin: float) -> float:
        """One-sided p value against "the truth is `margin` or more"; 1 where the figure is undetermined."""
        return self._p(margin - self.value, self.high - self.value, -self.skew)

    def detectable(self, alpha: float, power: float = 0.8) -> float:
        """How far the truth has to lie from a margin for a one-sided claim at `alpha` with this power, without skew."""
        error = self._error(max(self.value - self.low, self.high - self.value))
        return error * (self._quantile(1 - alpha) + self._quantile(power))

    def _quantile(self, probability: float) -> float:
        return t_quantile(probability, max(self.dof, 1))

    def _error(self, side: float) -> float:
        return side / self._quantile((1 + self.level) / 2)

    def _p(self, distance: float, side: float, skew: float) -> float:
        if not math.isfinite(distance) or not math.isfinite(side):
            return 1.0
        if side <= 0:
            return 0.0 if distance > 0 else 1.0
        return t_tail(_to_hall(distance / self._error(side), skew), self.dof)


def negated(estimate: Estimate) -> Estimate:
    """The same of minus the figure."""
    low, high, least, most = -estimate.high, -estimate.low, -estimate.most, -estimate.least
    return replace(estimate, value=-estimate.value, low=low, high=high, skew=-estimate.skew, least=least, most=most)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The same of a positive multiple of the figure."""
    changed = {name: factor * getattr(estimate, name) for name in ("value", "low", "high", "least", "most")}
    return replace(estimate, **changed)


def bounds(estimate: Estimate) -> tuple[float, float]:
    """The interval at the estimate's level that allows for the skewness of its error, as one-sided bounds do."""
    alpha = (1 - estimate.level) / 2
    return estimate.lower(alpha), estimate.upper(alpha)


def _to_hall(t: float, skew: float) -> float:
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def _from_hall(t: float, skew: float) -> float:
    if abs(skew) < 1e-6:  # where the difference below is rounding
        return t
    cube = 1 + skew * (t - skew / 6)
    return 3 / skew * (math.copysign(abs(cube) ** (1 / 3), cube) - 1)


# Proportions ------------------------------------------------------------------------------------------------------


def wilson(count: float, items: int, level: float = 0.95) -> Estimate:
    """`count` of `items` independent items: Wilson's score interval (J. Am. Stat. Assoc. 22, 1927, p. 209)."""
    if not 0 <= count <= items:
        raise ValueError(f"count must lie between 0 and the number of items ({items}), got {count}")
    if items == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0, level=level)
    z2 = t_quantile(_two_sided(level), math.inf) ** 2
    share = count / items
    centre = (count + z2 / 2) / (items + z2)
    half = math.sqrt(z2 * (share * (1 - share) / items + z2 / (4 * items**2))) / (1 + z2 / items)
    low, high = max(centre - half, 0.0), min(centre + half, 1.0)
    return Estimate(share, low, high, items, items, level=level, least=0.0, most=1.0)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """first - second of two independent sets of items (train and validation, say).

    Of two Wilson intervals it is Newcombe's (Stat. Med. 17, 1998, 873, method 10); of any others the sides are squared
    and added in the same way (Zou and Donner, Stat. Med. 27, 2008, 1693). Third moments of independent errors add up to
    the skewness. Errors: ValueError for different levels.
    """
    if first.level != second.level:
        raise ValueError(f"both estimates must have one level, got {first.level} and {second.level}")
    found = _square_and_add(first, second, 0.0, first.items + second.items, first.groups + second.groups)
    own, other = (estimate._error((estimate.high - estimate.low) / 2) for estimate in (first, second))
    both = math.hypot(own, other)
    skew = first.skew * (own / both) ** 3 - second.skew * (other / both) ** 3 if 0 < both < math.inf else 0.0
    return replace(found, skew=skew)


def paired_proportions(both: int, only_first: int, only_second: int, neither: int, level: float = 0.95) -> Estimate:
    """Difference of two proportions of the same independent items, first - second, from the four counts.

    Newcombe, Stat. Med. 17, 1998, 2635, method 10: Wilson intervals joined by the correlation of the two outcomes, with
    his correction for continuity.
    """
    counts = (both, only_first, only_second, neither)
    if min(counts) < 0:
        raise ValueError(f"counts must not be negative, got {counts}")
    items = sum(counts)
    first, second = wilson(both + only_first, items, level), wilson(both + only_second, items, level)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    product: float = both * neither - only_first * only_second
    if product > 0:
        product = max(product - items / 2, 0)
    return _square_and_add(first, second, product / math.sqrt(margins) if margins else 0.0, items, items)


def _square_and_add(first: Estimate, second: Estimate, correlation: float, items: int, groups: int) -> Estimate:
    def side(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

    value = first.value - second.value
    low = value - side(first.value - first.low, second.high - second.value)
    high = value + side(first.high - first.value, second.value - second.low)
    dof, least, most = min(first.dof, second.dof), first.least - second.most, first.most - second.least
    return Estimate(value, low, high, items, groups, dof, first.level, least=least, most=most)


# Means and ratios of items in groups ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatioSums:
    """What the interval of a ratio needs, added up over groups: how many items and groups there were, and with y and w
    a group's totals the sums of y, w, y^2, y w, w^2 and of the four products of three; and `own_...`, the sums of y^2,
    y w and w^2 of single items. `+` and a SUM over ranks merge two sets of groups, so all items of a group must have
    gone into one of them; the identity is `RatioSums()`.
    """

    items: float = 0.0
    groups: float = 0.0
    y: float = 0.0
    w: float = 0.0
    yy: float = 0.0
    yw: float = 0.0
    ww: float = 0.0
    yyy: float = 0.0
    yyw: float = 0.0
    yww: float = 0.0
    www: float = 0.0
    own_yy: float = 0.0
    own_yw: float = 0.0
    own_ww: float = 0.0

    CELLS = 14

    def __add__(self, other: RatioSums) -> RatioSums:
        return RatioSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def cells(self) -> Tensor:
        """For a packet. Shape: [14] float64."""
        return torch.tensor(astuple(self), dtype=torch.float64, device="cpu")

    def worth(self) -> float:
        """How many independent items the groups are worth: the items over their design effect, the groups' squares over
        the items' own (Kish, Survey Sampling, 1965, 5.4); as many as the groups where all items agree."""
        value = self.y / self.w
        own = self.own_yy - 2 * value * self.own_yw + value**2 * self.own_ww
        together = self.yy - 2 * value * self.yw + value**2 * self.ww
        if own <= _SAME * (self.own_yy + value**2 * self.own_ww):
            return self.groups
        return self.items if together <= own else max(self.items * own / together, self.groups)


_SAME = 1e-14
"""Squares below this share of what they are the difference of are rounding."""


def ratio_sums(numerators: Tensor, denominators: Tensor, groups: Tensor | None = None) -> RatioSums:
    """Of the ratio of two totals: sum of numerators over sum of denominators.

    Items that are zero in both count for nothing, so a batch may be padded with them. `groups` are integers, equal for
    items that are not independent of each other (tokens of a sequence, clips of one video); None: each its own. A group
    that is split over ranks would count as several, with too narrow an interval: give ranks whole groups, or bring the
    items to one place first (Collective.gather).

    Shape: [N] each. Comm: none. Sync: one read from the device.
    """
    shapes = [tuple(t.shape) for t in (numerators, denominators, groups) if t is not None]
    if numerators.dim() != 1 or len(set(shapes)) > 1:
        raise ValueError(f"numerators, denominators and groups must have one shape [items], got {shapes}")
    y, w = numerators.detach().double().cpu(), denominators.detach().double().cpu()
    counted = (y != 0) | (w != 0)
    y, w = y[counted], w[counted]
    items = len(y)
    squares = (y * y, y * w, w * w)
    if groups is not None:
        _, place = torch.unique(groups.detach().cpu()[counted], return_inverse=True)
        count = int(place.max()) + 1 if items else 0
        y = torch.zeros(count, dtype=torch.float64, device="cpu").index_add_(0, place, y)
        w = torch.zeros(count, dtype=torch.float64, device="cpu").index_add_(0, place, w)
    products = (y, w, y * y, y * w, w * w, y**3, y * y * w, y * w * w, w**3, *squares)
    sums = torch.stack([product.sum() for product in products]).tolist()
    return RatioSums(items, len(y), *sums)


def mean_sums(values: Tensor, weights: Tensor | None = None, groups: Tensor | None = None) -> RatioSums:
    """Of a mean over items by weight (tokens, 0 for padding, whose value is not looked at). See `ratio_sums`.

    Of a paired difference, the mean of each item's own difference: `mean_sums(exchanged - plain, weights, groups)`.
    """
    if weights is None:
        weights = torch.ones_like(values, dtype=torch.float64)
    wrong = weights[~((weights >= 0) & (weights < math.inf))]
    if len(wrong):
        raise ValueError(f"weights must not be negative, and finite, got {float(wrong[0])}")
    weights = weights.double()
    return ratio_sums(torch.where(weights > 0, values.double() * weights, 0.0), weights, groups)


def ratio(sums: RatioSums, level: float = 0.95, *, unit_range: bool = False, least: float = -1.0) -> Estimate:
    """The ratio estimator with its linearised variance, G / (G - 1) * sum of (y - R w)^2 / (sum of w)^2 for G groups.

    The quantile is t's with G - 1 degrees of freedom (Cochran, Sampling Techniques, 3rd ed., 6.3 and 6.4; the clustered
    error of Liang and Zeger, Biometrika 73, 1986, 13). One group has infinite bounds; nan stays nan.

    `unit_range` says that each item's value lies in [`least`, 1]: the difference of two that are correct or not, or,
    with `least=0`, one of those. The interval is then that of the items with one more group of value 1 and one of value
    `least`: Bonett and Price (J. Educ. Behav. Stat. 37, 2012, 479), so that no disagreement at all is not taken for
    certainty. Each weighs what an independent item does (`RatioSums.worth`): 32 images of one batch that have nothing
    to do with each other are not one.

    Rounding: a deviation below 1e-7 of the value cannot be told from none.
    """
    groups, dof = sums.groups, sums.groups - 1
    value = sums.y / sums.w if sums.w else math.nan
    if groups < 2 or not math.isfinite(value):
        edge = math.inf if groups and math.isfinite(value) else math.nan
        return Estimate(value, -edge, edge, round(sums.items), round(groups), max(dof, 0), level)
    if unit_range:
        extra = sums.w / sums.worth()
        first, second, third = (extra**power * (1 + least**power) for power in (1, 2, 3))
        of_w = (extra**2 * (1 + least), 2 * extra**2), (extra**3 * (1 + least**2), extra**3 * (1 + least), 2 * extra**3)
        sums += RatioSums(0, 2, first, 2 * extra, second, *of_w[0], third, *of_w[1])
    centre = sums.y / sums.w
    squares = max(sums.yy - 2 * centre * sums.yw + centre**2 * sums.ww, 0.0)
    cubes = sums.yyy - 3 * centre * sums.yyw + 3 * centre**2 * sums.yww - centre**3 * sums.www
    skew = math.copysign(cubes / squares**1.5, sums.w * cubes) if squares > 0 else 0.0
    half = t_quantile(_two_sided(level), dof) * math.sqrt(squares * sums.groups / (sums.groups - 1)) / abs(sums.w)
    low, high = centre - half, centre + half
    if unit_range:
        low, high = max(low, least), min(high, 1.0)
    within = (least, 1.0) if unit_range else (-math.inf, math.inf)
    return Estimate(
        value, min(low, value), max(high, value), round(sums.items), round(groups), dof, level, skew, *within
    )


# How many items ---------------------------------------------------------------------------------------------------


def detectable(items: int, sd: float, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest mean difference that an interval at `level` excludes zero for with this power.

    (t_(1 + level) / 2 + t_power) sd / sqrt(n), n - 1 degrees of freedom: within 1 % of the non-central t from 20 items
    on. `items` are independent ones (groups), `sd` the deviation of one item's difference; infinite below 2.
    """
    _check_power(sd, power)
    if items < 2:
        return math.inf
    quantiles = t_quantile(_two_sided(level), items - 1) + t_quantile(power, items - 1)
    return quantiles * sd / math.sqrt(items)


def samples_for(effect: float, power: float, sd: float, level: float = 0.95) -> int:
    """The fewest items with which `effect` is detectable; see `detectable`."""
    if not effect > 0:
        raise ValueError(f"effect must be above 0, got {effect}")
    enough = 2
    while detectable(enough, sd, level, power) > effect:
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        too_few, enough = (too_few, middle) if detectable(middle, sd, level, power) <= effect else (middle, enough)
    return enough


def _check_power(sd: float, power: float) -> None:
    if not 0 <= sd < math.inf:
        raise ValueError(f"sd must be at least 0 and finite, got {sd}")
    if not 0.5 <= power < 1:
        raise ValueError(f"power must be at least 0.5 and below 1, got {power}")


def _two_sided(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1 (0.95, say), got {level}")
    return (1 + level) / 2


# A user's own figure ----------------------------------------------------------------------------------------------


def paired_bootstrap(
    reduce: Callable[[Sequence[Record]], float],
    first: Sequence[Record],
    second: Sequence[Record],
    groups: Sequence[Hashable] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """reduce(first) - reduce(second) of the same items in the same order, for a figure that is no mean (mAP, F1).

    Groups of items are drawn with replacement, the same for both, by a generator of its own. The interval is that of
    percentiles (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 13.3), which needs some 50 groups. A draw
    whose figure is nan (a class that was not drawn) counts as lying beyond both bounds.

    Cost: 2 * (draws + 1) calls of `reduce`, on one process that has all items. Comm, Sync: none.
    """
    labels = range(len(first)) if groups is None else groups
    if not len(first) == len(second) == len(labels):
        raise ValueError(
            f"the same items are needed in both, got {len(first)} and {len(second)} records and {len(labels)} groups"
        )
    if draws < 100:
        raise ValueError(f"draws must be at least 100 for an interval, got {draws}")
    if not first:
        return Estimate(math.nan, math.nan, math.nan, 0, 0, level=level)
    members: dict[Hashable, list[int]] = {}
    for item, label in enumerate(labels):
        members.setdefault(label, []).append(item)
    clusters = list(members.values())
    chance = random.Random(seed)
    drawn = []
    for _ in range(draws):
        items = [item for cluster in chance.choices(clusters, k=len(clusters)) for item in cluster]
        drawn.append(reduce([first[item] for item in items]) - reduce([second[item] for item in items]))
    tail = int(draws * (1 - _two_sided(level)))
    low = sorted(-math.inf if math.isnan(value) else value for value in drawn)[tail]
    high = sorted(math.inf if math.isnan(value) else value for value in drawn)[-1 - tail]
    value = reduce(first) - reduce(second)
    return Estimate(value, low, high, len(first), len(clusters), level=level)
