"""Shapley values and redundancy against their definitions, and on planted streams."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ddp_streammon.evaluation.intervals import mean_sums, ratio
from ddp_streammon.evaluation.shapley import coalitions, redundancy, shapley

NAMES = ("audio", "depth", "rgb")


def worth_of(streams: tuple[str, ...], seed: int) -> dict[frozenset[str], float]:
    chance = random.Random(seed)
    return {members: chance.random() for members in coalitions(streams)}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shapley_is_the_mean_over_all_orders(count: int) -> None:
    streams = NAMES[:count]
    worth = worth_of(streams, count)
    values = shapley(worth)
    orders = list(itertools.permutations(streams))
    for stream in streams:
        gains = []
        for order in orders:
            before = frozenset(order[: order.index(stream)])
            gains.append(worth[before | {stream}] - worth[before])
        assert values[stream] == pytest.approx(sum(gains) / len(orders), abs=1e-15)
    assert sum(values.values()) == pytest.approx(worth[frozenset(streams)] - worth[frozenset()])


def test_two_streams_are_the_formula_of_the_evidence() -> None:
    worth = worth_of(NAMES[:2], 7)
    a, b = (frozenset({name}) for name in NAMES[:2])
    expected = 0.5 * (worth[a] - worth[frozenset()]) + 0.5 * (worth[a | b] - worth[b])
    assert shapley(worth)["audio"] == pytest.approx(expected)


def test_per_item_worths_give_an_interval() -> None:
    correct = torch.rand(4, 400, generator=torch.Generator().manual_seed(0)).round().double()
    sets = coalitions(NAMES[:2])
    items = shapley(dict(zip(sets, correct, strict=True)))
    means = shapley({members: float(values.mean()) for members, values in zip(sets, correct, strict=True)})
    estimate = ratio(mean_sums(items["depth"]))
    assert estimate.value == pytest.approx(means["depth"])
    assert estimate.low < means["depth"] < estimate.high
    assert estimate.items == 400


def test_redundant_and_synergetic_pairs() -> None:
    """rgb and depth know the same; audio is worth something only with text."""

    def worth(members: frozenset[str]) -> float:
        return 0.5 * bool(members & {"rgb", "depth"}) + 0.3 * ({"audio", "text"} <= members)

    values = {members: worth(members) for members in coalitions(("rgb", "depth", "audio", "text"))}
    found = redundancy(values)
    expected = dict.fromkeys(itertools.combinations(("audio", "depth", "rgb", "text"), 2), 0.0)
    assert found == pytest.approx(expected | {("depth", "rgb"): 0.5, ("audio", "text"): -0.3})


def test_redundancy_needs_no_small_coalitions() -> None:
    everything = frozenset({"a", "b", "c", "d"})
    needed = [members for members in coalitions(sorted(everything)) if len(members) >= 2]
    assert len(needed) == 11
    assert set(redundancy(dict.fromkeys(needed, 1.0)).values()) == {0.0}


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 3 streams can be shared out exactly, got 4: a, b, c, d"):
        shapley(worth_of(("a", "b", "c", "d"), 0))
    with pytest.raises(ValueError, match="1 to 4 streams can be shared out exactly, got 0"):
        redundancy({frozenset(): 1.0})
    with pytest.raises(ValueError, match="worth of these coalitions is missing: none, depth"):
        shapley({frozenset({"audio"}): 1.0, frozenset({"audio", "depth"}): 1.0})
