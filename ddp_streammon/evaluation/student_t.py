"""Student's t distribution in plain Python: the core needs torch alone."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

_NORMAL = NormalDist()
_TINY = 1e-300
_ROUNDING = 1e-16


def t_tail(t: float, dof: float) -> float:
    """P(T > t) at `dof` degrees of freedom (inf: the normal distribution); relative error below 1e-9.

    Half the regularised incomplete beta function I_x(dof / 2, 1 / 2) at x = dof / (dof + t^2) (Abramowitz and Stegun
    26.7.1), which is its continued fraction (DLMF 8.17.22) evaluated by Lentz's method.
    """
    if math.isnan(t):
        return math.nan
    if t < 0:
        return 1 - t_tail(-t, dof)
    if math.isinf(dof) or math.isinf(t):
        return math.erfc(t / math.sqrt(2)) / 2
    a, b, square = dof / 2, 0.5, t * t
    x, rest = dof / (dof + square), square / (dof + square)
    if rest == 0:
        return 0.5
    front = math.exp(-a * math.log1p(square / dof) + b * math.log(rest) - _log_beta_half(a))
    if x < (a + 1) / (a + b + 2):
        return front * _continued_fraction(a, b, x) / a / 2
    return (1 - front * _continued_fraction(b, a, rest) / b) / 2


@lru_cache(maxsize=4096)
def t_quantile(probability: float, dof: float) -> float:
    """The t with P(T <= t) = probability, 0 < probability < 1; 1e-8 of the value.

    `statistics.NormalDist` at infinite `dof`; else bisection of `t_tail` down to neighbouring floats.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability must lie between 0 and 1, got {probability}")
    if not dof > 0:
        raise ValueError(f"degrees of freedom must be above 0 (inf for the normal distribution), got {dof}")
    if math.isinf(dof):
        return _NORMAL.inv_cdf(probability)
    if probability < 0.5:
        return -_upper_quantile(probability, dof)
    return _upper_quantile(1 - probability, dof)


def _upper_quantile(tail: float, dof: float) -> float:
    low, high = 0.0, 1.0
    while t_tail(high, dof) > tail:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_tail(middle, dof) > tail else (low, middle)
    return middle


def _log_beta_half(a: float) -> float:
    """ln B(a, 1/2); for large `a` by the series of ln Gamma(a + 1/2) - ln Gamma(a), where lgamma loses digits."""
    if a < 30:
        return math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    series = math.log(a) / 2 - 1 / (8 * a) + 1 / (192 * a**3) - 1 / (640 * a**5) + 17 / (14336 * a**7)
    return math.log(math.pi) / 2 - series


def _continued_fraction(a: float, b: float, x: float) -> float:
    """Of the incomplete beta function; quick for x < (a + 1) / (a + b + 2), about sqrt(max(a, b)) steps."""
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value, step = d, 0
    while True:
        step += 1
        even = step * (b - step) * x / ((a + 2 * step - 1) * (a + 2 * step))
        odd = -(a + step) * (a + b + step) * x / ((a + 2 * step) * (a + 2 * step + 1))
        for coefficient in (even, odd):
            d = 1 / _away_from_zero(1 + coefficient * d)
            c = _away_from_zero(1 + coefficient / c)
            value *= c * d
        if abs(c * d - 1) <= 2 * _ROUNDING or step > 100_000:
            return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
