"""Whose input an item gets in an exchange, and what that means for the error of a mean."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddp_streammon.evaluation.ablate import reordered, tensors_of
from ddp_streammon.evaluation.intervals import Estimate, RatioSums, ratio, ratio_sums

Swap: TypeAlias = "Mapping[str, str | int | Sequence[str | int]]"
"""By stream: where its input lies in a batch. Keys of a mapping, positions in a tuple, attributes of any other object,
with dots for what is nested (`inputs.pixel_values`, `0.1`). Nothing that the score reads its target from: a language
model's `input_ids`, if its `labels` lie elsewhere."""


def partners(eligible: Tensor, groups: Tensor | None = None) -> Tensor:
    """For each item of a batch the one whose input it gets; itself where it is not eligible or alone.

    Items change places in pairs, one odd item makes a ring of three. Partners are of different groups wherever no group
    has more than half of the eligible items. Shape: [B] bool and [B] integers in, [B] int64 out, on the host; it may
    be the same tensor for equal batches.
    """
    eligible = eligible.cpu()
    if groups is None and bool(eligible.all()):
        return _pairs_of_all(len(eligible))
    own = torch.arange(len(eligible), device="cpu")[eligible]
    if groups is not None:
        own = own[torch.argsort(groups.cpu()[own], stable=True)]
    return _in_pairs(len(eligible), own)


@functools.lru_cache(maxsize=8)
def _pairs_of_all(items: int) -> Tensor:
    return _in_pairs(items, torch.arange(items, device="cpu"))


def _in_pairs(items: int, own: Tensor) -> Tensor:
    """The first half of `own` changes places with the second."""
    order = torch.arange(items, device="cpu")
    half = len(own) // 2
    if not half:
        return order
    first, second = own[:half], own[half : 2 * half]
    order[first], order[second] = second, first
    if len(own) % 2:
        order[second[0]], order[own[-1]] = own[-1], first[0]
    return order


def exchanged(batch: Any, where: str | int | Sequence[str | int], order: Tensor) -> Any:
    """The batch with a stream's input in another order. Errors: ValueError for a place that is not there."""
    for path in [where] if isinstance(where, str | int) else where:
        batch = _changed(batch, str(path).split("."), lambda value: _exchanged_value(value, order), str(path))
    return batch


def _exchanged_value(value: Any, order: Tensor) -> Any:
    items = len(order)
    if isinstance(value, list | tuple) and len(value) == items:
        return type(value)(value[place] for place in order.tolist())
    if not any(tensor.dim() and len(tensor) == items for tensor in tensors_of(value)):
        raise ValueError(f"nothing in it has {items} entries, one an item")
    return reordered(value, items, order)


def _changed(value: Any, path: Sequence[str], change: Callable[[Any], Any], name: str) -> Any:
    if not path:
        try:
            return change(value)
        except ValueError as error:
            raise ValueError(f"swap: {name!r} cannot be exchanged between items: {error}") from None
    step, rest = path[0], path[1:]
    if isinstance(value, Mapping) and step in value:
        filled = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        filled[step] = _changed(value[step], rest, change, name)
        return filled
    if isinstance(value, tuple) and step in getattr(value, "_fields", ()):
        step = str(value._fields.index(step))  # type: ignore[attr-defined]
    if isinstance(value, list | tuple) and step.isdigit() and int(step) < len(value):
        parts = list(value)
        parts[int(step)] = _changed(parts[int(step)], rest, change, name)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not isinstance(value, Mapping | list | tuple) and hasattr(value, step):
        changed = copy.copy(value)
        object.__setattr__(changed, step, _changed(getattr(value, step), rest, change, name))
        return changed
    valid = list(value) if isinstance(value, Mapping) else range(len(value)) if isinstance(value, list | tuple) else ()
    known = ", ".join(map(str, valid)) or f"attributes of {type(value).__name__}"
    raise ValueError(f"swap: there is no {name!r} in the batch; it has {known}")


def exchanged_mean(
    values: Tensor, weights: Tensor, partner: Tensor, groups: Tensor | None, level: float, *, unit_range: bool
) -> Estimate:
    """The mean of what an exchange does to each item, by weight, with an interval that knows who met whom.

    Two items' values depend on each other if they share a group, as themselves or as a partner. Without groups those
    are the pairs, and each is a cluster of its own. With groups the squares are those of all values that touch a group,
    less the ones that are counted at both ends (dyadic clusters: Aronow, Samii and Assenova, Political Analysis 23,
    2015, 564); a pair of groups counts as one. The interval is never narrower than by an item's own group alone.

    Shape: [N] each; `partner` are rows. Comm, Sync: none (on the host).
    """
    totals = torch.where(weights > 0, values * weights, 0.0)
    if groups is None:
        rows = torch.arange(len(values), device="cpu")
        pair = torch.stack([rows, partner, partner[partner]]).amin(0)
        return ratio(ratio_sums(totals, weights, pair), level, unit_range=unit_range)
    _, own = torch.unique(groups, return_inverse=True)
    other = own[partner]
    plain = ratio(ratio_sums(totals, weights, own), level, unit_range=unit_range)
    low, high = torch.minimum(own, other), torch.maximum(own, other)
    count = int(own.max()) + 1 if len(own) else 0
    dyads, dyad = torch.unique(low * count + high, return_inverse=True)
    y = torch.zeros(len(dyads), dtype=torch.float64, device="cpu").index_add_(0, dyad, totals)
    w = torch.zeros(len(dyads), dtype=torch.float64, device="cpu").index_add_(0, dyad, weights)
    first, second = torch.div(dyads, max(count, 1), rounding_mode="floor"), dyads % max(count, 1)
    mixed = first != second
    touching_y, touching_w = (
        torch.zeros(count, dtype=torch.float64, device="cpu")
        .index_add_(0, first, of)
        .index_add_(0, second[mixed], of[mixed])
        for of in (y, w)
    )
    at_both = ratio_sums(y[mixed], w[mixed])
    touching, alone = ratio_sums(touching_y, touching_w), ratio_sums(totals, weights)
    total_y, total_w = float(y.sum()), float(w.sum())
    squares = RatioSums(
        float((weights != 0).sum()),
        max(touching.groups - at_both.groups, touching.groups / 2),
        total_y,
        total_w,
        *(getattr(touching, name) - getattr(at_both, name) for name in ("yy", "yw", "ww", "yyy", "yyw", "yww", "www")),
        *(getattr(alone, name) for name in ("own_yy", "own_yw", "own_ww")),
    )
    dyadic = ratio(squares, level, unit_range=unit_range)
    return max(dyadic, plain, key=lambda estimate: estimate.high - estimate.low)
