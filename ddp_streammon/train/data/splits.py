"""Seeded, stratified splits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stratified(labels: Tensor, sizes: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Disjoint index sets of the given sizes, and one of the rest, each with the classes in proportion.

    labels [N], int64. Returns len(sizes) + 1 index tensors (int64) that together hold 0 to N - 1 once. A
    class of n items gets its share n x size / N in a set, to within one item at either end. Every class's
    items are shuffled and placed evenly on [0, 1]; the sets are consecutive pieces of that line. Only
    `generator` is drawn from.

    Raises ValueError for a size below 1 or sizes that together exceed N.
    """
    count = len(labels)
    if min(sizes, default=1) < 1 or sum(sizes) > count:
        raise ValueError(f"sizes must be at least 1 and at most {count} together, got {tuple(sizes)}")
    shuffled = torch.randperm(count, generator=generator)
    place = torch.empty(count, dtype=torch.float64)
    for value in torch.unique(labels):
        members = shuffled[labels[shuffled] == value]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    order = shuffled[torch.argsort(place[shuffled], stable=True)]
    return list(torch.split(order, [*sizes, count - sum(sizes)]))
