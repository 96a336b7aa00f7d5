"""How streams share the credit: exact Shapley values, and which pairs stand in for each other.

A coalition's worth is what the model achieves with those streams only: a number (accuracy, minus the loss), or one of
each item. Both figures are linear in it, so per-item tensors in give per-item tensors out, for `intervals.mean_sums`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations
from math import factorial
from typing import TypeVar

from torch import Tensor

Worth = TypeVar("Worth", float, Tensor)


def coalitions(streams: Collection[str]) -> list[frozenset[str]]:
    """All 2^S sets of streams, the empty one first."""
    return [frozenset(members) for size in range(len(streams) + 1) for members in combinations(streams, size)]


def shapley(worth: Mapping[frozenset[str], Worth]) -> dict[str, Worth]:
    """What each of at most three streams adds, on average over the orders in which they could join.

    phi_s = sum over coalitions C without s of |C|! (S - |C| - 1)! / S! * (worth(C + s) - worth(C)) (Shapley, in
    Contributions to the Theory of Games II, 1953, p. 307); they add up to worth(all) - worth(none). Needs all 2^S
    coalitions.
    """
    streams = _streams(worth, 3)
    _check(worth, coalitions(streams))
    count = len(streams)
    values = {}
    for stream in streams:
        value = worth[frozenset()] * 0
        for others in coalitions([other for other in streams if other != stream]):
            share = factorial(len(others)) * factorial(count - len(others) - 1) / factorial(count)
            value = value + share * (worth[others | {stream}] - worth[others])
        values[stream] = value
    return values


def redundancy(worth: Mapping[frozenset[str], Worth]) -> dict[tuple[str, str], Worth]:
    """Of each pair of at most four streams: what losing both costs beyond losing one and losing the other.

    Above 0 each covers for the other (redundant), below 0 they only work together. It is minus the pair's interaction
    in the presence of all others (Grabisch and Roubens, Int. J. Game Theory 28, 1999, 547). Needs the coalitions of all
    streams, of all but one and of all but two: at most 11.
    """
    streams: list[str] = _streams(worth, 4)
    everything: frozenset[str] = frozenset(streams)
    pairs: list[tuple[str, str]] = list(combinations(streams, 2))
    _check(worth, [everything, *(everything - {s} for s in streams), *(everything - set(pair) for pair in pairs)])
    return {
        (a, b): worth[everything - {a}] + worth[everything - {b}] - worth[everything] - worth[everything - {a, b}]
        for a, b in pairs
    }


def _streams(worth: Mapping[frozenset[str], Worth], most: int) -> list[str]:
    streams = sorted(frozenset().union(*worth))
    if not 1 <= len(streams) <= most:
        raise ValueError(f"1 to {most} streams can be shared out exactly, got {len(streams)}: {', '.join(streams)}")
    return streams


def _check(worth: Mapping[frozenset[str], Worth], needed: Collection[frozenset[str]]) -> None:
    missing = [" + ".join(sorted(members)) or "none" for members in needed if members not in worth]
    if missing:
        raise ValueError(f"the worth of these coalitions is missing: {', '.join(missing)}")
