"""Every item's figures side by side, the same on every rank, and what can be read off them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddp_streammon import keys
from ddp_streammon.evaluation.exchange import exchanged_mean
from ddp_streammon.evaluation.intervals import Estimate, difference, mean_sums, ratio, wilson
from ddp_streammon.stats import ratio as quotient

LEVEL = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Table:
    """The items of a split, in an order that is the same for any number of ranks.

    `figures[variant, figure]` is nan where a variant was not tried, `tried` says of which items it was. `partner` by
    variant: the row whose input an item got, its own where it got none. Shape: [N] each, on the host.
    """

    weight: Tensor
    figures: Mapping[tuple[str, str], Tensor]
    tried: Tensor
    groups: Tensor | None = None
    present: Mapping[str, Tensor] = field(default_factory=dict)
    partner: Mapping[str, Tensor] = field(default_factory=dict)
    records: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def exchanged(self) -> bool:
        """Whether any item got another's input."""
        rows = torch.arange(len(self), device="cpu")
        return any(bool((partner != rows).any()) for partner in self.partner.values())

    def has(self, variant: str, figure: str) -> bool:
        """Whether the variant was tried and gave the figure."""
        return (variant, figure) in self.figures

    def value(self, variant: str, figure: str) -> float:
        """The weighted mean over the items that the variant was tried of."""
        rows = self._rows(variant)
        values, weights = self.figures[variant, figure][rows], self.weight[rows]
        return quotient(float(torch.where(weights > 0, values * weights, 0.0).sum()), float(weights.sum()))

    def is_share(self, figure: str) -> bool:
        """Whether the figure is 0 or 1 for every item: a mean of it is a proportion."""
        values = self.figures[keys.FULL, figure]
        return bool(((values == 0) | (values == 1)).all())

    def mean(self, variant: str, figure: str) -> Estimate:
        """`value` with its interval: Wilson's for a proportion of independent items of one weight."""
        rows = self._rows(variant)
        values, weights = self.figures[variant, figure][rows], self.weight[rows]
        share = self.is_share(figure)
        groups = None if self.groups is None else self.groups[rows]
        if share and groups is None and bool((weights == 1).all()):
            return wilson(float(values.sum()), len(values), LEVEL)
        return ratio(mean_sums(values, weights, groups), LEVEL, unit_range=share, least=0.0)

    def rise(self, variant: str, figure: str, streams: Sequence[str]) -> Estimate:
        """How much higher the figure is under the variant, by item; see `contrast`."""
        change = self.figures[variant, figure] - self.figures[keys.FULL, figure]
        return self.contrast(change, [variant], streams, unit_range=self.is_share(figure))

    def contrast(
        self,
        values: Tensor,
        variants: Sequence[str],
        streams: Sequence[str],
        *,
        unit_range: bool = False,
    ) -> Estimate:
        """The mean of a value of each item that was computed from these variants, where these streams have data.

        An item that did not get the same other item's input in every exchange counts for nothing. Shape: [N].
        """
        rows = self.tried.clone()
        for stream in streams:
            if stream in self.present:
                rows &= self.present[stream]
        exchanges = [self.partner[variant] for variant in variants if variant in self.partner]
        for partner in exchanges:
            rows &= (partner == exchanges[0]) & (partner != torch.arange(len(self), device="cpu"))
        if not exchanges:
            groups = None if self.groups is None else self.groups[rows]
            return ratio(mean_sums(values[rows], self.weight[rows], groups), LEVEL, unit_range=unit_range)
        while not bool(rows[exchanges[0]][rows].all()):
            rows &= rows[exchanges[0]]
        met = (torch.cumsum(rows, 0) - 1)[exchanges[0][rows]]  # as rows of those that count
        groups = None if self.groups is None else self.groups[rows]
        return exchanged_mean(values[rows], self.weight[rows], met, groups, LEVEL, unit_range=unit_range)

    def clusters(self, variant: str) -> Tensor:
        """A number for each item, equal for those whose figures under the variant depend on each other. Shape: [N].

        Without groups these are the items that got each other's input; else the groups.
        """
        if self.groups is not None:
            return self.groups
        rows = torch.arange(len(self), device="cpu")
        partner = self.partner.get(variant, rows)
        return torch.stack([rows, partner, partner[partner]]).amin(0)

    def _rows(self, variant: str) -> Tensor:
        return torch.ones_like(self.tried) if variant == keys.FULL else self.tried


def gap(first: Table, second: Table, variant: str, figure: str) -> Estimate:
    """first - second of two independent sets of items."""
    return difference(first.mean(variant, figure), second.mean(variant, figure))
